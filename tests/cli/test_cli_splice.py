# SPDX-License-Identifier: Apache-2.0
"""splice_evo2 and bionemo_fasta_to_jsonl from the command line."""

import signal
import subprocess
import sys

import pytest

from evo2_megatron.cli import fasta_to_jsonl, splice

IDS = 'gene_id "G"; transcript_id "T"; exon_number "1";'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.fa").write_text(">one\nACGTacgt\n")
    (tmp_path / "a.gtf").write_text(f"one\tx\texon\t2\t5\t.\t+\t.\t{IDS}\n" + "one\tbroken line\n" * 8)
    return ["--fasta-path", str(tmp_path / "a.fa"), "--gtf-path", str(tmp_path / "a.gtf")]


def test_to_standard_output_and_to_a_file(files, tmp_path, capfdbinary):
    splice.main(files)
    out, err = capfdbinary.readouterr()
    assert out == b">one|G|T\nCGTa\n"
    assert err.count(b"a.gtf line ") == 5
    assert b"only counted; --verbose names all" in err
    assert b"splice_evo2: 1 transcripts, 4 bases in " in err and b"left out: 8 broken line" in err

    splice.main([*files, "--output-path", str(tmp_path / "out.fa"), "--verbose"])
    assert capfdbinary.readouterr().err.count(b"a.gtf line ") == 8
    assert (tmp_path / "out.fa").read_bytes() == out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--transcript-type", "stitched"], b"ACGTacgt"),
        (["--transcript-type", "stitched", "--stitched-promoter", "0", "--stitched-intron", "1"], b"CGTac"),
        (["--transcript-type", "stitched", "--bionemo-compatible", "--stitched-promoter", "1"], b"CGTacgt"),
        (["--only-longest-transcript", "--stitched-overlap"], b"CGTa"),
    ],
)
def test_flags(files, capfdbinary, flags, expected):
    splice.main([*files, *flags])
    out, err = capfdbinary.readouterr()

    assert out.splitlines()[1] == expected
    assert (b"no effect without --transcript-type stitched" in err) == ("--stitched-overlap" in flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "are required: --fasta-path, --gtf-path"),
        (["--transcript-type", "other"], "invalid choice: 'other'"),
        (["--stitched-intron", "-1"], "-1 is not 0 or more"),
        (["--fasta-path", "none.fa", "--gtf-path", "none.gtf"], "no such FASTA file: none.fa"),
    ],
)
def test_an_error_ends_with_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        splice.main(arguments)

    assert raised.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_reader_that_leaves_early_is_no_error(files, tmp_path):
    (tmp_path / "a.fa").write_text(">one\n" + "ACGT" * 500_000 + "\n")
    (tmp_path / "a.gtf").write_text(f"one\tx\texon\t1\t2000000\t.\t+\t.\t{IDS}\n")
    command = [sys.executable, "-c", "from evo2_megatron.cli.splice import main; main()", *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_interruption_leaves_nothing(files, tmp_path):
    code = """
import os, signal
from evo2_megatron.tasks.preparation import splice
from evo2_megatron.cli.splice import main
write = splice._write
def interrupted(out, *rest):
    write(out, *rest)
    os.kill(os.getpid(), signal.SIGTERM)
splice._write = interrupted
main()
"""
    command = [sys.executable, "-c", code, *files, "--output-path", str(tmp_path / "out.fa")]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.endswith("splice_evo2: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fa", "a.gtf"]


def test_fasta_to_jsonl(tmp_path, capsys):
    (tmp_path / "a.fa").write_text(">a b\nAc\nGT\n")
    fasta_to_jsonl.main([str(tmp_path / "a.fa"), str(tmp_path / "a.jsonl"), "--upper"])

    assert capsys.readouterr().out == f"Wrote 1 record(s) to {tmp_path}/a.jsonl\n"
    assert (tmp_path / "a.jsonl").read_text() == '{"id": "a", "prompt": "ACGT"}\n'


def test_fasta_to_jsonl_without_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        fasta_to_jsonl.main([str(tmp_path / "none.fa"), str(tmp_path / "a.jsonl")])

    assert raised.value.code == 1
    assert capsys.readouterr().err == f"Error: input file not found: {tmp_path}/none.fa\n"


@pytest.mark.parametrize("module", ["splice", "fasta_to_jsonl"])
def test_neither_torch_nor_numpy_is_loaded(files, tmp_path, module):
    arguments = files if module == "splice" else [files[1], str(tmp_path / "a.jsonl")]
    code = f"""
import sys
from evo2_megatron.cli.{module} import main
main({arguments!r})
sys.exit(" ".join({{"torch", "numpy", "megatron", "tqdm"}} & sys.modules.keys()) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
