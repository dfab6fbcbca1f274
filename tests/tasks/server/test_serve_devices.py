# SPDX-License-Identifier: Apache-2.0
"""evo2_serve with a model that two processes share, or that each of them has: it answers as one process does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import requests

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from processes import until
from tasks.server.server_process import COMMAND, Server, arrays_of

pytestmark = pytest.mark.slow

PROMPTS = ["GGGCGGCGACCTC", "ATG" * 30, "T", "acgt" * 11]


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seq_length=2048)


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory):
    """Of two processes, and of one."""
    folders = [tmp_path_factory.mktemp(name) for name in ("two", "one")]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:  # importing takes longest
        two = threads.submit(Server, checkpoint, folders[0], "--devices", "2", "--tensor-parallel-size", "2")
        one = threads.submit(Server, checkpoint, folders[1])
    both = [two.result(), one.result()]
    yield both
    for server in both:
        server.process.kill()  # with which the processes that it started end
        server.process.wait()


def agree(given, expected):
    """All that is no number is equal, and numbers are up to rounding."""
    if isinstance(expected, dict):
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            agree(given[name], value)
    elif isinstance(expected, list):
        assert len(given) == len(expected)
        for one, other in zip(given, expected):
            agree(one, other)
    elif isinstance(expected, float):
        assert math.isclose(given, expected, rel_tol=1e-4, abs_tol=1e-3)
    else:
        assert given == expected


@pytest.mark.parametrize(
    "route, body",
    [
        ("/v1/score", {"sequences": PROMPTS, "per_base": True}),
        ("/v1/embed", {"sequences": PROMPTS, "layers": [0, -1]}),
        (
            "/v1/variants",
            {"sequence": "ACGTTGCA" * 20, "variants": [{"position": 5, "ref": "T", "alt": "G"}], "both_strands": True},
        ),
        (
            "/v1/generate",
            {"prompt": PROMPTS[0], "max_new_tokens": 50, "alphabet": "ACGT", "seed": 7, "return_log_probs": True},
        ),
        ("/biology/arc/evo2/generate", {"sequence": "ACGT", "num_tokens": 9, "random_seed": 1, "top_k": 4}),
    ],
    ids=["score", "embed", "variants", "generate", "nim"],
)
def test_answers_are_those_of_one_process(servers, route, body):
    two, one = (server.ask(route, body) for server in servers)
    agree(two, one)


def test_outputs_of_layers(servers):
    body = {"sequence": "ACGTTG", "output_layers": ["blocks.1", "blocks.2.mlp.l3", "norm", "embedding_layer"]}
    two, one = (arrays_of(server.ask("/biology/arc/evo2/forward", body)["data"]) for server in servers)
    assert two.keys() == one.keys() and len(one) == 4
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-3, atol=1e-3)
    split = servers[0].post("/biology/arc/evo2/forward", {"sequence": "ACGT", "output_layers": ["unembed"]})
    assert split.status_code == 422 and "the model has no layer 'unembed'; choose decoder.layers.0 to" in split.text


def test_what_is_known_of_the_model(servers):
    two, one = (server.get("/v1/metadata").json() for server in servers)
    assert set(two.pop("modules")) < set(one.pop("modules"))
    assert two == one


def test_many_at_once(servers):
    """Who joins whom depends on when they come; what they get does not."""

    def bases(server, number):
        body = {"prompt": PROMPTS[number % 4], "max_new_tokens": 5 + 3 * number, "alphabet": "ACGT", "seed": number}
        return server.ask("/v1/generate", body)["completion"]

    with concurrent.futures.ThreadPoolExecutor(24) as clients:
        two, one = (list(clients.map(bases, [server] * 24, range(24))) for server in servers)
    assert two == one


def test_who_goes_away_is_dropped_everywhere(servers):
    server = servers[0]
    body = {"prompt": "A", "max_new_tokens": 1900, "alphabet": "ACGT", "stop_at_eod": False}
    for _ in range(2):
        events = server.events(body)
        next(events)
        events.close()
    until(lambda: server.generating() == 0)
    # were one process still at it, this would not be answered
    assert server.ask("/v1/score", {"sequences": ["ACGT"]})["scores"][0]["num_scored"] == 3


def test_sigterm_finishes_what_runs(servers):
    server = servers[0]
    body = {"prompt": "A", "max_new_tokens": 200, "alphabet": "ACGT", "stop_at_eod": False}
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        answer = clients.submit(server.ask, "/v1/generate", body)
        until(lambda: server.generating() == 1)
        server.process.send_signal(signal.SIGTERM)
        assert len(answer.result()["completion"]) == 200
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text() and "Stopped" in server.log.read_text()


def test_copies_share_the_port(servers, checkpoint, tmp_path):
    """Each new connection goes to one of them; what it is answered is what one process answers."""
    server = Server(checkpoint, tmp_path, "--devices", "2")
    try:
        port = int(server.url.rpartition(":")[2])
        copies = [child.pid for child in psutil.Process(server.process.pid).children(recursive=True)]

        def listening(pid):
            return [c for c in psutil.Process(pid).net_connections() if c.status == "LISTEN" and c.laddr.port == port]

        until(lambda: sum(bool(listening(pid)) for pid in copies) == 2)
        body = {"sequences": PROMPTS}
        expected = servers[1].ask("/v1/score", body)
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(requests.Session()) for _ in range(40)]
            for session in sessions:  # who has connected stays so
                agree(
                    session.post(f"{server.url}/v1/score", json=body, timeout=60).json()["scores"], expected["scores"]
                )
            who = [[c for c in psutil.Process(pid).net_connections() if c.status == "ESTABLISHED"] for pid in copies]
            assert sorted(bool([c for c in each if c.laddr.port == port]) for each in who)[-2:] == [True, True]
        assert "16 at a time in each of 2 copies" in server.log.read_text()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.slow
def test_a_port_that_others_share_is_taken(checkpoint, tmp_path):
    server = Server(checkpoint, tmp_path, "--devices", "2")
    port = server.url.rpartition(":")[2]
    try:
        second = subprocess.run(
            [*COMMAND, "--ckpt-dir", str(checkpoint), "--port", port, "--devices", "2"], stderr=-1, text=True
        )
        assert second.returncode == 2
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another" in second.stderr
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("divided", [(), ("--tensor-parallel-size", "2")], ids=["copies", "divided"])
def test_interrupted_while_one_process_is_late(checkpoint, tmp_path, divided):
    """It ends before it hears signals; the other, which waits for it, must end too."""
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        command = [*COMMAND, "--ckpt-dir", str(checkpoint), "--port", "0", "--devices", "2", *divided]
        launcher = subprocess.Popen(command, stderr=stream)
    try:
        until(lambda: len(psutil.Process(launcher.pid).children()) == 2)
        first, late = sorted(psutil.Process(launcher.pid).children(), key=lambda child: child.environ()["RANK"])
        late.suspend()
        until(lambda: first.net_connections("tcp4") and any(c.status == "LISTEN" for c in first.net_connections()))
        time.sleep(2)  # for it to wait for the other
        for each in (launcher, late):
            each.send_signal(signal.SIGINT)
        late.resume()
        assert launcher.wait(20) == 0
        assert "Stopped before the model was loaded" in log.read_text()
    finally:
        launcher.kill()
        launcher.wait()
