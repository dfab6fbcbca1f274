# SPDX-License-Identifier: Apache-2.0
"""Variant scores against sequences edited by hand and scored by predict's runner; strands, layouts, killed jobs."""

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from pyarrow import parquet

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.nucleotides import reverse_complement

COMMAND = "from evo2_megatron.cli.variants import main; main()"
CHANCE = random.Random(5)
CONTIGS = {"c1": "".join(CHANCE.choices("ACGTacgt", k=900)), "short": "".join(CHANCE.choices("ACGT", k=100))}
WINDOW = 128


def other(base):
    return CHANCE.choice([b for b in "ACGT" if b != base.upper()])


def vcf_lines():
    """Position, REF, ALTs, status of each ALT."""
    c1, short = (CONTIGS[name].upper() for name in ("c1", "short"))
    snvs = [("c1", p, c1[p - 1], [other(c1[p - 1])]) for p in (1, 2, 70, 400, 401, 401, 899, 900)]
    three = [("c1", 500, c1[499], [b for b in "ACGT" if b != c1[499]])]
    mnv = [("c1", 410, c1[409:413], ["".join(map(other, c1[409:413]))])]
    indels = [("c1", p, c1[p - 1 : p + 6], [c1[p - 1]]) for p in (20, 300, 880)]
    indels += [("c1", p, c1[p - 1], [c1[p - 1] + "ACCGT"]) for p in (20, 300, 880)]
    complex_ = [("c1", 600, c1[599:603], ["T" + other(c1[602]) + "GGGGA"])]
    in_short = [
        ("short", 50, short[49], [other(short[49])]),
        ("short", 60, short[59:62], [short[59], short[59] + "GG"]),
    ]
    skipped = [("c1", 450, c1[449], ["<DEL>", "*", other(c1[449])]), ("c1", 460, other(c1[459]), ["ACGT"])]
    skipped += [("c2", 1, "A", ["C"]), ("c1", 901, "A", ["C"]), ("c1", 470, c1[469], ["A" * 70])]
    return [*snvs, *three, *mnv, *indels, *complex_, *in_short, *skipped]


LINES = vcf_lines()


@pytest.fixture(scope="module")
def inputs(megatron, tmp_path_factory):
    """A VCF file, a FASTA file and a checkpoint, as the task takes them."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "g.fa").write_text("".join(f">{name}\n{bases}\n" for name, bases in CONTIGS.items()))
    text = "##fileformat=VCFv4.2\n" + "".join(f"##contig=<ID={name}>\n" for name in (*CONTIGS, "c2"))
    text += "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    text += "".join(f"{c}\t{p}\t.\t{ref}\t{','.join(alts)}\t29.50\tPASS\t.\n" for c, p, ref, alts in LINES)
    (folder / "in.vcf").write_text(text)
    return folder / "in.vcf", folder / "g.fa", write_tiny_checkpoint(folder / "checkpoint")


@pytest.fixture
def score(inputs, tmp_path):
    """score_variants() into ``tmp_path/out``; returns the lines of the table."""
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import VariantSettings, score_variants

    def call(formats=("tsv",), **settings):
        settings = VariantSettings(**{"window_length": WINDOW} | settings)
        source, out = VcfFile(inputs[0]), tmp_path / "out"
        score_variants(source, *inputs[1:], output_dir=out, formats=formats, settings=settings)
        return table(tmp_path / "out")

    return call


def table(folder):
    with (folder / "variants.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def by_hand(contig, position, ref, alt, reverse):
    """The two sequences of an SNV, MNV or indel that cannot be moved, window by window."""
    whole = CONTIGS[contig].upper()
    start = position - 1
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    while ref and alt and ref[0] == alt[0]:
        ref, alt, start = ref[1:], alt[1:], start + 1
    while not (ref and alt) and whole[start - 1] == (ref or alt)[-1]:
        start -= 1
        ref, alt = (whole[start] + text[:-1] if text else "" for text in (ref, alt))
    edited = whole[:start] + alt + whole[start + len(ref) :]
    lost = max(0, len(ref) - len(alt))
    length = min(WINDOW, len(whole) - lost)
    first = max(0, min(start - WINDOW // 2, len(whole) - WINDOW))
    if reverse:
        end = min(len(whole), max(first + WINDOW, length + lost))
        edited_end = end + len(edited) - len(whole)
        return [reverse_complement(text)[:length] for text in (whole[:end], edited[:edited_end])]
    first = max(0, min(first, len(whole) - length - lost))
    return [text[first : first + length] for text in (whole, edited)]


@pytest.fixture(scope="module")
def expected(inputs):
    """Log-likelihoods of REF and ALT on both strands [2, 2] and the tokens scored, by predict's runner."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.data.fasta_dataset import make_sample
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    found = {}
    with process_groups(ParallelConfig()):
        loaded = load_model(inputs[2], parallel=ParallelConfig())
        runner = Runner(loaded.model, Output(log_probs="sum"), precision=loaded.precision)
        for bos in (False, True):
            for contig, position, ref, alts in LINES[:-5]:
                for alt in alts:
                    texts = [
                        text for reverse in (False, True) for text in by_hand(contig, position, ref, alt, reverse)
                    ]
                    samples = [make_sample(text.encode(), i, prepend_bos=bos) for i, text in enumerate(texts)]
                    result = runner(samples)
                    ll = result["log_likelihood"].view(2, 2)
                    found[contig, position, ref, alt, bos] = (ll, result["num_scored"][0].item())
    return found


def compare(rows, expected, *, bos=False, both=False, mean=True):
    scored = [row for row in rows if row["status"] == "scored"]
    keys = [(row["chrom"], int(row["pos"]), row["ref"], row["alt"]) for row in scored]
    assert keys[:-1] == [(c, p, ref, alt) for c, p, ref, alts in LINES[:-5] for alt in alts]
    for key, row in zip(keys[:-1], scored):
        of_strands, num_scored = expected[(*key, bos)]
        reference, alternative = (of_strands.mean(0) if both else of_strands[0]).tolist()
        delta = (alternative - reference) / (num_scored if mean else 1)
        assert int(row["num_scored"]) == num_scored
        assert float(row["delta"]) == pytest.approx(delta, abs=1e-5 if mean else 1e-3), key
        assert float(row["ref_log_likelihood"]) == pytest.approx(reference, rel=1e-5)
        assert float(row["alt_log_likelihood"]) == pytest.approx(alternative, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"both_strands": True, "prepend_bos": True},
        {"both_strands": True, "shared_context": False},
        {"score": "sum", "max_batch_tokens": 4096},
        {"chunk_length": 20, "max_batch_tokens": 1},
    ],
    ids=["forward", "strands", "whole", "sum", "pieces"],
)
def test_against_windows_made_by_hand(score, expected, settings):
    rows = score(**settings)
    compare(
        rows,
        expected,
        bos=settings.get("prepend_bos", False),
        both=settings.get("both_strands", False),
        mean=settings.get("score") != "sum",
    )
    assert [row["status"] for row in rows][-7:] == [
        "symbolic", "spanning_deletion", "scored", "ref_mismatch", "unknown_contig", "outside_contig", "too_long",
    ]  # fmt: skip
    assert all(row["delta"] == "NA" for row in rows if row["status"] != "scored")


def test_shared_windows(score):
    shared, whole = (score(window_step=32, both_strands=True, shared_context=on) for on in (True, False))
    references = {row["ref_log_likelihood"] for row in whole if row["pos"] in ("400", "401", "410")}
    assert len(references) == 1
    for one, other_ in zip(shared, whole):
        if one["status"] == "scored":
            assert float(one["delta"]) == pytest.approx(float(other_["delta"]), abs=1e-5)


def test_common_starts_are_computed_once(score, monkeypatch):
    from evo2_megatron.tasks.scoring.prediction_runner import Runner

    tokens = []
    extending = Runner.extending
    monkeypatch.setattr(
        Runner,
        "extending",
        lambda self, state, ids, following: tokens.append(ids.numel()) or extending(self, state, ids, following),
    )
    score()
    num_alleles = sum(len(alts) for _, _, _, alts in LINES[:-5]) + 1
    assert sum(tokens) < 0.8 * 2 * WINDOW * num_alleles


def test_files(score, inputs, tmp_path, caplog):
    rows = score(formats=("tsv", "parquet", "vcf", "vcf.gz"))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "skipped.tsv", "variants.parquet", "variants.tsv", "variants.vcf", "variants.vcf.gz",
    ]  # fmt: skip
    columns = parquet.read_table(out / "variants.parquet").to_pylist()
    for line, row in zip(columns, rows):
        assert [line["chrom"], str(line["pos"]), line["alt"]] == [row["chrom"], row["pos"], row["alt"]]
        assert line["delta"] is None if row["delta"] == "NA" else line["delta"] == pytest.approx(float(row["delta"]))

    assert gzip.decompress((out / "variants.vcf.gz").read_bytes()) == (out / "variants.vcf").read_bytes()
    deltas = iter(rows)
    import pysam  # here, so that the file can be read where it is not installed

    with pysam.VariantFile(str(out / "variants.vcf.gz")) as file:
        assert file.header.info["EVO2_DELTA"].number == "A"
        for record, (_, position, _, alts) in zip(file, LINES, strict=True):
            mine = [next(deltas) for _ in alts]
            assert record.pos == position
            for value, row in zip(record.info["EVO2_DELTA"], mine, strict=True):
                assert value is None if row["delta"] == "NA" else value == pytest.approx(float(row["delta"]))
            reasons = record.info.get("EVO2_SKIPPED")
            assert reasons is None or ["scored" if r == "." else r for r in reasons] == [row["status"] for row in mine]
    skipped = (out / "skipped.tsv").read_text().splitlines()
    assert len(skipped) == 7 and "ref_mismatch\tREF" in skipped[3]
    number = int(skipped[3].split("\t")[0])
    assert inputs[0].read_text().splitlines()[number - 1].startswith("c1\t460\t")
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["settings"]["window_length"] == WINDOW and "vcf_sha256" in facts["settings"]


def test_window_length_of_the_model(score, tmp_path):
    score(window_length=None)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["window_length"] == 256
    with pytest.raises(UserError, match="--window-length 300 is more than the 256 bases .* --max-seq-length"):
        score(window_length=300)
    assert score(window_length=300, max_seq_length=300)[0]["num_scored"] == "299"
    with pytest.raises(UserError, match="--window-step 40 moves variants far .* at most 32"):
        score(window_step=40)


@pytest.mark.parametrize(
    "line, message",
    [
        ("chrc1\t5\t.\tA\tC", "line 3: the FASTA file has no such contig .chrc1; it has c1: bcftools annotate"),
        ("9\t5\t.\tA\tC", "has no such contig .9; it has c1, short"),
        (f"c1\t5\t.\t{'C' if CONTIGS['c1'][4].upper() == 'A' else 'A'}\tG", "line 3: REF is not what the FASTA"),
    ],
)
def test_another_genome(inputs, tmp_path, line, message):
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import score_variants

    vcf = tmp_path / "in.vcf"
    vcf.write_text(f"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n{line}\t.\t.\t.\n")
    with pytest.raises(UserError, match=message):
        score_variants(VcfFile(vcf), *inputs[1:], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_records(inputs, tmp_path):
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import score_variants

    vcf = tmp_path / "in.vcf"
    vcf.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
    score_variants(VcfFile(vcf), *inputs[1:], output_dir=tmp_path / "out", formats=("tsv", "parquet", "vcf"))
    assert table(tmp_path / "out") == []
    assert parquet.read_table(tmp_path / "out" / "variants.parquet").num_rows == 0


def test_output_that_is_not_finite(inputs, tmp_path):
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import VariantSettings, score_variants

    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", projection_factor=float("nan"))
    with pytest.raises(UserError, match="variants on contig .*c1.*: the model's output is not finite; check the weig"):
        settings = VariantSettings(window_length=WINDOW)
        score_variants(VcfFile(inputs[0]), inputs[1], checkpoint, output_dir=tmp_path / "out", settings=settings)
    assert not list((tmp_path / "out").glob("[!.]*"))


def arguments(inputs, folder):
    vcf, fasta, checkpoint = map(str, inputs)
    flags = ["--vcf", vcf, "--fasta", fasta, "--ckpt-dir", checkpoint, "--output-dir", str(folder)]
    return [*flags, "--window-length", str(WINDOW), "--both-strands", "--output-format", "tsv", "parquet", "vcf.gz"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on(inputs, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(name):
        return [sys.executable, "-c", COMMAND, *arguments(inputs, tmp_path / name), "--max-batch-tokens", "100"]

    subprocess.run(command("whole"), check=True, env=environment, capture_output=True)
    parts = tmp_path / "killed" / ".parts"
    job = subprocess.Popen(command("killed"), env=environment, stderr=subprocess.DEVNULL)
    while len(list(parts.glob("batch_*.pt"))) < 4:
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "killed" / "variants.tsv").exists()
    again = subprocess.run(command("killed"), check=True, env=environment, capture_output=True, text=True)
    assert "Going on with the run that was cut off" in again.stderr and not parts.exists()
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--tensor-parallel-size", "2"], ["--pipeline-parallel-size", "2"]])
def test_two_processes(inputs, tmp_path, score, layout):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, sys.executable, "-c", COMMAND, *arguments(inputs, tmp_path / "two"), *layout]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for one, two in zip(score(both_strands=True), table(tmp_path / "two"), strict=True):
        assert [one[name] for name in ("pos", "alt", "status")] == [two[name] for name in ("pos", "alt", "status")]
        if one["status"] == "scored":
            assert float(two["delta"]) == pytest.approx(float(one["delta"]), abs=1e-5)


def test_memory_that_runs_out(score, monkeypatch):
    from evo2_megatron.tasks.scoring.prediction_runner import Runner

    longer = {"window_length": 600, "max_seq_length": 600, "max_batch_tokens": 2400}
    whole, extending, failures = score(**longer), Runner.extending, []

    def small(self, state, ids, following):
        if ids.numel() > 700:
            failures.append(ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (yield from extending(self, state, ids, following))

    monkeypatch.setattr(Runner, "extending", small)
    for one, halves in zip(whole, score(**longer), strict=True):
        if one["status"] == "scored":
            assert float(halves["delta"]) == pytest.approx(float(one["delta"]), abs=1e-5)
    assert failures
