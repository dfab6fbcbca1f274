# SPDX-License-Identifier: Apache-2.0
"""Two processes write what one writes, say what one says, and leave nothing."""

import gzip
import os
import signal
import subprocess
import sys

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.tasks.preparation import fasta_blocks_to_jsonl as blocks
from evo2_megatron.tasks.preparation import fasta_to_jsonl as jsonl
from evo2_megatron.tasks.preparation import splice as splicing
from evo2_megatron.tasks.preparation import two_processes
from generated_genome import generate_genome

BASES = "ACgtNNryKAC"
TIDY = {
    "lines": "".join(f">r{i} x > y\n" + f"{BASES}\n" * (i % 5) for i in range(40)),
    "one long line": ">a\n" + BASES * 90 + "\n>b\nAC\n",
    "long header": ">a " + "word " * 60 + "\nAC\nGT\n",
    "no final newline": ">a\nAC\n>b\nGT\nAC",
    "blank lines": ">a\n\n\nAC\n\n>b\n\n\n\n>c\n\nGT\n\n",
    "empty records": ">a\n>b\n>c\n>d\nAC\n>e\n>f\n",
    "names": '>a"b\\c\tx\n' + "AC\n" * 9 + "> \xe9|\u4e2d.1 x\nAC\n",
}
NOT_TIDY = {
    "Windows": TIDY["lines"].replace("\n", "\r\n"),
    "spaces": ">a\n" + "AC\n" * 40 + " A C \nAC\n",
    "> in a line": ">a\n" + "AC\n" * 40 + "A>C\n" + "A" * 64 + ">C" * 9 + "\nAC\n",
    "escapes": ">a\n" + "AC\n" * 40 + 'A"C\\\x7f\n',
    "gap, stop": ">a\n" + "AC-*\n" * 40,
    "space before": "\n \n>a\nAC\n",
    "byte order mark": "\ufeff>a\nAC\n",
    "long header": ">a\nAC\n>a " + "word" * 60 + "\nAC\nGT\n",
    "no name": ">a\n" + "AC\n" * 40 + ">\nAC\n",
    "no header": "AC\n" * 40,
    "not ASCII": ">a\n" + "AC\n" * 40 + "A\xe9\n",
    "carriage return": ">a\n" + "AC\n" * 40 + ">b\rAC\n",
}


def outcome(work):
    """Result, or what is said against it."""
    try:
        return work()
    except UserError as error:
        return str(error)


@pytest.fixture
def cores(monkeypatch):
    """Choose how many processes work, on files of any size."""

    def choose(number):
        monkeypatch.setattr(jsonl, "worth_two", lambda path: number == 2)
        monkeypatch.setattr(splicing, "worth_two", lambda path: number == 2)

    return choose


@pytest.mark.parametrize("block", [1, 7, 61, 200, 1 << 20])
@pytest.mark.parametrize("uppercase", [False, True])
@pytest.mark.parametrize("data", [*TIDY.values(), *NOT_TIDY.values()], ids=[*TIDY, *(f"not {n}" for n in NOT_TIDY)])
def test_jsonl_of_two_processes_is_that_of_one(tmp_path, monkeypatch, cores, data, block, uppercase):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks, "_PROBE_BYTES", 5)
    source, target = tmp_path / "a.fa", tmp_path / "a.jsonl"
    source.write_bytes(data.encode())
    results = []
    for number in (1, 2):
        target.unlink(missing_ok=True)
        cores(number)
        result = outcome(lambda: jsonl.fasta_to_jsonl(source, target, uppercase=uppercase))
        results.append((result, target.exists() and target.read_bytes()))

    assert results[0] == results[1]
    assert {path.name for path in tmp_path.iterdir()} <= {"a.fa", "a.jsonl"}


@pytest.mark.parametrize("name", TIDY)
def test_tidy_files_need_no_second_run(tmp_path, monkeypatch, cores, name):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 400)
    monkeypatch.delattr(jsonl, "_write")
    cores(2)
    (tmp_path / "a.fa").write_bytes(TIDY[name].encode())

    assert jsonl.fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.jsonl") == TIDY[name].count("\n>") + 1


@pytest.fixture(scope="module", params=["gencode", "ensembl", "refseq"])
def genome(request, tmp_path_factory):
    """A made-up genome with genes."""
    folder = tmp_path_factory.mktemp("genome")
    settings = {"num_bases": 60_000, "num_genes": 12, "num_transcripts": 40, "num_contigs": 3}
    return generate_genome(folder, dialect=request.param, **settings)


def spliced(genome, gtf, folder, **settings):
    """Summary without the time, problems and output."""
    problems, output = [], folder / "out.fa"
    output.unlink(missing_ok=True)
    (folder / "genes.gtf").write_bytes(gtf)
    work = splicing.splice
    result = outcome(lambda: work(genome.fasta, folder / "genes.gtf", output, report=problems.append, **settings)[:3])
    return result, problems, output.exists() and output.read_bytes()


CHANGES = {
    "none": lambda gtf: gtf,
    "contig that is not there": lambda gtf: gtf.replace(b"chr1\t", b"chr9\t").replace(b"chr3\t", b"chr8\t"),
    "no contig is there": lambda gtf: gtf.replace(b"chr", b"x"),
    "overlap": lambda gtf: b"".join(line * (1 + (i % 50 == 9)) for i, line in enumerate(gtf.splitlines(True))),
    "no gene lines": lambda gtf: b"".join(line for line in gtf.splitlines(True) if b"\tgene\t" not in line),
    "exons only": lambda gtf: b"".join(line for line in gtf.splitlines(True) if b"\texon\t" in line),
    "twice": lambda gtf: gtf + gtf,
    "broken": lambda gtf: gtf + b"chr1\tbroken\n",
    "GFF3": lambda gtf: b"##gff-version 3\n" + gtf,
    "no final newline": lambda gtf: gtf[:-1],
    "Windows": lambda gtf: gtf.replace(b"\n", b"\r\n"),
    "endless line": lambda gtf: gtf + b"x" * (3 << 20),
    "nothing": lambda gtf: b"",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("former", [False, True])
def test_transcripts_of_two_processes_are_those_of_one(genome, tmp_path, cores, change, former):
    gtf = CHANGES[change](genome.gtf.read_bytes())
    cores(1)
    one = spliced(genome, gtf, tmp_path, former=former)
    cores(2)

    assert spliced(genome, gtf, tmp_path, former=former) == one
    assert {path.name for path in tmp_path.iterdir()} <= {"genes.gtf", "out.fa"}


def test_both_halves_are_written_without_reading_again(genome, tmp_path, monkeypatch, cores):
    monkeypatch.delattr(splicing, "read_gtf")
    cores(2)
    (num_transcripts, _, left_out), problems, _ = spliced(genome, genome.gtf.read_bytes(), tmp_path)

    assert (num_transcripts, left_out, problems) == (40, {}, [])


def test_when_two_are_worth_it(tmp_path, monkeypatch):
    monkeypatch.setattr(two_processes, "_WORTH_BYTES", 10)
    monkeypatch.setattr(two_processes.threading, "active_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for name, data in {"good": b"x" * 10, "small": b"x" * 9, "gzip": gzip.compress(b"x" * 100)}.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")

    assert [n for n in ("good", "small", "gzip", "pipe", "none") if two_processes.worth_two(tmp_path / n)] == ["good"]
    monkeypatch.setattr(two_processes.threading, "active_count", lambda: 2)
    assert not two_processes.worth_two(tmp_path / "good")
    monkeypatch.setattr(two_processes.threading, "active_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert not two_processes.worth_two(tmp_path / "good")


START = """
import os, resource, sys, time
from evo2_megatron.tasks.preparation import fasta_blocks_to_jsonl as blocks, two_processes
two_processes._WORTH_BYTES = 0
blocks.BLOCK_BYTES = 64
cores = int(sys.argv.pop(1))
os.sched_getaffinity = lambda pid: set(range(cores))
"""
SLOW = """
pwritev = os.pwritev
def slow(*arguments):
    os.write(1, b"%d\\n" % os.getpid())
    for _ in range(1000):
        time.sleep(0.05)
    return pwritev(*arguments)
os.pwritev = slow
"""
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"


@pytest.fixture(params=["fasta_to_jsonl", "splice"])
def command(request, tmp_path):
    """A function that gives the command line of one of the two, with code before it and a number of cores."""
    generate = {"num_bases": 60_000, "num_genes": 12, "num_transcripts": 40, "num_contigs": 3, "dialect": "gencode"}
    files = generate_genome(tmp_path, **generate)
    arguments = [files.fasta, tmp_path / "out"]
    if request.param == "splice":
        arguments = ["--fasta-path", files.fasta, "--gtf-path", files.gtf, "--output-path", tmp_path / "out"]
    end = f"from evo2_megatron.cli.{request.param} import main\nmain()"
    return lambda code, cores: [sys.executable, "-c", START + code + end, str(cores), *map(str, arguments)]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_leaves_neither_file_nor_process(tmp_path, command, ending):
    before = {path.name for path in tmp_path.iterdir()}
    process = subprocess.Popen(
        command(SLOW, 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    pids = {int(process.stdout.readline()) for _ in range(2)}
    if ending == signal.SIGINT:  # from a terminal it reaches both
        os.killpg(process.pid, ending)
    else:
        process.send_signal(ending)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 128 + signal.SIGINT
    assert err.endswith(": interrupted\n") and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == before
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_second_process_that_is_killed_is_replaced(tmp_path, command):
    subprocess.run(command("", 1), check=True)
    expected = (tmp_path / "out").read_bytes()
    kill = "first, pwrite = os.getpid(), os.pwrite\n"
    kill += "os.pwrite = lambda *a: pwrite(*a) if os.getpid() == first else os.kill(os.getpid(), 9)\n"
    subprocess.run(command(kill, 2), check=True)

    assert (tmp_path / "out").read_bytes() == expected


def test_one_works_alone_where_there_is_no_room_for_another(tmp_path, command):
    subprocess.run(command("", 1), check=True)
    expected = (tmp_path / "out").read_bytes()
    subprocess.run(command("def fork(): raise BlockingIOError\nos.fork = fork\n", 2), check=True)

    assert (tmp_path / "out").read_bytes() == expected


def test_a_full_disk_is_told_as_by_one_process(tmp_path, command):
    before = {path.name for path in tmp_path.iterdir()}
    done = [subprocess.run(command(LIMIT, cores), capture_output=True, text=True) for cores in (1, 2)]

    assert [run.returncode for run in done] == [2, 2]
    assert done[0].stderr == done[1].stderr and "File too large; no result was written" in done[1].stderr
    assert {path.name for path in tmp_path.iterdir()} == before
