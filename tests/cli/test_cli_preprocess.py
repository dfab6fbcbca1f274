# SPDX-License-Identifier: Apache-2.0
"""preprocess_evo2 from the command line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from evo2_megatron.cli.preprocess import main


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.fa").write_text(">one\nACGT\n>two\nAC\n>three\nGGG\n")
    path = tmp_path / "config.yaml"
    path.write_text("".join(
        f"- {{datapaths: ['{tmp_path}/a.fa'], output_dir: '{tmp_path}/out', output_prefix: {name}, chunksize: 25}}\n"
        for name in "xy"
    ))  # fmt: skip
    return path


def test_one_line_per_dataset(config, capsys):
    main(["-c", str(config)])
    out, err = capsys.readouterr()

    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("x: 3 records, 9 bases: 0 soft-masked, 0 N, 0 IUPAC, 0 other -> documents: 1 train, ")
    assert " 1 test; 12 tokens in " in lines[0]
    assert err.count("chunksize has no effect") == 2
    assert len(list((config.parent / "out").iterdir())) == 12


def test_an_error_is_one_line(config, capsys):
    main(["--config", str(config)])
    os.utime(config)  # changed, as far as anyone can tell
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["--config", str(config)])

    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("preprocess_evo2: error: ") and err.count("\n") == 1
    assert "exists; set overwrite to true" in err


def test_a_dry_run_counts_and_writes_nothing(config, capsys):
    (config.parent / "a.fa").write_bytes(b">one\r\nACGTNnRy-\r\n>two\r\nac\r\n>three\r\nGGG\r\n")
    before = sorted(config.parent.rglob("*"))
    main(["-c", str(config), "--dry-run"])
    out, err = capsys.readouterr()

    assert sorted(config.parent.rglob("*")) == before
    first = [line.split() for line in out.split("y: dry run")[0].splitlines()]
    assert first[0] == ["x:", "dry", "run,", "nothing", "written"]
    assert first[1:] == [
        ["records", "3"], ["skipped", "0"], ["bases", "14"], ["soft-masked", "4"], ["N", "2"], ["IUPAC", "2"],
        ["other", "1"], ["Windows", "line", "ends", "6"], ["split", "documents", "tokens"], ["train", "1", "10"],
        ["val", "1", "3"], ["test", "1", "4"],
    ]  # fmt: skip
    assert "1 characters are no IUPAC codes" in err and "'-' in record 'one'" in err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_changes_nothing(config, capsys):
    main(["-c", str(config)])
    before = {path: path.stat().st_mtime_ns for path in (config.parent / "out").iterdir()}
    capsys.readouterr()
    main(["-c", str(config)])
    out, err = capsys.readouterr()

    assert out == "" and err.count("is done: its files are newer than its inputs") == 2
    assert {path: path.stat().st_mtime_ns for path in (config.parent / "out").iterdir()} == before


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_is_completed_by_the_next(tmp_path, config, ending):
    main(["-c", str(config)])
    whole = contents(tmp_path / "out")
    for name in list(whole):
        if name.startswith("y_"):
            (tmp_path / "out" / name).unlink()
    # a pipe that gives one record and then nothing: the run waits in the middle of the second dataset
    fasta = tmp_path / "a.fa"
    text = fasta.read_bytes()
    fasta.unlink()
    os.mkfifo(fasta)
    os.utime(fasta, (0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", f"from evo2_megatron.cli.preprocess import main; main(['-c', {str(config)!r}])"],
        stderr=subprocess.PIPE,
        # not what this process inherited: shells let what they start in the background ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with fasta.open("wb") as pipe:
        pipe.write(text[:12])
        pipe.flush()
        time.sleep(0.3)  # a signal between two reads is seen, one just before the call that waits is not
        process.send_signal(ending)
        _, err = process.communicate(timeout=120)
    assert process.returncode == (-ending if ending == signal.SIGKILL else 130)
    assert b"Traceback" not in err
    left = {path.name for path in (tmp_path / "out").iterdir()} - {n for n in whole if n.startswith("x_")}
    assert all(name.endswith(".tmp") for name in left) and (not left or ending == signal.SIGKILL)

    fasta.unlink()
    fasta.write_bytes(text)
    os.utime(fasta, (0, 0))
    main(["-c", str(config)])
    assert contents(tmp_path / "out") == whole


def test_a_run_killed_while_it_renamed_is_completed(config):
    main(["-c", str(config)])
    out = config.parent / "out"
    whole = contents(out)
    for path in sorted(out.glob("x_*"))[3:]:
        path.rename(f"{path}.tmp")
    main(["-c", str(config)])

    assert contents(out) == whole


def test_neither_torch_nor_numpy_is_loaded(config):
    code = f"""
import sys
from evo2_megatron.cli.preprocess import main
main(["-c", {str(config)!r}])
sys.exit(" ".join({{"torch", "numpy", "megatron", "pydantic"}} & sys.modules.keys()) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_terminal_shows_bases_per_second(config):
    ours, theirs = os.openpty()
    code = f"from evo2_megatron.cli.preprocess import main; main(['-c', {str(config)!r}])"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.DEVNULL, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)

    assert "x 100% |" in shown and "Mbases/s" in shown
