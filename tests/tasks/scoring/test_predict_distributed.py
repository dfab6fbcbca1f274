# SPDX-License-Identifier: Apache-2.0
"""Processes that are copies of the model, or parts of it, give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig
from model.layout_worker import LAYOUTS
from processes import launch
from tasks.scoring.predict_worker import predictions

WORKER = Path(__file__).with_name("predict_worker.py")
# in batches of three, the first copy gets one more than the second
LENGTHS = (40, 7, 33, 1, 61, 2, 19)


@pytest.fixture(scope="module")
def inputs(megatron, tmp_path_factory):
    """A checkpoint and a FASTA file."""
    folder = tmp_path_factory.mktemp("inputs")
    letters = "ACGGT" * 20
    fasta = folder / "records.fa"
    fasta.write_text("".join(f">r{i}\n{letters[i : i + n]}\n" for i, n in enumerate(LENGTHS)))
    return write_tiny_checkpoint(folder / "checkpoint"), fasta


def torchrun(*command, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([*launcher, *map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_copies(inputs, tmp_path):
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output, Sequences

    checkpoint, fasta = inputs
    predict(
        fasta,
        checkpoint,
        output=Output(log_probs="sum"),
        files=Files(output_dir=tmp_path / "one"),
        sequences=Sequences(micro_batch_size=3),
    )
    code = "from evo2_megatron.cli.predict import main; main()"
    flags = ["--output-log-prob-seqs", "--log-prob-collapse-option", "sum", "--micro-batch-size", "3"]
    arguments = [
        "--fasta",
        fasta,
        "--ckpt-dir",
        checkpoint,
        "--output-dir",
        tmp_path / "two",
        "--devices",
        "2",
        *flags,
    ]
    torchrun("--no-python", sys.executable, "-c", code, *arguments)

    names = [f"predictions__rank_{i}__dp_rank_{i}.pt" for i in range(2)]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "manifest.json", *names, "scores.tsv", "seq_idx_map.json"
    ]  # fmt: skip
    parts = [torch.load(tmp_path / "two" / name, weights_only=True) for name in names]
    assert [part["seq_idx"].tolist() for part in parts] == [[0, 2, 3, 4], [1, 5, 6]]  # in turns, longest first
    whole = torch.load(tmp_path / "one" / names[0], weights_only=True)["log_probs_seqs"]
    for part in parts:
        torch.testing.assert_close(part["log_probs_seqs"], whole[part["seq_idx"]], rtol=1e-5, atol=1e-4)
    tables = [(tmp_path / folder / "scores.tsv").read_text().splitlines() for folder in ("one", "two")]
    assert [line.split("\t")[:2] for line in tables[0]] == [line.split("\t")[:2] for line in tables[1]]
    assert json.loads((tmp_path / "two" / "seq_idx_map.json").read_text()) == {f"r{i}": i for i in range(len(LENGTHS))}


@pytest.fixture(scope="module")
def of_layouts(inputs, tmp_path_factory):
    """What four processes give under every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    launch(WORKER, *inputs, folder)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_one_process_gives(inputs, of_layouts, layout):
    one, split = predictions(*inputs, ParallelConfig()), of_layouts[layout]
    for name, values in one.items():
        assert values.keys() == split[name].keys()
        for key, value in values.items():
            # with weights in 8 bits products give bfloat16, and a sum in another order falls to the other side
            close = {"rtol": 1e-4, "atol": 1e-3} if name != "int8" else {"rtol": 1e-2, "atol": 5e-2}
            torch.testing.assert_close(split[name][key], value, **close, msg=f"{name} {key}")


@pytest.mark.slow
def test_more_copies_than_sequences(inputs, tmp_path):
    """A copy without work, split over two processes, neither waits nor writes."""
    checkpoint, _ = inputs
    (tmp_path / "one.fa").write_text(">only\nACGTACGT\n")
    code = "from evo2_megatron.cli.predict import main; main()"
    flags = ["--fasta", tmp_path / "one.fa", "--ckpt-dir", checkpoint, "--output-dir", tmp_path / "out"]
    layout = ["--pipeline-model-parallel-size", "2"]
    torchrun("--no-python", sys.executable, "-c", code, *flags, *layout, "--output-log-prob-seqs", processes=4)
    # the last stage of the first copy
    assert [p.name for p in (tmp_path / "out").glob("*.pt")] == ["predictions__rank_2__dp_rank_0.pt"]
