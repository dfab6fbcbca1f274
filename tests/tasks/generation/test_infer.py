# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from checkpoint.tiny_adapters import write_tiny_adapters
from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.generation import cache_memory
from evo2_megatron.tasks.generation.decoding import Decoding
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.infer import infer
from evo2_megatron.tasks.generation.prompts import Prompt
from evo2_megatron.tasks.generation.sampling import Sampling

PROMPTS = [Prompt("long", "ACGTTGCA" * 5), Prompt("one", "g"), Prompt("tag", "|d__B;p__C|"), Prompt("one", "g")]
SETTINGS = GenerationSettings(max_new_tokens=8, return_log_probs=True, max_batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def uncached_log_probs(checkpoint, record):
    """Log-probabilities of a record's completion by one pass over prompt and completion."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.data.tokenizer import encode
    from evo2_megatron.runtime.distributed import process_groups

    ids = torch.tensor([encode(record["prompt"].upper() + record["completion"], 512)])
    with process_groups(ParallelConfig()), torch.inference_mode():
        logits_TV = load_model(checkpoint, parallel=ParallelConfig()).model(ids)[0]
    log_prob_T = logits_TV.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    return log_prob_T[len(record["prompt"]) - 1 :]


def test_records(checkpoint, tmp_path):
    finished = []
    records = infer(PROMPTS, checkpoint, SETTINGS, output_file=tmp_path / "out.jsonl", on_record=finished.append)

    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records
    assert [Prompt(r["id"], r["prompt"]) for r in records] == PROMPTS
    # the shortest come first
    assert [r["id"] for r in finished] == ["one", "one", "tag", "long"]
    assert sorted(finished, key=str) == sorted(records, key=str)
    for record in records:
        assert list(record) == ["id", "prompt", "completion", "finish_reason", "usage", "seed", "logprobs"]
        assert record["finish_reason"] == "length" and len(record["completion"]) == 8
        num_prompt = len(record["prompt"])
        assert record["usage"] == {
            "prompt_tokens": num_prompt,
            "completion_tokens": 8,
            "total_tokens": num_prompt + 8,
        }
        got = torch.tensor(record["logprobs"]["completion_logprobs"])
        torch.testing.assert_close(got, uncached_log_probs(checkpoint, record), rtol=1e-4, atol=1e-4)
    assert records[1]["completion"] != records[3]["completion"], "equal prompts are sampled independently"


def test_batch_size_does_not_change_the_records(checkpoint):
    def completions(max_batch_size):
        settings = GenerationSettings(max_new_tokens=8, max_batch_size=max_batch_size)
        return [r["completion"] for r in infer(PROMPTS, checkpoint, settings)]

    assert completions(1) == completions(3)


def test_a_record_can_be_made_again_alone(checkpoint):
    """By its own seed, whatever number its prompt had, in whatever company."""
    prompts = [*PROMPTS, Prompt("own", "TT", seed=77)]
    settings = GenerationSettings(max_new_tokens=8, max_batch_size=3)
    records = infer(prompts, checkpoint, settings, num_samples=2)
    assert [(r["id"], r["sample"]) for r in records] == [(p.id, sample) for p in prompts for sample in (0, 1)]
    assert len({r["seed"] for r in records}) == 10 and records[0]["seed"] == 1234 and records[8]["seed"] == 77
    for record in records[::-3]:
        by_flag = GenerationSettings(max_new_tokens=8, sampling=Sampling(seed=record["seed"]))
        (alone,) = infer([Prompt("0", record["prompt"])], checkpoint, by_flag)
        (by_field,) = infer([Prompt("0", record["prompt"], seed=record["seed"])], checkpoint, settings)
        assert alone == by_field
        assert (alone["completion"], alone["seed"]) == (record["completion"], record["seed"])


def test_continuing_a_record_equals_one_call(checkpoint):
    prompts = [Prompt("a", "ACGT"), Prompt("b", "GG")]

    def completions(prompts, num_new):
        return infer(prompts, checkpoint, GenerationSettings(max_new_tokens=num_new, max_batch_size=2))

    whole, begin = completions(prompts, 20), completions(prompts, 9)
    more = [Prompt(r["id"], r["prompt"] + r["completion"], r["seed"]) for r in begin]
    rest = completions(more, 11)
    assert [a["completion"] + b["completion"] for a, b in zip(begin, rest)] == [r["completion"] for r in whole]


def test_the_length_limit_is_the_models_whatever_its_folder_is_called(megatron, checkpoint, tmp_path):
    folder = tmp_path / "evo2_40b_7b_1m" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    with pytest.raises(UserError, match="exceeds the 256 that the checkpoint was trained for"):
        infer([Prompt("x", "A" * 250)], folder, SETTINGS)
    other = write_tiny_checkpoint(tmp_path / "evo2_7b", seq_length=40)
    with pytest.raises(UserError, match="exceeds the 40 that the checkpoint was trained for"):
        infer([Prompt("x", "A" * 33)], other, SETTINGS)
    assert infer([Prompt("x", "A" * 32)], other, SETTINGS)


def test_fasta_with_log_probs(checkpoint, tmp_path):
    settings = GenerationSettings(max_new_tokens=70, return_log_probs=True, alphabet="ACGT", stop_at_eod=False)
    (want,) = infer(PROMPTS[:1], checkpoint, settings, output_file=tmp_path / "out.fa", include_prompt=True)
    header, *lines = (tmp_path / "out.fa").read_text().splitlines()
    assert "".join(lines) == want["prompt"] + want["completion"] and list(map(len, lines)) == [60, 50]
    values = dict(pair.split("=") for pair in header.split()[1:])
    total = sum(want["logprobs"]["completion_logprobs"])
    assert float(values["log_prob_sum"]) == pytest.approx(total, rel=1e-5)
    assert float(values["log_prob_mean"]) == pytest.approx(total / 70, rel=1e-5)


def test_no_log_probs_unless_asked_for(checkpoint):
    (record,) = infer(PROMPTS[:1], checkpoint, GenerationSettings(max_new_tokens=1))
    assert "logprobs" not in record


def test_a_stop_token_ends_the_completion(checkpoint):
    (free,) = infer(PROMPTS[:1], checkpoint, SETTINGS)
    stop = ord(free["completion"][5])
    (stopped,) = infer(PROMPTS[:1], checkpoint, GenerationSettings(max_new_tokens=8, stop_ids=(stop,)))
    end = free["completion"].index(chr(stop))
    assert (stopped["completion"], stopped["finish_reason"]) == (free["completion"][:end], "stop")
    assert stopped["usage"]["completion_tokens"] == end


def test_precision_of_the_caller_comes_before_the_checkpoints(checkpoint, caplog):
    with caplog.at_level("INFO"):
        (half,) = infer(PROMPTS[:1], checkpoint, SETTINGS, precision="bf16_mixed")
        (full,) = infer(PROMPTS[:1], checkpoint, SETTINGS)
    assert "precision bf16_mixed" in caplog.text and "precision fp32" in caplog.text
    assert half["logprobs"] != full["logprobs"]


def test_log_lines_carry_measured_figures(checkpoint, caplog):
    with caplog.at_level("INFO"):
        infer(PROMPTS, checkpoint, SETTINGS)
    for line in (
        # "g" twice, read once, and the tag; then the long one by itself
        "[PERF] Batch 1 of 2: 3 sequences, prefill 12 tokens",
        "[PERF] Batch 2 of 2: 1 sequences, prefill 40 tokens",
        "decode 7 steps",
        "[PERF] Total: 4 sequences, 32",
    ):
        assert line in caplog.text
    assert "[MEMORY] After model setup" in caplog.text and "[MEMORY] After generation" in caplog.text


def test_all_sequences_end_at_once(checkpoint, monkeypatch, caplog):
    """Where the device runs ahead, as a GPU does, it has done a step by then, of which nobody has a token."""

    def run_ahead(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._runs_ahead = True

    made = Decoding.__init__
    monkeypatch.setattr(Decoding, "__init__", run_ahead)
    with caplog.at_level("INFO", logger="evo2_megatron"):
        (record,) = infer(PROMPTS[:1], checkpoint, GenerationSettings(stop_ids=tuple(range(512))))
    assert (record["completion"], record["finish_reason"]) == ("", "stop")
    assert "decode 1 steps in 0.000 s (0.0 tokens/s)" in caplog.text


def test_no_prompts_give_an_empty_file(checkpoint, tmp_path):
    assert infer([], checkpoint, SETTINGS, output_file=tmp_path / "out.jsonl") == []
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_what_was_finished_survives_an_interruption(checkpoint, tmp_path):
    def stop_at_the_third(record, seen=[]):  # noqa: B006
        seen.append(record)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(PROMPTS, checkpoint, SETTINGS, output_file=tmp_path / "out.jsonl", on_record=stop_at_the_third)
    kept = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl.part").read_text().splitlines()]
    assert kept == ["one", "one", "tag"] and not (tmp_path / "out.jsonl").exists()


def test_longer_than_trained_only_when_asked_for(checkpoint):
    prompt = [Prompt("x", "A" * 250)]
    with pytest.raises(
        UserError, match=r"'x' has 250 tokens, which with 8 new ones exceeds the 256 that the checkpoint"
    ):
        infer(prompt, checkpoint, SETTINGS)
    (record,) = infer(prompt, checkpoint, SETTINGS, max_seq_length=258)
    assert record["usage"]["total_tokens"] == 258


def test_memory_limits_the_length(checkpoint, monkeypatch, tmp_path):
    # one attention layer of 128 channels, keys and values in float32, and 1 MB of what does not grow
    tokens, per_token, fixed = 100, 2 * 128 * 4, 10**6
    whole = cache_memory._cache_bytes
    monkeypatch.setattr(
        cache_memory, "_cache_bytes", lambda model, n: [fixed, sum(whole(model, n)) - sum(whole(model, 0))]
    )
    free = (tokens * per_token + fixed) * SETTINGS.max_batch_size / cache_memory.CACHE_SHARE
    monkeypatch.setattr(cache_memory, "_free_bytes", lambda: free + 1)
    infer(4 * [Prompt("x", "A" * 92)], checkpoint, SETTINGS)
    with pytest.raises(UserError, match="'x' has 93 tokens.*exceeds the 100 that a batch's caches have memory for"):
        infer(4 * [Prompt("x", "A" * 93)], checkpoint, SETTINGS, output_file=tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())
    # of the batches that there are, not of those that --max-batch-size would allow
    infer([Prompt("x", "A" * 93)], checkpoint, SETTINGS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": [Prompt("a", "A"), Prompt("b", "")]}, "Prompt 'b' is empty"),
        ({"prompts": [Prompt("a", "AC\u0394T")]}, "Prompt 'a' has '\u0394' at character 3"),
        ({"prompts": [Prompt("a", "A" * 300)]}, "Prompt 'a' has 300 tokens"),
        ({"max_seq_length": 9, "prompts": [Prompt("a", "AC")]}, "exceeds the 9 of --max-seq-length"),
        ({"settings": GenerationSettings(sampling=Sampling(top_k=512))}, "top_k is 512"),
        ({"settings": GenerationSettings(alphabet="AC\x01")}, "alphabet 'AC.x01' has"),
        ({"settings": GenerationSettings(stop_strings=("\u0394",))}, "stop string '\u0394' has"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"output_format": "fasta"}, "two FASTA records would be named 'one'"),
        ({"include_prompt": True}, "leave out --include-prompt"),
        ({"parallel": ParallelConfig(context=2)}, "--context-parallel-size 1"),
        ({"parallel": ParallelConfig(sequence_parallel=True)}, "--sequence-parallel"),
        ({"parallel": ParallelConfig(tensor=2)}, "1 processes do not fit"),
        ({"ckpt_dir": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_requests_end_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, changes, message):
    monkeypatch.delattr(self_test, "load_model")
    request = {"prompts": PROMPTS, "ckpt_dir": checkpoint, "settings": SETTINGS} | changes
    with pytest.raises(UserError, match=message) as caught:
        infer(**request, output_file=tmp_path / "out.jsonl")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--tensor-parallel-size", "2"], ["--pipeline-parallel-size", "2"]], ids=str)
def test_two_processes_give_the_records_of_one(checkpoint, tmp_path, layout):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f"{json.dumps({'id': p.id, 'prompt': p.text})}\n" for p in PROMPTS)
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-c", "from evo2_megatron.cli.infer import main; main()"]
    options = {"prompt-file": tmp_path / "prompts.jsonl", "output-file": tmp_path / "out.jsonl", "max-new-tokens": 8}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [*launch, *program, "--ckpt-dir", str(checkpoint), *flags, *layout]
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert got == infer(PROMPTS, checkpoint, GenerationSettings(max_new_tokens=8))
    assert done.stdout.count("Generated Text ===") == len(PROMPTS), "one process prints"


def test_adapters_in_an_8_bit_recipe(checkpoint, tmp_path):
    """What pads single tokens there does not know what a layer with an adapter returns."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.generation.generation_model import decoder_of

    adapters = write_tiny_adapters(tmp_path, checkpoint)
    with process_groups(ParallelConfig()):
        loaded = load_model(adapters, parallel=ParallelConfig())
        assert decoder_of(loaded) is loaded.model
        loaded.model.config.fp8 = "e4m3"
        with pytest.raises(UserError, match="cannot generate with LoRA adapters .*; merge them with evo2_merge_lora"):
            decoder_of(loaded)
