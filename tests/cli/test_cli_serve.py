# SPDX-License-Identifier: Apache-2.0
"""evo2_serve from the command line: what the flags mean, and how errors are shown."""

import signal
import socket
from pathlib import Path

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.cli import serve


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_every_flag_arrives(monkeypatch):
    from evo2_megatron.tasks.server.engine import ModelSettings

    seen = []
    monkeypatch.setattr("evo2_megatron.tasks.server.serve.serve", lambda *args, **rest: seen.append((*args, rest)))
    serve.main(["--ckpt-dir", "c"])
    flags = """
    --ckpt-dir c --host ::1 --port 0 --max-seq-length 9 --max-batch-size 3 --max-queue 5 --base-ckpt-dir b --self-test
    --mixed-precision-recipe bf16-mixed --vortex-style-fp8 --fp8-emulation --use-subquadratic-ops --fasta g.fa
    --tensor-parallel-size 4
    """
    serve.main(flags.split())

    assert seen[0] == (ModelSettings(ckpt_dir=Path("c")), {"fasta": None, "host": "127.0.0.1", "port": 8000})
    settings = ModelSettings(
        ckpt_dir=Path("c"),
        base_ckpt_dir=Path("b"),
        precision="bf16_mixed",
        fp8="emulate",
        provider_overrides={"vortex_style_fp8": True, "use_subquadratic_ops": True},
        with_self_test=True,
        tensor_parallel_size=4,
        max_seq_length=9,
        max_batch_size=3,
        max_queue=5,
    )
    assert seen[1] == (settings, {"fasta": Path("g.fa"), "host": "::1", "port": 0})


def refused(capsys, *flags):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        serve.main(list(map(str, flags)))
    assert end.value.code == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("evo2_serve: error")]


def test_a_port_in_use(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lines = refused(capsys, "--ckpt-dir", checkpoint, "--port", port)
    message = f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port"
    assert lines == [f"evo2_serve: error: {message}"]


def test_no_such_host(checkpoint, capsys):
    (line,) = refused(capsys, "--ckpt-dir", checkpoint, "--host", "no.such.invalid")
    assert "--host no.such.invalid: " in line


def test_no_such_checkpoint(tmp_path, capsys):
    (line,) = refused(capsys, "--ckpt-dir", tmp_path / "none", "--port", "0")
    assert str(tmp_path / "none") in line


def test_what_cannot_be_loaded(checkpoint, capsys):
    """Found by the engine's thread, when the port is open already."""
    (line,) = refused(capsys, "--ckpt-dir", checkpoint, "--port", "0", "--vortex-style-fp8")
    assert "FP8" in line


def test_no_such_genome(checkpoint, tmp_path, capsys):
    """Said before the model is loaded."""
    (line,) = refused(capsys, "--ckpt-dir", checkpoint, "--port", "0", "--fasta", tmp_path / "none.fa")
    assert "none.fa" in line


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_are_whole_copies_of_the_model(checkpoint, capsys, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    (line,) = refused(capsys, "--ckpt-dir", checkpoint, "--port", "0", "--tensor-parallel-size", "2")
    assert f"{processes} processes do not fit tensor 2" in line and "start a multiple of 2, with --devices" in line
