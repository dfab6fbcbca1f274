# SPDX-License-Identifier: Apache-2.0
"""The studies with a model that has learned planted genes: the pictures of the paper, in small."""

from __future__ import annotations

import csv
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import STUDIES

PAIRS = ("GC", "CA", "TC", "GG")
"""First two bases of the planted codons; the third is any."""
NUM_CODONS, SPACER = 40, 80
GENE = 3 * (NUM_CODONS + 2)

pytestmark = pytest.mark.slow


def planted(rng: np.random.Generator, num_genes: int) -> str:
    """Genes between random spacers; the n-th begins at ``SPACER + n * (GENE + SPACER)``."""
    parts = []
    for _ in range(num_genes):
        codons = [rng.choice(PAIRS) + rng.choice(list("ACGT")) for _ in range(NUM_CODONS)]
        spacer = "".join(rng.choice(list("ACGT"), SPACER - 7)) + "AGGAGGT"  # what a start codon is known by
        parts += [spacer, "ATG", *codons, "TAA"]
    return "".join(parts) + "".join(rng.choice(list("ACGT"), SPACER))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model, and a genome that it has not seen with its annotation."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    (folder / "train.fa").write_text("".join(f">t{n}\n{planted(rng, 5)}\n" for n in range(100)))
    (folder / "new.fa").write_text("".join(f">n{n}\n{planted(rng, 3)}\n" for n in range(4)))
    line = 'n{}\tx\texon\t{}\t{}\t.\t+\t.\tgene_id "g{}"; transcript_id "g{}"; exon_number "1";\n'
    starts = [(c, g, SPACER + g * (GENE + SPACER)) for c in range(4) for g in range(3)]
    genes = [line.format(c, s + 1, s + GENE, f"{c}.{g}", f"{c}.{g}") for c, g, s in starts]
    (folder / "new.gtf").write_text("".join(genes))
    (folder / "pre.yaml").write_text(
        "- {datapaths: [train.fa], output_dir: ., output_prefix: p, train_split: 0.9, valid_split: 0.05, test_split: "
        "0.05, append_eod: true, seed: 1}\n"
    )
    names = {"train": "train", "val": "validation", "test": "test"}
    (folder / "blend.yaml").write_text(
        "".join(
            f"- {{dataset_prefix: p_nucleotide_fast_tokenizer_256_{file}, dataset_weight: 1.0, "
            f"dataset_split: {split}}}\n"
            for file, split in names.items()
        )
    )
    run(folder, "preprocess", "--config", "pre.yaml")
    run(
        folder, "train", "--dataset-config", "blend.yaml", "--model-size", "evo2_tiny", "--seq-length", 512,
        "--micro-batch-size", 4, "--global-batch-size", 8, "--max-steps", 120, "--eval-interval", 120, "--eval-iters",
        1, "--warmup-steps", 10, "--decay-steps", 120, "--lr", "4e-3", "--result-dir", "run",
    )  # fmt: skip
    return folder


def run(folder: Path, command: str, *flags: object) -> None:
    code = f"from evo2_megatron.cli.{command} import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=folder, check=True, capture_output=True)


def study(folder: Path, monkeypatch, name: str, *flags: object) -> Path:
    monkeypatch.syspath_prepend(STUDIES)
    importlib.import_module("harness")
    always = ("--ckpt-dir", folder / "run" / "evo2" / "checkpoints", "--output-dir", folder / name)
    monkeypatch.setattr("sys.argv", [name, *map(str, (*always, "--fasta", folder / "new.fa", *flags))])
    runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")
    return folder / name


def test_scan_shows_start_codon_and_free_third_base(folder, monkeypatch):
    flags = ("--contig", "n0", "--start", SPACER, "--end", SPACER + GENE, "--context", 80, "--flank", 20)
    made = study(folder, monkeypatch, "mutational_scan", *flags)
    with (made / "mutational_scan_classes.tsv").open() as stream:
        mean = {
            row["class"]: float(row["mean_delta_log_likelihood"]) for row in csv.DictReader(stream, delimiter="\t")
        }
    print(mean)
    assert max(mean["codon base 1"], mean["codon base 2"]) < -1
    assert abs(mean["codon base 3"]) < 0.5
    assert mean["start codon"] < -1


def test_classifier_finds_planted_genes(folder, monkeypatch):
    flags = ("--gtf", folder / "new.gtf", "--layer", -1, "--test-contigs", "n2", "n3", "--window", 400, "--all-bases")
    made = study(folder, monkeypatch, "exon_classifier", *flags)
    with (made / "exon_classifier.tsv").open() as stream:
        *_, every = csv.DictReader(stream, delimiter="\t")
    assert every["contig"] == "all" and float(every["auroc"]) > 0.9
