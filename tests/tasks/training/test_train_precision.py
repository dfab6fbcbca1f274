# SPDX-License-Identifier: Apache-2.0
"""Training from a checkpoint that asks for 8-bit input projections: it goes on without, and says so once."""

import pytest
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint


@pytest.mark.parametrize("asks, resumes, told", [(True, False, True), (True, True, False), (False, False, False)])
def test_training_does_without_and_says_so(megatron, tmp_path, caplog, asks, resumes, told):
    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.tasks.training import train

    checkpoint = write_tiny_checkpoint(tmp_path)
    path = checkpoint / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["vortex_style_fp8"] = asks
    path.write_text(yaml.safe_dump(config))
    options = TrainingOptions(mock_data=True, model_size="evo2_tiny")
    options = train._with_defaults_of(train.Start(checkpoint, checkpoint, 0, resumes), options, {})
    assert options.precision == "fp32"
    assert ("was trained with FP8 input projections; training goes on without them" in caplog.text) == told
