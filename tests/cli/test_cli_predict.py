# SPDX-License-Identifier: Apache-2.0
"""predict_evo2 from the command line: what the flags mean, and how errors are shown."""

import shlex
from pathlib import Path

import pytest

from evo2_megatron.cli import predict
from evo2_megatron.config import ParallelConfig

NEEDED = ["--fasta", "x.fa", "--ckpt-dir", "ckpt"]
EVERY_FLAG = """
--output-dir out --output-format npz pt --write-interval batch --files-per-subdir 7 --num-nodes 2 --devices 8
--tensor-parallel-size 4 --pipeline-model-parallel-size 3 --context-parallel-size 2
--no-sequence-parallel --mixed-precision-recipe bf16-mixed --vortex-style-fp8 --use-subquadratic-ops
--micro-batch-size 5 --min-length 100 --prepend-bos --embedding-layer -2 0 --num-layers 3
--hybrid-override-pattern SDH --seq-len-interpolation-factor 16 --mask-phylogenetic-tags
--both-strands --max-batch-tokens 5000 --pooling-window 3:9 --max-seq-length 9000 --chunk-length 4096
--base-ckpt-dir base --fp8-emulation --self-test
"""
"""The flags of the former command, and ours."""


@pytest.fixture
def call(monkeypatch):
    """Run the command with the task replaced by a recorder; returns what the task was given."""

    def run(*argv):
        seen = {}
        monkeypatch.setattr("evo2_megatron.cli.command.clean_up_when_terminated", lambda: None)
        monkeypatch.setattr(
            "evo2_megatron.tasks.scoring.predict.predict",
            lambda fasta, ckpt_dir, **settings: seen.update(settings, fasta=fasta, ckpt_dir=ckpt_dir),
        )
        predict.main([*NEEDED, *argv])
        return seen

    return run


def test_defaults(call):
    from evo2_megatron.tasks.scoring.prediction_settings import Files, ModelChanges, Output, Sequences

    assert call() == {
        "fasta": Path("x.fa"),
        "ckpt_dir": Path("ckpt"),
        "output": Output(),
        "files": Files(),
        "sequences": Sequences(),
        "changes": ModelChanges(),
        "parallel": ParallelConfig(),
        "precision": None,
        "base_ckpt_dir": None,
        "with_self_test": False,
    }


def test_every_flag_arrives(call, monkeypatch):
    from evo2_megatron.tasks.scoring.prediction_settings import Files, ModelChanges, Sequences, Window

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    seen = call(*shlex.split(EVERY_FLAG))
    assert seen["files"] == Files(
        output_dir=Path("out"), write_interval="batch", files_per_subdir=7, formats=("npz", "pt")
    )
    assert seen["changes"] == ModelChanges(
        num_layers=3,
        hybrid_override_pattern="SDH",
        seq_len_interpolation_factor=16,
        vortex_style_fp8=True,
        use_subquadratic_ops=True,
        fp8="emulate",
    )
    assert seen["sequences"] == Sequences(
        prepend_bos=True,
        mask_phylogenetic_tags=True,
        max_seq_length=9000,
        both_strands=True,
        micro_batch_size=5,
        max_batch_tokens=5000,
        min_length=100,
        chunk_length=4096,
    )
    assert seen["parallel"] == ParallelConfig(tensor=4, pipeline=3, context=2, sequence_parallel=False)
    assert (seen["output"].embedding_layers, seen["output"].log_probs) == ((-2, 0), None)
    assert seen["output"].pooling == Window(3, 9)
    assert (seen["precision"], seen["base_ckpt_dir"]) == ("bf16_mixed", Path("base"))
    assert seen["with_self_test"] is True
    assert call("--allow-precision-mismatch")["changes"] == ModelChanges(fp8="allow_mismatch")


def test_values_of_bases(call):
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    flags = ["--output-log-prob-seqs", "--log-prob-collapse-option", "per_token"]
    assert call(*flags)["output"] == Output(log_probs="per_token")
    seen = call(*flags, "--per-base-values", "entropy", "log_prob", "entropy")
    assert seen["output"] == Output(log_probs="per_token", base_values=("entropy", "log_prob"))


def test_windows_have_a_format_of_their_own(call):
    from evo2_megatron.tasks.scoring.prediction_settings import Sequences

    seen = call("--output-log-prob-seqs", "--window-length", "90", "--window-overlap", "0", "--prepend-bos")
    assert seen["sequences"] == Sequences(window_length=90, window_overlap=0, prepend_bos=True)
    assert seen["files"].formats == ("tsv",)
    assert call("--output-log-prob-seqs", "--output-format", "bigwig", "bedgraph")["files"].formats == (
        "bigwig",
        "bedgraph",
    )


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--output-log-prob-seqs"], "mean"),
        (["--output-log-prob-seqs", "--log-prob-collapse-option", "per_token"], "per_token"),
    ],
)
def test_log_probs(call, argv, expected):
    assert call(*argv)["output"].log_probs == expected


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--log-prob-collapse-option", "sum"], "add --output-log-prob-seqs"),
        (["--eden-tokenizer"], "--eden-tokenizer: the tokenizer comes from the checkpoint"),
        (["--files-per-subdir", "2"], "--files-per-subdir needs --write-interval batch"),
        (
            ["--output-log-prob-seqs", "--embedding-layer", "1"],
            "Cannot use --output-log-prob-seqs with --embedding-layer",
        ),
        (["--num-nodes", "2"], "--num-nodes is 2, but processes run on 1; leave it out"),
        (["--devices", "8"], "--devices starts a command line again"),
        (["--devices", "all"], "'all' is not a whole number, nor auto"),
        ([], "Checkpoint ckpt does not exist; check --ckpt-dir"),
        (["--output-dir", __file__], "is a file; give a folder"),
        (["--fasta", "/dev/null"], "--fasta /dev/null is no regular file, and is read more than once; write what"),
        (["--fasta", "/usr"], "--fasta /usr is a folder, not a file"),
        (["--pooling-window", "9"], "'9' is not FIRST:LAST, two numbers such as 101:200"),
        (["--pooling-window", "9:3", "--embedding-layer", "1"], "--pooling-window 9:3: give the first and the last"),
        (["--pooling", "mean"], "--pooling says how to pool hidden states; add --embedding-layer"),
        (["--output-format", "csv"], "invalid choice: 'csv'"),
        (["--output-format", "npz", "--write-interval", "batch"], "--write-interval batch is about .pt files"),
        (["--micro-batch-size", "0"], "0 is not 1 or more"),
        (["--micro-batch-size", "two"], "'two' is not a whole number"),
        (["--fp8-emulation", "--allow-precision-mismatch"], "not allowed with argument"),
        (["--write-interval", "sometimes"], "invalid choice: 'sometimes'"),
    ],
)
def test_errors_are_one_line_and_status_2(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("evo2_megatron.cli.command.clean_up_when_terminated", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        predict.main([*NEEDED, *argv])
    assert stopped.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("predict_evo2: error: ") and message in last_line


def test_self_test_alone(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("evo2_megatron.tasks.self_test.run", lambda folder, **more: seen.update(more, folder=folder))
    predict.main(["--ckpt-dir", "ckpt", "--self-test", "--fp8-emulation", "--tensor-parallel-size", "2"])
    assert seen == {
        "folder": Path("ckpt"),
        "parallel": ParallelConfig(tensor=2),
        "precision": None,
        "provider_overrides": {},
        "base_ckpt_dir": None,
        "fp8": "emulate",
    }
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--ckpt-dir", "ckpt"])
    assert stopped.value.code == 2
    assert "the following arguments are required: --fasta" in capsys.readouterr().err
