# SPDX-License-Identifier: Apache-2.0
"""Pieces as they are made, from ``stream`` and from ``infer``."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.infer import infer, stream
from evo2_megatron.tasks.generation.prompts import Prompt

PROMPTS = [Prompt("long", "ACGTTGCA" * 2), Prompt("one", "g", seed=3)]
SETTINGS = GenerationSettings(
    max_new_tokens=12, return_log_probs=True, max_batch_size=2, alphabet="ACGT", stop_at_eod=False
)


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def joined(pieces):
    """Text and log-probabilities of each sequence."""
    texts, log_probs = {}, {}
    for piece in pieces:
        key = (piece.id, piece.sample)
        texts[key] = texts.get(key, "") + piece.text
        log_probs[key] = log_probs.get(key, []) + piece.log_probs
    return texts, log_probs


@pytest.mark.parametrize("num_samples", [1, 2])
def test_pieces_are_the_records(checkpoint, num_samples):
    pieces = list(stream(PROMPTS, checkpoint, SETTINGS, num_samples=num_samples))
    records = infer(PROMPTS, checkpoint, SETTINGS, num_samples=num_samples)
    key = [(r["id"], r.get("sample")) for r in records]
    texts, log_probs = joined(pieces)
    assert texts == dict(zip(key, (r["completion"] for r in records)))
    assert log_probs == dict(zip(key, (r["logprobs"]["completion_logprobs"] for r in records)))
    assert len(pieces) == 12 * 2 * num_samples, "one base at a time"
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["length"] * 2 * num_samples


def test_the_sequences_of_a_batch_take_turns(checkpoint):
    prompts = [Prompt("a", "AC"), Prompt("b", "GG")]
    ids = [(piece.id, piece.number) for piece in stream(prompts, checkpoint, SETTINGS)]
    assert ids == [("a", 0), ("b", 1)] * 12


def test_no_piece_has_what_a_stop_string_cuts_off(checkpoint):
    (free,) = infer(PROMPTS[:1], checkpoint, SETTINGS)
    stop = free["completion"][4:8]
    settings = GenerationSettings(max_new_tokens=12, alphabet="ACGT", stop_at_eod=False, stop_strings=(stop,))
    pieces = list(stream(PROMPTS[:1], checkpoint, settings))
    assert "".join(p.text for p in pieces) == free["completion"].partition(stop)[0]
    assert pieces[-1].finish_reason == "stop" and pieces[0].log_probs is None


def alive():
    """How many models and how many caches there are."""
    gc.collect()
    names = [type(o).__name__ for o in gc.get_objects()]
    return names.count("StripedHyenaModel"), names.count("InferenceState")


def test_closing_early_frees_model_caches_and_process_groups(checkpoint):
    models, caches = alive()
    pieces = stream(PROMPTS, checkpoint, SETTINGS)
    first = next(pieces)
    assert torch.distributed.is_initialized() and not torch.is_inference_mode_enabled()
    assert alive() == (models + 1, caches + 2), "the room, and who is in it"
    pieces.close()
    assert not torch.distributed.is_initialized() and alive() == (models, caches)
    # and the next one starts as if nothing had been
    assert next(iter(stream(PROMPTS, checkpoint, SETTINGS))) == first


def test_infer_shows_pieces_and_still_gives_records(checkpoint, tmp_path):
    pieces, records = [], []
    got = infer(
        PROMPTS,
        checkpoint,
        SETTINGS,
        on_piece=pieces.append,
        on_record=records.append,
        output_file=tmp_path / "out.fa",
    )
    assert joined(pieces)[0] == {(r["id"], None): r["completion"] for r in got}
    assert len(records) == 2 and (tmp_path / "out.fa").exists()


def test_an_interrupted_stream_leaves_no_file(checkpoint, tmp_path):
    def interrupt(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(PROMPTS, checkpoint, SETTINGS, on_piece=interrupt, output_file=tmp_path / "out.fa")
    assert not list(tmp_path.iterdir()) and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": [Prompt("b", "")]}, "Prompt 'b' is empty"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_seq_length": 9}, "exceeds the 9 of --max-seq-length"),
        ({"parallel": ParallelConfig(context=2)}, "--context-parallel-size 1"),
        ({"ckpt_dir": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_requests_are_refused_before_the_first_piece(checkpoint, monkeypatch, changes, message):
    monkeypatch.delattr(self_test, "load_model")
    with pytest.raises(UserError, match=message):
        stream(**({"prompts": PROMPTS, "ckpt_dir": checkpoint, "settings": SETTINGS} | changes))


def test_one_copy_of_the_model_only(checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (stream, lambda *given: infer(*given, on_piece=print)):
        with pytest.raises(UserError, match="2 processes hold 2 copies of the model.*start 1 of them"):
            call(PROMPTS, checkpoint, SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tensor-parallel-size", "--pipeline-parallel-size"])
def test_two_processes_stream_what_one_does(checkpoint, layout):
    program = "from evo2_megatron.cli.infer import main; main()"
    flags = ["--ckpt-dir", str(checkpoint), "--prompt", "ACGT", "--max-new-tokens", "12", "--stream"]

    def run(*launch):
        return subprocess.run(
            [sys.executable, *launch, "-c", program, *flags, *([layout, "2"] if launch else [])],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).stdout

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)
    one, two = run(), run(*torchrun)
    assert one == two and one.startswith("=== [0] Generated Text ===\n")
