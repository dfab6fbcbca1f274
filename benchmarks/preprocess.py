# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of the data side, beside pysam and beside plain Python; outputs are compared first.

``python benchmarks/preprocess.py [--bases 400000000] [--folder DIR] [--repeat 3]``

Times are the best of the repetitions, with the files in the page cache. A command is a whole process, start included,
and its memory is the process's peak. A folder in memory (/dev/shm) leaves the disk out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pysam

from evo2_megatron.data.fasta import read_fasta
from evo2_megatron.data.phylogenetic_mask import phylogenetic_tag_mask

LINE = 60
PLAIN = """
import sys
out = open(sys.argv[2], "wb")
for line in iter(lambda f=open(sys.argv[1], "rb"): f.read(1 << 18), b""):
    out.write(line.replace(b"\\n", b""))
"""


def write_genome(path: Path, num_bases: int, num_records: int) -> None:
    """Random bases, a third of them soft-masked, in lines of 60."""
    rng = np.random.default_rng(0)
    length = num_bases // num_records // LINE * LINE
    with path.open("wb") as file:
        for number in range(num_records):
            bases = np.frombuffer(b"ACGT", dtype=np.uint8)[rng.integers(0, 4, length)]
            bases[length // 3 : 2 * length // 3] |= 32
            lines = np.full((length // LINE, LINE + 1), ord("\n"), dtype=np.uint8)
            lines[:, :LINE] = bases.reshape(-1, LINE)
            file.write(b">record_%d\n" % number)
            file.write(lines.tobytes())


def best(work: Callable[[], object], repeat: int) -> float:
    """Shortest of several times, in seconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_mib(command: list[str]) -> float:
    """Peak memory of a command that prints it last, in kB; wait4's figure would include this process's own."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-2]) / 1024


def preprocess(fasta: Path, folder: Path, repeat: int, num_bases: int, **settings: object) -> None:
    """The command on one file."""
    keys = {"datapaths": [str(fasta)], "output_dir": str(folder / "out"), "output_prefix": "x", "overwrite": True}
    keys |= {"train_split": 1.0, "valid_split": 0.0, "test_split": 0.0, "append_eod": False} | settings
    config = folder / "config.yaml"
    config.write_text(str([keys]).replace("True", "true").replace("False", "false"))
    peak = "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    start = f"from evo2_megatron.cli.preprocess import main; main(); {peak}"
    command = [sys.executable, "-c", start, "-c", str(config)]
    seconds = best(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), repeat)
    name = "preprocess_evo2" + "".join(f", {key}" for key in settings)
    print(f"{name:<60}{num_bases / seconds / 1e6:8.0f} MB/s of bases{peak_mib(command):8.0f} MiB")


def main() -> None:
    """Write the inputs, compare, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=int, default=400_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        genome, short, half = folder / "genome.fa", folder / "short.fa", folder / "half.fa"
        write_genome(genome, args.bases, 4)
        write_genome(short, 200_000 * 2 * LINE, 200_000)
        write_genome(half, 100_000 * 2 * LINE, 100_000)

        preprocess(genome, folder, 1, args.bases)
        expected = b"".join(record.sequence for record in read_fasta(genome))
        assert (folder / "out/x_nucleotide_fast_tokenizer_256_train.bin").read_bytes() == expected
        del expected
        plain = [sys.executable, "-c", PLAIN, str(genome), str(folder / "plain")]
        seconds = best(lambda: subprocess.run(plain, check=True), args.repeat)
        print(f"{'plain Python, checks and counts nothing':<60}{args.bases / seconds / 1e6:8.0f} MB/s of bases")
        preprocess(genome, folder, args.repeat, args.bases)
        preprocess(genome, folder, args.repeat, args.bases, embed_reverse_complement=True)
        preprocess(genome, folder, args.repeat, args.bases, split_window_length=8192)

        with pysam.FastxFile(str(short)) as theirs:
            for ours, other in zip(read_fasta(short), theirs, strict=True):
                assert (ours.id, ours.sequence.decode()) == (other.name, other.sequence)
        times = {
            "read_fasta, 200,000 records": best(lambda: sum(1 for _ in read_fasta(short)), args.repeat),
            "read_fasta, 100,000 records": best(lambda: sum(1 for _ in read_fasta(half)), args.repeat),
            "pysam.FastxFile, 200,000 records": best(lambda: read_with_pysam(short), args.repeat),
            "pysam.FastaFile by name, 200,000 records": best(lambda: fetch_with_pysam(short), args.repeat),
        }
        for what, seconds in times.items():
            print(f"{what:<60}{seconds:8.3f} s")
        measure_mask(args.repeat)


def read_with_pysam(path: Path) -> None:
    """What ``read_fasta`` gives: names and sequences, one after the other."""
    for record in pysam.FastxFile(str(path)):
        _ = record.name, record.comment, record.sequence


def fetch_with_pysam(path: Path) -> None:
    """The same through the index, which is made anew."""
    Path(f"{path}.fai").unlink(missing_ok=True)
    with pysam.FastaFile(str(path)) as file:
        for name in file.references:
            file.fetch(name)


def measure_mask(repeat: int) -> None:
    """The mask of what is scored, on samples of 8192 tokens."""
    tokens = np.frombuffer(b"ACGTacgt", dtype=np.uint8)[np.random.default_rng(0).integers(0, 8, 8192)].astype(np.int64)
    tag = np.frombuffer(b"|d__Bacteria;p__Pseudomonadota;c__Gammaproteobacteria;o__;f__;g__;s__coli|", dtype=np.uint8)
    tagged = tokens.copy()
    for at in range(0, 8000, 400):  # 20 documents, each with a tag
        tagged[at], tagged[at + 1 : at + 1 + len(tag)] = 0, tag
    for what, sample in (("no tag", tokens), ("20 documents with a tag each", tagged)):
        seconds = best(lambda sample=sample: [phylogenetic_tag_mask(sample) for _ in range(500)], repeat)
        print(f"{'mask, ' + what:<60}{500 * 8192 / seconds / 1e6:8.0f} M tokens/s")


if __name__ == "__main__":
    main()
