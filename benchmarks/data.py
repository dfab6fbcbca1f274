# SPDX-License-Identifier: Apache-2.0
"""Time and memory of splice_evo2 beside gffread, and of bionemo_fasta_to_jsonl beside cp, on a generated genome.

    python benchmarks/data.py [--num-bases 250000000] [--num-transcripts 100000] [--rounds 5] [--folder DIR]

Each is a whole process, start included, with its files in the page cache and gffread's index (.fai) already there. The
outputs are compared first. Every round runs one after the other, each twice in a row, and the second time counts: a
virtual machine gives memory that was free for seconds back to its host and gets it again slowly, which would be
measured as the time of writing. The table has medians, and the median of the ratios (theirs over ours) of the rounds;
a line for reading and writing the same blocks in Python shows what bounds the rest. Memory is the sum of the peaks of
a command's processes, in a run of its own; what two of them share counts twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# the oracle and the generator live with the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from evo2_megatron.data.fasta import read_fasta
from generated_genome import GeneratedGenome, generate_genome
from parity.gffread import Gffread

TRANSCRIPTS_PER_GENE = 5
NUM_CONTIGS = 24
NUM_SHORT_RECORDS = 300_000
COPY_BLOCKS = """
import sys
with open(sys.argv[1], "rb", buffering=0) as source, open(sys.argv[2], "wb", buffering=0) as target:
    while block := source.read(1 << 18):
        target.write(block)
"""


def second_run(command: list[object], output: Path, environment: dict[str, str] | None = None) -> float:
    """Run a program twice, without its output before and between; the seconds of the second time."""
    for _ in range(2):
        output.unlink(missing_ok=True)
        seconds = run(command, environment)
    return seconds


def run(command: list[object], environment: dict[str, str] | None = None) -> float:
    """Run a program and wait for it; seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process.wait()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with status {process.returncode}")
    return seconds


def peak_mb(command: list[object], environment: dict[str, str] | None = None) -> float:
    """Sum of the peaks of a program and its child processes, which are looked at every 2 ms."""
    peaks: dict[int, int] = {}
    with subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # one may just have ended
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (process.pid, *map(int, children)):
                    status = Path(f"/proc/{pid}/status").read_text()
                    if "VmHWM:" in status:  # not yet or no longer
                        peaks[pid] = max(peaks.get(pid, 0), int(status.split("VmHWM:")[1].split()[0]))
            time.sleep(0.002)
    return sum(peaks.values()) / 1024


def ours(module: str, *arguments: object) -> list[object]:
    """Command line of one of our commands."""
    return [sys.executable, "-c", f"from evo2_megatron.cli.{module} import main; main()", *arguments]


def compare(
    name: str, mine: list[object], theirs: list[object], outputs: tuple[Path, Path], rounds: int, environment=None
) -> None:
    """Print one line of the table; ``outputs`` are the files that they write."""
    pairs = [(second_run(mine, outputs[0]), second_run(theirs, outputs[1], environment)) for _ in range(rounds)]
    peaks = [peak_mb(mine), peak_mb(theirs, environment)]
    for output in outputs:
        output.unlink()
    seconds = [statistics.median(pair[i] for pair in pairs) for i in (0, 1)]
    ratio = statistics.median(second / first for first, second in pairs)
    print(f"{name:46}{seconds[0]:9.2f}{seconds[1]:9.2f}{ratio:9.2f}{peaks[0]:11.0f}{peaks[1]:11.0f}", flush=True)


def in_a_process(function: Callable[..., None], *arguments: object) -> None:
    """Call in a process that then ends: a child's peak memory begins with what its parent holds."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed")


def check_splice(files: GeneratedGenome, output: Path, gffread: Gffread) -> None:
    """The same transcripts, base for base."""
    theirs = gffread.transcripts(files.fasta, files.gtf, files.fasta.with_name("theirs.fa"))
    num_equal = sum(theirs.pop(r.id.split("|")[2]) == r.sequence.decode() for r in read_fasta(output))
    assert num_equal and not theirs, f"{num_equal} transcripts are equal, {len(theirs)} are missing"


def measure_splice(files: GeneratedGenome, name: str, gffread: Gffread, rounds: int) -> None:
    """Compare, then time."""
    output, theirs = files.fasta.with_name("ours.fa"), files.fasta.with_name("theirs.fa")
    command = ours("splice", "--fasta-path", files.fasta, "--gtf-path", files.gtf, "--output-path", output)
    run(command)
    in_a_process(check_splice, files, output, gffread)
    their_command = [gffread.program, "-w", theirs, "-g", files.fasta, files.gtf]
    compare(name, command, their_command, (output, theirs), rounds, gffread.environment)


def check_jsonl(fasta: Path, output: Path) -> None:
    """Every line is the record's."""
    with output.open() as lines:
        for record, line in zip(read_fasta(fasta), lines, strict=True):
            assert json.loads(line) == {"id": record.id, "prompt": record.sequence.decode()}


def measure_jsonl(fasta: Path, name: str, rounds: int) -> None:
    """Compare, then time."""
    output, copy = fasta.with_name("ours.jsonl"), fasta.with_name("copy")
    command = ours("fasta_to_jsonl", fasta, output)
    run(command)
    in_a_process(check_jsonl, fasta, output)
    copy_command = ["cp", fasta, copy]
    compare(f"bionemo_fasta_to_jsonl / cp, {name}", command, copy_command, (output, copy), rounds)
    blocks = [sys.executable, "-c", COPY_BLOCKS, fasta, output]
    compare(f"Python that copies blocks / cp, {name}", blocks, copy_command, (output, copy), rounds)


def generate(folder: Path, num_bases: int, num_transcripts: int, dialect: str) -> None:
    """``genome.fa`` and ``genes.gtf``."""
    generate_genome(
        folder,
        num_bases=num_bases,
        num_genes=max(1, num_transcripts // TRANSCRIPTS_PER_GENE),
        num_transcripts=num_transcripts,
        num_contigs=NUM_CONTIGS,
        dialect=dialect,
    )


def main() -> None:
    """Generate, compare, measure, and remove the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-bases", type=int, default=250_000_000)
    parser.add_argument("--num-transcripts", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put files, 8 bytes a base (default: /tmp)")
    args = parser.parse_args()
    gffread = Gffread()
    print(f"{'seconds':46}{'ours':>9}{'theirs':>9}{'ratio':>9}{'ours, MB':>11}{'theirs, MB':>11}")
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folder = Path(work)
        # GENCODE with exon lines only; Ensembl with CDS lines too, as the real files have
        for dialect, lines in (("gencode", "exon lines"), ("ensembl", "exon and CDS lines")):
            in_a_process(generate, folder, args.num_bases, args.num_transcripts, dialect)
            files = GeneratedGenome(folder / "genome.fa", folder / "genes.gtf")
            measure_splice(files, f"splice_evo2 / gffread, {lines}", gffread, args.rounds)
        genome = folder / "genome_twice.fa"
        with genome.open("wb") as out, files.fasta.open("rb") as source:
            for _ in range(2):
                source.seek(0)
                shutil.copyfileobj(source, out)
        measure_jsonl(genome, "genome", args.rounds)
        genome.unlink()
        short = folder / "short.fa"
        with short.open("w") as out:
            out.writelines(f">read{i}\n{'ACGTTGCAgg' * 100}\n" for i in range(NUM_SHORT_RECORDS))
        measure_jsonl(short, "1 kb records", args.rounds)


if __name__ == "__main__":
    main()
