# SPDX-License-Identifier: Apache-2.0
"""run_config.yaml: what is read from ours and from old ones, and that nothing it names is run."""

import pytest
import torch
import yaml

from evo2_megatron.architectures import ARCHITECTURES
from evo2_megatron.checkpoint.run_config import BIONEMO_PROVIDERS, OWN_PROVIDER, read_run_config
from evo2_megatron.config import UserError

OLD = """
_target_: megatron.bridge.training.config.ConfigContainer
checkpoint: {_target_: megatron.bridge.training.config.CheckpointConfig, pretrained_checkpoint: /data/base}
rng: {_target_: megatron.bridge.training.config.RNGConfig, seed: 41, te_rng_tracker: false}
peft: null
mixed_precision:
  _target_: megatron.bridge.training.mixed_precision.MixedPrecisionConfig
  bf16: true
  params_dtype: {_target_: torch.bfloat16, _call_: false}
  pipeline_dtype: torch.bfloat16
  fp8_recipe: tensorwise
  a_field_of_the_future: 1
model:
  _target_: bionemo.evo2.models.evo2_provider.Hyena7bARCLongContextModelProvider
  forward_step_fn: {_target_: bionemo.evo2.models.evo2_provider.hyena_forward_step, _call_: false}
  attention_backend: {_target_: megatron.core.transformer.enums.AttnBackend, _call_: true, _args_: [1]}
  activation_func: {_target_: torch._C._nn.gelu, _call_: false}
  init_method: {_target_: torch.nn.init.normal_, _partial_: true, _args_: [], mean: 0.0, std: 0.0098}
  params_dtype: {_target_: torch.bfloat16, _call_: false}
  tensor_model_parallel_size: 8
  bias_activation_fusion: true
  fp32_residual_connection: true
  use_te: true
  hybrid_override_pattern: SDH*
  num_layers: 4
  ffn_hidden_size: 11264
  seq_length: 8192
  vocab_size: 512
  seq_len_interpolation_factor: 32
  to_upper: weighted
"""


def config_of(tmp_path, text):
    (tmp_path / "run_config.yaml").write_text(text)
    return read_run_config(tmp_path)


def test_an_old_file(tmp_path, one_process):
    config = config_of(tmp_path, OLD)
    assert (config.seq_length, config.num_layers, config.seed, config.is_lora) == (8192, 4, 41, False)
    assert str(config.pretrained_checkpoint) == "/data/base"
    assert config.recipe() is None
    precision = config.precision_values()
    assert precision.bf16 and precision.params_dtype is precision.pipeline_dtype is torch.bfloat16

    provider = config.provider(seq_length=100)

    # from the file, from the class that it names, from the caller
    assert (provider.num_layers, provider.hybrid_override_pattern, provider.to_upper) == (4, "SDH*", "weighted")
    assert (provider.seq_len_interpolation_factor, provider.vocab_size) == (32, 512)
    assert (provider.hidden_size, provider.num_groups_hyena_short, provider.add_attn_proj_bias) == (4096, 256, True)
    assert provider.seq_length == 100
    # of that machine and that run, not of the model
    assert provider.tensor_model_parallel_size == 1 and not provider.bias_activation_fusion
    assert not provider.fp32_residual_connection and provider.init_method is None


def test_every_known_class_is_its_row_of_the_size_table(tmp_path, one_process):
    assert set(BIONEMO_PROVIDERS.values()) == {k for k in ARCHITECTURES if k not in ("evo2_tiny", "evo2_mini")} - {
        "striped_hyena_tiny_nv"
    }
    for name, model_size in BIONEMO_PROVIDERS.items():
        provider = config_of(tmp_path, f"model: {{_target_: {name}}}").provider()
        assert provider.hybrid_override_pattern == ARCHITECTURES[model_size].pattern
        assert provider.ffn_hidden_size == ARCHITECTURES[model_size].ffn_hidden_size
        assert provider.use_short_conv_bias == ARCHITECTURES[model_size].short_conv_bias


def test_what_bridge_writes_is_read_back(tmp_path, one_process):
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.utils.yaml_utils import dump_dataclass_to_yaml

    from evo2_megatron.model.provider import provider_for

    written = provider_for(
        "striped_hyena_tiny_nv",
        vocab_size=256,
        seq_length=77,
        rotary_base=123,
        hidden_dropout=0.25,
        recompute_num_layers=3,
    )
    written.finalize()
    as_mapping = ConfigContainer._convert_value_to_dict(written)
    config = config_of(tmp_path, dump_dataclass_to_yaml({"model": as_mapping, "mixed_precision": "bf16-mixed"}))
    assert as_mapping["_target_"] == OWN_PROVIDER
    assert config.recipe() == "bf16_mixed"

    read = config.provider()

    from evo2_megatron.checkpoint.run_config import _readable_fields

    assert {"rotary_base", "hidden_dropout", "use_short_conv_bias", "num_layers"} <= _readable_fields(type(written))
    for name in _readable_fields(type(written)):
        assert getattr(read, name) == getattr(written, name), name
    assert read.recompute_num_layers is None


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "os.system", "command": "touch {marker}"},
        {
            "_target_": "bionemo.evo2.models.evo2_provider.Hyena1bModelProvider",
            "seq_length": {"_target_": "os.system"},
        },
        {
            "_target_": OWN_PROVIDER,
            "to_upper": {"_target_": "os.system", "_args_": ["touch {marker}"], "_call_": True},
        },
        {"_target_": OWN_PROVIDER, "window_size": [{"_target_": "os.system", "_args_": ["touch {marker}"]}, 1]},
        {},
    ],
)
def test_a_class_that_is_not_on_the_list_is_refused(tmp_path, one_process, model):
    marker = tmp_path / "marker"
    config = config_of(tmp_path, yaml.safe_dump({"model": model}).replace("{marker}", str(marker)))
    with pytest.raises(UserError, match="which is not one of the classes"):
        config.provider()
    assert not marker.exists()


def test_8_bits_under_their_earlier_name(tmp_path, one_process):
    for name, expected in (("true", "int8"), ("false", "none")):
        (tmp_path / "run_config.yaml").write_text(f"model: {{_target_: {OWN_PROVIDER}, int8_weights: {name}}}")
        run_config = read_run_config(tmp_path)
        assert "int8_weights" not in run_config.model
        assert run_config.provider().quantize_weights == expected


def test_what_is_not_read_is_not_run(tmp_path, one_process, caplog):
    marker = tmp_path / "marker"
    call = {"_target_": "os.system", "_args_": [f"touch {marker}"], "_call_": True}
    model = {"_target_": OWN_PROVIDER, "init_method": call, "unknown_field": call}
    config = config_of(tmp_path, yaml.safe_dump({"model": model, "dataset": call, "peft": None}))
    with caplog.at_level("DEBUG", logger="evo2_megatron"):
        config.provider()
    assert not marker.exists()
    assert "model.unknown_field is not read" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: !!python/object/apply:os.system [echo]", "is not plain YAML"),
        ("model: [", "is not plain YAML"),
        ("- 1", "has no section 'model'"),
        ("model: null", "has no section 'model'"),
        ("{model: {}, rng: 3}", "section 'rng' is not a mapping"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, text)


def test_damaged_values(tmp_path, megatron):
    config = config_of(tmp_path, "{model: {seq_length: many}, mixed_precision: bf17_mixed}")
    with pytest.raises(UserError, match="model.seq_length is 'many' instead of a number"):
        _ = config.seq_length
    with pytest.raises(UserError, match="unknown mixed_precision 'bf17_mixed'; choose one with --mixed-precision"):
        config.recipe()
    config = config_of(tmp_path, "{model: {}, mixed_precision: {_target_: os.system}}")
    with pytest.raises(UserError, match="which is not one of the classes"):
        config.precision_values()
