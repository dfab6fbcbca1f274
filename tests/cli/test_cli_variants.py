# SPDX-License-Identifier: Apache-2.0
"""variants_evo2 from the command line: what the flags mean, and how errors are shown."""

import shlex
from pathlib import Path

import pytest

from evo2_megatron.cli import variants
from evo2_megatron.config import ParallelConfig

NEEDED = ["--vcf", "x.vcf", "--fasta", "x.fa", "--ckpt-dir", "ckpt", "--output-dir", "out"]
EVERY_FLAG = """
--output-format vcf.gz tsv vcf.gz --log-prob-collapse-option sum --window-length 4096 --window-step 64 --both-strands
--prepend-bos --max-seq-length 9000 --no-shared-context --max-batch-tokens 5000 --chunk-length 1024
--tensor-parallel-size 4 --pipeline-model-parallel-size 3 --context-parallel-size 2 --no-sequence-parallel
--mixed-precision-recipe bf16-mixed --vortex-style-fp8 --use-subquadratic-ops --fp8-emulation --base-ckpt-dir base
--self-test
"""


@pytest.fixture
def call(monkeypatch):
    """Run the command with the task replaced by a recorder; returns what the task was given."""

    def run(*argv):
        seen = {}
        monkeypatch.setattr("evo2_megatron.cli.command.clean_up_when_terminated", lambda: None)
        monkeypatch.setattr(
            "evo2_megatron.tasks.scoring.variants.score_variants",
            lambda *files, **settings: seen.update(settings, files=files),
        )
        variants.main([*NEEDED, *argv])
        return seen

    return run


def test_defaults(call):
    from evo2_megatron.tasks.scoring.prediction_settings import ModelChanges
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import VariantSettings

    assert call() == {
        "files": (VcfFile(Path("x.vcf")), Path("x.fa"), Path("ckpt")),
        "output_dir": Path("out"),
        "formats": ("tsv",),
        "settings": VariantSettings(),
        "changes": ModelChanges(),
        "parallel": ParallelConfig(),
        "precision": None,
        "base_ckpt_dir": None,
        "with_self_test": False,
    }


def test_every_flag_arrives(call):
    from evo2_megatron.tasks.scoring.prediction_settings import ModelChanges
    from evo2_megatron.tasks.scoring.variants import VariantSettings

    seen = call(*shlex.split(EVERY_FLAG))
    assert seen["formats"] == ("vcf.gz", "tsv")
    assert seen["settings"] == VariantSettings(
        window_length=4096,
        window_step=64,
        score="sum",
        both_strands=True,
        prepend_bos=True,
        shared_context=False,
        max_seq_length=9000,
        max_batch_tokens=5000,
        chunk_length=1024,
    )
    assert seen["changes"] == ModelChanges(vortex_style_fp8=True, use_subquadratic_ops=True, fp8="emulate")
    assert seen["parallel"] == ParallelConfig(tensor=4, pipeline=3, context=2, sequence_parallel=False)
    assert (seen["precision"], seen["base_ckpt_dir"], seen["with_self_test"]) == ("bf16_mixed", Path("base"), True)


def test_all_substitutions(call, monkeypatch):
    from evo2_megatron.tasks.scoring.variant_sources import Saturation

    monkeypatch.setattr(f"{__name__}.NEEDED", ["--saturate", "x.bed", *NEEDED[2:]])
    seen = call("--output-format", "bigwig", "bedgraph")
    assert seen["files"] == (Saturation(Path("x.bed")), Path("x.fa"), Path("ckpt"))
    assert seen["formats"] == ("bigwig", "bedgraph")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no such VCF file: x.vcf"),
        (["--vcf", "/dev/null"], "no such VCF file: /dev/null; it is read twice, so not from a pipe"),
        (["--vcf", __file__, "--fasta", "/dev/null"], "--fasta /dev/null is no regular file, and is read more than"),
        (["--vcf", __file__], "Checkpoint ckpt does not exist; check --ckpt-dir"),
        (["--output-dir", __file__], "is a file; give a folder"),
        (["--context-parallel-size", "2"], "start a multiple of 2, with --devices or torchrun"),
        (["--vcf", __file__, "--output-format", "bigwig"], "--output-format bigwig has a value for each base of the"),
        (["--saturate", "x.bed"], "argument --saturate: not allowed with argument --vcf"),
        (["--output-format", "bcf"], "invalid choice: 'bcf'"),
        (["--log-prob-collapse-option", "per_token"], "invalid choice: 'per_token'"),
        (["--window-length", "0"], "0 is not 1 or more"),
    ],
)
def test_errors_are_one_line_and_status_2(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("evo2_megatron.cli.command.clean_up_when_terminated", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        variants.main([*NEEDED, *argv])
    assert stopped.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("variants_evo2: error: ") and message in last_line


def test_sequences_that_are_split_have_no_shared_context(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("evo2_megatron.cli.command.clean_up_when_terminated", lambda: None)
    with pytest.raises(SystemExit):
        variants.main([*NEEDED, "--context-parallel-size", "2"])
    assert "add --no-shared-context" in capsys.readouterr().err
