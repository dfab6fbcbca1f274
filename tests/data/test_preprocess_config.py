# SPDX-License-Identifier: Apache-2.0
"""Schema of the preprocessing YAML."""

from pathlib import Path

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.lineage import Lineage
from evo2_megatron.data.preprocess_config import PreprocessConfig, load_preprocess_configs
from evo2_megatron.data.tokenizer import tokenizer_dir

# the keys of the fine-tuning tutorial, four of which no program has ever read
TUTORIAL = """
- datapaths: ["chr20_21_22.fa"]
  output_dir: "./preprocessed_data"
  output_prefix: chr20_21_22_uint8_distinct
  train_split: 0.9
  valid_split: 0.05
  test_split: 0.05
  overwrite: True
  embed_reverse_complement: true
  random_reverse_complement: 0.0
  random_lineage_dropout: 0.0
  include_sequence_id: false
  transcribe: "back_transcribe"
  force_uppercase: false
  indexed_dataset_dtype: "uint8"
  append_eod: true
  enforce_sample_length: null
  ftfy: false
  hf_tokenizer_model_path: null
  hf_tokenizer_model_name: null
  pretrained_tokenizer_model: null
  special_tokens: null
  fast_hf_tokenizer: true
  workers: 1
  preproc_concurrency: 100000
  chunksize: 25
  drop_empty_sequences: true
  nnn_filter: false
  seed: 12342
"""


def load(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_preprocess_configs(path)


def test_tutorial_config(tmp_path):
    (config,), notes = load(tmp_path, TUTORIAL)

    assert config.embed_reverse_complement is True
    assert config.seed == 12342
    assert [note.rsplit(", ", 1)[-1] for note in notes[:4]] == [
        f"dataset 1: {key} has no effect"
        for key in ("include_sequence_id", "pretrained_tokenizer_model", "special_tokens", "fast_hf_tokenizer")
    ]
    assert "chunksize has no effect" in notes[5]
    assert config.output_prefixes["val"] == Path(
        "preprocessed_data/chr20_21_22_uint8_distinct_nucleotide_fast_tokenizer_256_val"
    )


def test_defaults(tmp_path):
    (config, other), notes = load(tmp_path, f"- datapaths: [a.fa]\n- {{datapaths: [b.fa], train_split: 1, "
                                  f"hf_tokenizer_model_path: '{tokenizer_dir(512)}/'}}")  # fmt: skip

    assert notes == []
    assert config == PreprocessConfig(datapaths=["a.fa"])
    assert config.split_weights == {"train": 0.7, "val": 0.2, "test": 0.1}
    assert config.output_prefixes["train"] == Path("nucleotide_fast_tokenizer_256_train")
    assert config.vocab_size() == 256
    assert other.train_split == 1.0 and isinstance(other.train_split, float)
    assert other.output_prefixes["test"] == Path("nucleotide_fast_tokenizer_512_test")
    assert other.vocab_size() == 512


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "- {datapaths: [~/a.fa, b.fa], output_dir: ~/out, test_contigs: ~/names, train_contigs: [~/c]}"
    (config,), _ = load(tmp_path, text)

    assert config.datapaths == ["/home/me/a.fa", "b.fa"]
    assert (config.output_dir, config.test_contigs) == ("/home/me/out", "/home/me/names")
    assert config.train_contigs == ["~/c"]  # names of records


def test_several_documents(tmp_path):
    configs, _ = load(tmp_path, "---\n- {datapaths: [a]}\n- {datapaths: [b]}\n---\n---\n- datapaths: [c]\n...\n")

    assert [config.datapaths for config in configs] == [["a"], ["b"], ["c"]]


def test_what_has_no_effect_is_said(tmp_path):
    _, notes = load(tmp_path, "- {datapaths: [a], ftfy: true, hf_tokenizer_trust_remote_code: true, chunksize: 1}")

    assert [note.split(", dataset 1: ")[1].split(" has no effect")[0] for note in notes] == [
        "chunksize", "ftfy", "hf_tokenizer_trust_remote_code",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "setting, needed",
    [
        ("split_by: contig", "split_window_length: 9"),
        ("random_lineage_dropout: 0.1", "taxonomy_data: {a: {domain: Bacteria}}"),
        ("complement_upper_case_only: true", "embed_reverse_complement: true"),
        ("complement_upper_case_only: true", "random_reverse_complement: 0.5"),
    ],
)
def test_a_setting_that_needs_another_one(tmp_path, setting, needed):
    _, (note,) = load(tmp_path, f"- {{datapaths: [a], {setting}}}")
    name = setting.partition(":")[0]
    assert (
        f"dataset 1: {name} has no effect: without {needed.partition(':')[0]}" in note or "or random_reverse" in note
    )
    assert load(tmp_path, f"- {{datapaths: [a], {setting}, {needed}}}")[1] == []


def test_taxonomy(tmp_path):
    (config,), _ = load(tmp_path, "- {datapaths: [a], taxonomy_data: {NC_: {domain: Bacteria, clazz: null}, 7: {}}}")

    assert config.taxonomy_data == {"NC_": Lineage(domain="Bacteria"), "7": Lineage()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{datapaths: [a]}", "must be a list of datasets; put '- '"),
        ("- [a]", "must be a list of datasets"),
        ("", "must be a list of datasets"),
        ("- {datapaths: [a", "is not YAML: while parsing"),
        ("- {datapath: [a]}", "dataset 1: unknown key 'datapath'; did you mean 'datapaths'?"),
        ("- {datapaths: [a]}\n- {datapaths: [b], xyzzy: 1}", "dataset 2: unknown key 'xyzzy'; the keys are datapaths"),
        ("- {output_prefix: a}", "datapaths is empty"),
        ("- {datapaths: a}", "datapaths is 'a'; it must be a list of texts"),
        ("- {datapaths: [1]}", "each entry must be text"),
        ("- {datapaths: [a], overwrite: 1}", "overwrite is 1; it must be true or false"),
        ("- {datapaths: [a], seed: 1.5}", "seed is 1.5; it must be a whole number or null"),
        ("- {datapaths: [a], train_split: true}", "train_split is True; it must be a number"),
        ("- {datapaths: [a], train_split: -1}", "none may be negative"),
        ("- {datapaths: [a], train_split: .nan}", "none may be negative"),
        ("- {datapaths: [a], train_split: 0, valid_split: 0, test_split: 0}", "one must be above 0"),
        ("- {datapaths: [a], random_reverse_complement: 1.5}", "probability between 0 and 1"),
        ("- {datapaths: [a], split_window_length: 0}", "split_window_length is 0; it must be from 1 to 2147483647"),
        ("- {datapaths: [a], transcribe: both}", "transcribe is 'both'"),
        ("- {datapaths: [a], indexed_dataset_dtype: float32}", "use one of uint8"),
        ("- {datapaths: [a], workers: 0}", "workers is 0; it must be from 1 to 2147483647"),
        ("- {datapaths: [a], split_by: chromosome}", "split_by is 'chromosome'; use window or contig"),
        ("- {datapaths: [a], test_contigs: 3}", "it must be a list of texts, the name of a file, or null"),
        ("- {datapaths: [a]}\n---\n{datapaths: [a]}", "must be a list of datasets"),
        ("- {datapaths: [a], seed: 1, seed: 2}", "line 1: seed is there twice"),
        ("- {datapaths: [a], seed: 2020-13-45}", "is not YAML: month must be"),
        ("- {datapaths: [a], taxonomy_data: {x: {kingdom: y}}}", "'x': unknown key 'kingdom'; "),
        ("- {datapaths: [a], taxonomy_data: {x: y}}", "'y' is not a mapping of ranks"),
        ("- {datapaths: [a], taxonomy_data: {x: {}}, prompt_spacer_length: 57}", "prompt_spacer_length is 57"),
    ],
)
def test_errors(tmp_path, text, message):
    with pytest.raises(UserError) as raised:
        load(tmp_path, text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_preprocess_configs(tmp_path / "none.yaml")
