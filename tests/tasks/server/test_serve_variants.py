# SPDX-License-Identifier: Apache-2.0
"""Variants over HTTP: what variants_evo2 computes for a file, of a genome of the server and of sequences sent."""

import contextlib
import csv
import random
import re
import socket
import threading

import pytest
import requests
import uvicorn

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.data.genome import Genome
from evo2_megatron.tasks.scoring.variant_sources import VcfFile
from evo2_megatron.tasks.scoring.variants import VariantSettings, score_variants
from evo2_megatron.tasks.server.app import make_app
from evo2_megatron.tasks.server.engine import Engine, ModelSettings

BASES = "".join(random.Random(7).choices("ACGTacgt", k=700))
UPPER = BASES.upper()
VARIANTS = [
    (300, UPPER[299], "ACGT".replace(UPPER[299], "")[0], "scored"),
    (1, UPPER[0], "ACGT".replace(UPPER[0], "")[1], "scored"),
    (302, UPPER[301:304], UPPER[301], "scored"),
    (302, UPPER[301], UPPER[301] + "GATTACA", "scored"),
    (310, UPPER[309].lower(), "ACGT".replace(UPPER[309], "")[2].lower(), "scored"),
    (400, "ACGT".replace(UPPER[399], "")[0], UPPER[399], "ref_mismatch"),
    (701, "A", "C", "outside_contig"),
    (500, UPPER[499], "<DEL>", "symbolic"),
    (500, UPPER[499], UPPER[499], "same_as_ref"),
    (600, UPPER[599], UPPER[599] + "A" * 100, "scored"),  # but of short windows
]


@pytest.fixture(scope="module")
def files(megatron, tmp_path_factory):
    """A VCF file, its genome and a checkpoint."""
    folder = tmp_path_factory.mktemp("variants")
    (folder / "g.fa").write_text(f">chr1 of a test\n{BASES}\n>chr2\nACGT\n")
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    lines += [f"chr1\t{position}\t.\t{ref}\t{alt}\t.\t.\t." for position, ref, alt, _ in VARIANTS]
    (folder / "in.vcf").write_text("\n".join(lines) + "\n")
    return folder / "in.vcf", folder / "g.fa", write_tiny_checkpoint(folder / "checkpoint")


SETTINGS = {
    "default": {},
    "strands": {"both_strands": True, "prepend_bos": True},
    "short": {"window_length": 128, "both_strands": True},
}


@pytest.fixture(scope="module")
def tables(files, tmp_path_factory):
    """Lines that variants_evo2 writes, by ``SETTINGS``."""
    found = {}
    for name, settings in SETTINGS.items():
        folder = tmp_path_factory.mktemp(name)
        score_variants(VcfFile(files[0]), *files[1:], output_dir=folder, settings=VariantSettings(**settings))
        with (folder / "variants.tsv").open() as stream:
            found[name] = list(csv.DictReader(stream, delimiter="\t"))
    return found


@pytest.fixture(scope="module")
def engine(files, tables):
    """A real one, in a thread of its own; it takes the process for itself."""
    ready = threading.Event()
    engine = Engine(ModelSettings(ckpt_dir=files[2]), on_ready=lambda _: ready.set())
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    assert ready.wait(120)
    yield engine
    engine.stop()
    thread.join()


@contextlib.contextmanager
def serving(engine, genome):
    """The application on a port; a function that asks it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = uvicorn.Server(uvicorn.Config(make_app(engine, genome), log_config=None, lifespan="off"))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/variants"
        try:
            yield lambda **body: requests.post(url, json=body, timeout=60)
        finally:
            http.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def ask(files, engine):
    with Genome(files[1]) as genome, serving(engine, genome) as asking:
        yield asking


def variants(**more):
    return [{"position": p, "ref": ref, "alt": alt} | more for p, ref, alt, _ in VARIANTS]


@pytest.mark.parametrize("name", SETTINGS)
def test_effects_are_those_of_the_command(ask, tables, name):
    """Whether the genome is the server's or comes as a sequence; what is not scored says why."""
    more = SETTINGS[name]
    answers = [ask(variants=variants(chrom="chr1"), **more), ask(variants=variants(), sequence=BASES, **more)]
    for response in answers:
        assert response.status_code == 200, response.text
        effects = response.json()["effects"]
        *statuses, longest = (effect["status"] for effect in effects)
        assert statuses == [status for *_, status in VARIANTS][:-1]
        assert longest == ("too_long" if more.get("window_length") else "scored")
        assert response.json()["window_length"] == (more.get("window_length") or 256 - more.get("prepend_bos", False))
        for effect, line in zip(effects, tables[name], strict=True):
            assert effect["status"] == line["status"]
            for column in ("delta", "ref_log_likelihood", "alt_log_likelihood", "num_scored"):
                want = None if line[column] == "NA" else pytest.approx(float(line[column]), abs=2e-4)
                assert effect[column] == want
            if effect["status"] == "scored":
                difference = effect["alt_log_likelihood"] - effect["ref_log_likelihood"]
                assert effect["delta"] == pytest.approx(difference / effect["num_scored"], abs=1e-9)
    mismatch = answers[0].json()["effects"][5]
    assert mismatch["detail"] == f"REF {VARIANTS[5][1]}, there {VARIANTS[5][2]}"


def test_nothing_to_score(ask):
    response = ask(variants=[{"chrom": "1", "position": 4, "ref": "A", "alt": "C"}])
    (effect,) = response.json()["effects"]
    assert (effect["status"], effect["delta"]) == ("unknown_contig", None) and "chr1" in effect["detail"]


ONE = {"position": 1, "ref": "A", "alt": "C"}
BAD = {
    "none": ({"variants": []}, 422, "variants: list should have at least 1 item"),
    "many": ({"variants": [ONE] * 129, "sequence": "ACGT"}, 422, "variants: .*at most 128"),
    "two places": ({"variants": [ONE | {"chrom": "chr1"}], "sequence": "ACGT"}, 422, "leave out sequence"),
    "no place": ({"variants": [ONE | {"chrom": "chr1"}, ONE]}, 422, r"variants\.1: give chrom, or the sequence"),
    "position": ({"variants": [ONE | {"position": 0}]}, 422, r"variants\.0\.position: .*greater than or equal to 1"),
    "far": ({"variants": [ONE | {"position": 2**31}]}, 422, r"variants\.0\.position: .*less than or equal to"),
    "no ref": ({"variants": [ONE | {"ref": ""}]}, 422, r"variants\.0\.ref: .*at least 1 character"),
    "letter": ({"variants": [ONE | {"alt": "\u4e2d"}]}, 422, r"variants\.0\.alt: .*pattern"),
    "character": ({"variants": [ONE], "sequence": "AC>"}, 422, "sequence has '>' at character 3"),
    "short window": ({"variants": [ONE], "sequence": "ACGT", "window_length": 3}, 422, "window_length: .*equal to 4"),
    "long window": (
        {"variants": [ONE], "sequence": "ACGT", "window_length": 256, "prepend_bos": True},
        413,
        "window_length 256 is more than the 255 bases",
    ),
    "misspelt": ({"variants": [ONE | {"pos": 1}]}, 422, r"variants\.0\.pos: there is no such field"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(ask, name):
    body, status, message = BAD[name]
    response = ask(**body)
    assert response.status_code == status, response.text
    assert re.search(message, response.json()["detail"]), response.text


def test_a_server_without_a_genome(engine):
    with serving(engine, None) as ask:
        response = ask(variants=variants(chrom="chr1"))
        assert response.status_code == 422 and "started without --fasta" in response.json()["detail"]
        effects = ask(variants=variants()[:1], sequence=BASES).json()["effects"]
        assert effects[0]["status"] == "scored"


def test_more_windows_than_memory_is_for(ask, monkeypatch):
    from evo2_megatron.tasks.server import variants as module

    monkeypatch.setattr(module, "MAX_TOKENS", 1000)
    assert ask(variants=variants()[:1], sequence=BASES, both_strands=True).status_code == 413
    assert ask(variants=variants()[:1], sequence=BASES).status_code == 200
