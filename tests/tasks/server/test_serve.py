# SPDX-License-Identifier: Apache-2.0
"""evo2_serve as its users meet it: a process on a port. What it answers is what the commands for files compute."""

import concurrent.futures
import json
import math
import re
import signal
import socket

import numpy as np
import pytest
import requests
import torch

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.infer import infer
from evo2_megatron.tasks.generation.prompts import Prompt
from evo2_megatron.tasks.generation.sampling import Sampling
from evo2_megatron.tasks.scoring.predict import predict
from evo2_megatron.tasks.scoring.prediction_settings import Files, Output, Sequences
from processes import until
from tasks.server.server_process import Server, arrays_of

SEQUENCES = ["ACGTTGCAACGGTTAC" * 3, "acgtNNga", "|d__Bacteria;p__X|GATTACA", "A"]
MAX_LENGTH = 2048


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seq_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def servers():
    running = []
    yield running
    for server in running:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def server(servers, checkpoint, tmp_path_factory):
    """One for the whole module, or the next if a test has ended it."""
    if not servers or servers[-1].process.poll() is not None:
        (genome := tmp_path_factory.mktemp("server") / "genome.fa").write_text(">chr1\nACGT\n")
        servers.append(Server(checkpoint, genome.parent, "--max-batch-size", "8", "--fasta", str(genome)))
    return servers[-1]


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    path.write_text("".join(f">s{n}\n{sequence}\n" for n, sequence in enumerate(SEQUENCES)))
    return path


def predicted(fasta, checkpoint, folder, output, *, prepend_bos=False):
    predict(
        fasta,
        checkpoint,
        output=output,
        files=Files(output_dir=folder),
        sequences=Sequences(prepend_bos=prepend_bos),
    )
    (path,) = folder.glob("*.pt")
    batch = torch.load(path)
    order = batch["seq_idx"].argsort()
    return {name: values[order] for name, values in batch.items()}


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_score_is_what_predict_computes(server, checkpoint, fasta, tmp_path, prepend_bos):
    want = predicted(fasta, checkpoint, tmp_path / "out", Output(log_probs="per_token"), prepend_bos=prepend_bos)
    body = {"sequences": SEQUENCES, "prepend_bos": prepend_bos}
    scores = server.ask("/v1/score", body | {"per_base": True})["scores"]

    for score, log_probs, mask in zip(scores, want["log_probs_seqs"], want["loss_mask"], strict=True):
        of_bases = log_probs[mask].tolist()
        assert score["num_scored"] == len(of_bases)
        assert score["log_probs"] == pytest.approx(of_bases, abs=1e-5)
        assert score["log_likelihood"] == pytest.approx(sum(of_bases), abs=1e-4)
        assert score["mean_log_likelihood"] == pytest.approx(sum(of_bases) / max(len(of_bases), 1), abs=1e-5)
    assert scores[-1]["num_scored"] == prepend_bos, "a single base follows nothing, or the token in front"
    plain = server.ask("/v1/score", body)["scores"]
    assert [s["log_probs"] for s in plain] == [None] * len(SEQUENCES)
    assert [s["log_likelihood"] for s in plain] == pytest.approx([s["log_likelihood"] for s in scores])


@pytest.mark.parametrize("pooling", ["mean", "last", None])
def test_embed_is_what_predict_computes(server, checkpoint, fasta, tmp_path, pooling):
    output = Output(embedding_layers=(1, -1), pooling=pooling)
    want = predicted(fasta, checkpoint, tmp_path / "out", output)
    body = {"sequences": SEQUENCES, "layers": [-1, 1], "pooling": pooling}
    last = server.get("/v1/metadata").json()["num_layers"] - 1
    got = server.ask("/v1/embed", body)
    archive = server.ask("/v1/embed", body | {"encoding": "npz"})
    arrays = arrays_of(archive["data"])

    assert got["data"] is None and archive["embeddings"] is None and got["layers"] == [1, last]
    assert len(arrays) == 2 * len(SEQUENCES)
    for number, sequence in enumerate(SEQUENCES):
        for layer in (1, last):
            values = want[f"hidden_embeddings_layer_{layer}"][number]
            values = (values if pooling else values[: len(sequence)]).numpy()
            np.testing.assert_allclose(got["embeddings"][number][str(layer)], values, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(arrays[f"{number}.{layer}"], values, rtol=1e-4, atol=1e-4)
            assert arrays[f"{number}.{layer}"].dtype == np.float32


def test_generate_is_what_infer_computes(server, checkpoint):
    settings = GenerationSettings(
        max_new_tokens=30, sampling=Sampling(temperature=0.8, top_k=5), return_log_probs=True, stop_strings=("AA",)
    )
    prompts = [Prompt(str(n), text, seed=n) for n, text in enumerate(SEQUENCES)]
    for record, prompt in zip(infer(prompts, checkpoint, settings), prompts, strict=True):
        body = {
            "prompt": prompt.text,
            "max_new_tokens": 30,
            "temperature": 0.8,
            "top_k": 5,
            "seed": prompt.seed,
            "return_log_probs": True,
            "stop_strings": ["AA"],
        }
        got = server.ask("/v1/generate", body)
        assert (got["completion"], got["finish_reason"]) == (record["completion"], record["finish_reason"])
        assert got["stop_string"] == record.get("stop_string")
        assert (got["usage"], got["seed"]) == (record["usage"], record["seed"])
        assert got["log_probs"] == pytest.approx(record["logprobs"]["completion_logprobs"], abs=1e-4)


def test_a_seed_that_is_not_given_is_told(server):
    body = {"prompt": "ACGT", "max_new_tokens": 20, "alphabet": "ACGT", "stop_at_eod": False}
    first, second = (server.ask("/v1/generate", body) for _ in range(2))
    assert first["seed"] != second["seed"] and first["completion"] != second["completion"]
    assert server.ask("/v1/generate", body | {"seed": first["seed"]}) == first
    assert set(first["completion"]) <= set("ACGT") and len(first["completion"]) == 20


@pytest.mark.parametrize("more", [{}, {"return_log_probs": True, "stop_strings": ["GT", "CAC"]}], ids=["", "stops"])
def test_pieces_of_a_stream_join_to_the_answer(server, more):
    body = {"prompt": "ACGTTGCA", "max_new_tokens": 40, "alphabet": "ACGT", "seed": 3} | more
    whole = server.ask("/v1/generate", body)
    *pieces, (kind, end) = server.events(body)

    assert [name for name, _ in pieces] == ["piece"] * len(pieces) and kind == "done"
    assert "".join(piece["text"] for _, piece in pieces) == whole.pop("completion")
    log_probs = whole.pop("log_probs")
    if more:
        assert [value for _, piece in pieces for value in piece["log_probs"]] == pytest.approx(log_probs, abs=1e-5)
    assert {name: value for name, value in end.items() if name != "elapsed_ms"} == whole


def test_nim_generate(server):
    body = {"sequence": "ACTGACTG", "num_tokens": 6, "top_k": 4, "random_seed": 5, "temperature": None}
    ours = {"prompt": "ACTGACTG", "max_new_tokens": 6, "top_k": 4, "seed": 5, "temperature": 0.7}
    want = server.ask("/v1/generate", ours | {"return_log_probs": True})
    assert server.ask("/biology/arc/evo2/generate", body) == {
        "sequence": want["completion"],
        "logits": None,
        "sampled_probs": None,
        "elapsed_ms_per_token": None,
    }
    switches = {f"enable_{name}": True for name in ("logits", "sampled_probs", "elapsed_ms_per_token")}
    got = server.ask("/biology/arc/evo2/generate", body | switches)
    assert got["sequence"] == want["completion"]
    probs = torch.tensor(got["logits"]).softmax(-1)
    assert probs.shape == (len(want["completion"]), 512)
    drawn = probs[range(len(probs)), [ord(base) for base in got["sequence"]]].tolist()
    assert got["sampled_probs"] == pytest.approx(drawn, abs=1e-5)
    assert got["sampled_probs"] == pytest.approx([math.exp(value) for value in want["log_probs"]], abs=1e-5)
    assert len(got["elapsed_ms_per_token"]) == len(want["completion"])


def test_nim_forward(server, checkpoint, fasta, tmp_path):
    want = predicted(fasta, checkpoint, tmp_path / "hidden", Output(embedding_layers=(1,)))["hidden_embeddings"]
    logits = predicted(fasta, checkpoint, tmp_path / "logits", Output())["token_logits"]
    names = ["decoder.layers.1", "blocks.1", "output_layer", "unembed", "blocks.0.mlp.l3", "embedding"]
    got = server.ask("/biology/arc/evo2/forward", {"sequence": SEQUENCES[0], "output_layers": names})

    arrays = arrays_of(got["data"])
    assert set(arrays) == {f"{name}.output" for name in names}
    length = len(SEQUENCES[0])
    for name, values in (
        ("decoder.layers.1", want),
        ("blocks.1", want),
        ("output_layer", logits),
        ("unembed", logits),
    ):
        np.testing.assert_allclose(arrays[f"{name}.output"][:, 0], values[0, :length].numpy(), rtol=1e-4, atol=1e-4)
    assert {array.shape[:2] for array in arrays.values()} == {(length, 1)}


def test_prompts_are_read_in_upper_case(server):
    body = {"prompt": "ACGTTGCAACGT", "max_new_tokens": 1, "seed": 1, "return_log_probs": True}
    upper = server.ask("/v1/generate", body)["log_probs"]
    lower = [
        server.ask("/v1/generate", body | {"prompt": "acgttgcaacgt", "keep_prompt_case": keep})["log_probs"]
        for keep in (False, True)
    ]
    assert lower[0] == pytest.approx(upper, abs=1e-6) and lower[1] != pytest.approx(upper, abs=1e-3)


def test_status(server, checkpoint):
    assert server.get("/v1/health/live").json() == {"status": "live"}
    assert server.get("/v1/health/ready").json() == {"status": "ready"}
    assert requests.head(server.url + "/v1/health/ready", timeout=60).status_code == 200
    about = server.get("/v1/metadata").json()
    assert about["checkpoint"] == str(checkpoint) and about["precision"] == "fp32"
    assert about["limits"]["max_seq_length"] == MAX_LENGTH and about["limits"]["max_batch_size"] == 8
    assert about["fasta"].endswith("genome.fa")
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/generate", "/v1/score", "/v1/embed", "/biology/arc/evo2/generate"} <= set(paths)
    parts = re.findall(r'(?:src|href)="([^"]+)"', server.get("/docs").text)
    assert len(parts) == 3 and all(part.startswith("/") for part in parts), "the page needs no other server"
    assert [server.get(part).status_code for part in parts] == [200, 200, 200]


LONG = "A" * (MAX_LENGTH + 1)
BAD = {
    "empty prompt": ("/v1/generate", {"prompt": ""}, 422, "prompt: string should have at least 1 character"),
    "no prompt": ("/v1/generate", {}, 422, "prompt: field required"),
    "a number": ("/v1/generate", {"prompt": 5}, 422, "prompt: input should be a valid string"),
    "a number in quotes": ("/v1/generate", {"prompt": "A", "top_k": "4"}, 422, "top_k: .*valid integer"),
    "misspelt": ("/v1/generate", {"prompt": "A", "max_tokens": 4}, 422, "max_tokens: there is no such field"),
    "hot": ("/v1/generate", {"prompt": "A", "temperature": -1}, 422, "temperature: .*greater than or equal to 0"),
    "endless": ("/v1/generate", {"prompt": "A", "temperature": math.inf}, 422, "temperature: .*finite"),
    "top_p": ("/v1/generate", {"prompt": "A", "top_p": 1.5}, 422, "top_p: .*less than or equal to 1"),
    "top_k": ("/v1/generate", {"prompt": "A", "top_k": 512}, 422, "top_k is 512; it must be below .*512 tokens"),
    "none": (
        "/v1/generate",
        {"prompt": "A", "max_new_tokens": 0},
        422,
        "max_new_tokens: .*greater than or equal to 1",
    ),
    "character": ("/v1/generate", {"prompt": "ACG\u4e2d"}, 422, r"prompt has '\\u4e2d' at character 4"),
    "surrogate": ("/v1/generate", {"prompt": "AC\ud800"}, 422, "prompt: .*unicode"),
    "line break": ("/v1/generate", {"prompt": "ACG\nT"}, 422, r"prompt has '\\n' at character 4"),
    "alphabet": ("/v1/generate", {"prompt": "A", "alphabet": "AC", "stop_strings": ["G"]}, 422, "never appear"),
    "letters": ("/v1/generate", {"prompt": "A", "alphabet": "A" * 257}, 422, "at most 256 characters"),
    "long stop": ("/v1/generate", {"prompt": "A", "stop_strings": ["A" * 1001]}, 422, "at most 1000 characters"),
    "empty stop": ("/v1/generate", {"prompt": "A", "stop_strings": [""]}, 422, "a stop string is empty"),
    "long": (
        "/v1/generate",
        {"prompt": "A" * MAX_LENGTH},
        413,
        f"2048 tokens, .* 100 new ones exceeds the {MAX_LENGTH}",
    ),
    "no sequences": ("/v1/score", {"sequences": []}, 422, "sequences: list should have at least 1 item"),
    "many": ("/v1/score", {"sequences": ["A"] * 129}, 422, "sequences: .*at most 128"),
    "one is empty": ("/v1/score", {"sequences": ["A", ""]}, 422, "sequences.1: .*at least 1 character"),
    "one is long": ("/v1/score", {"sequences": ["A", LONG]}, 413, f"sequence 1 has 2049 tokens.*{MAX_LENGTH}"),
    "header": ("/v1/score", {"sequences": [">a"]}, 422, "sequence 0 has '>' at character 1"),
    "text": ("/v1/score", {"sequences": "ACGT"}, 422, "sequences: .*valid list"),
    "layer": ("/v1/embed", {"sequences": ["A"], "layers": [99]}, 422, "Invalid embedding_layer 99"),
    "no layer": ("/v1/embed", {"sequences": ["A"], "layers": []}, 422, "layers: .*at least 1 item"),
    "too many numbers": (
        "/v1/embed",
        {"sequences": ["A" * 2000] * 10, "layers": [0, 1], "pooling": None},
        413,
        'would have 5120000 numbers, more than 4194304; ask for "encoding": "npz"',
    ),
    "pooling": (
        "/v1/embed",
        {"sequences": ["A"], "layers": [0], "pooling": "max"},
        422,
        "pooling: .*'mean' or 'last'",
    ),
    "NIM": ("/biology/arc/evo2/generate", {"sequence": "A", "num_tokens": -1}, 422, "num_tokens"),
    "NIM long": ("/biology/arc/evo2/generate", {"sequence": LONG}, 413, str(MAX_LENGTH)),
    "NIM layer": ("/biology/arc/evo2/forward", {"sequence": "A", "output_layers": ["x"]}, 422, "no layer 'x'"),
    "no vectors": (
        "/biology/arc/evo2/forward",
        {"sequence": "AC", "output_layers": ["decoder.layers"]},
        422,
        "vector",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server, name):
    route, body, status, message = BAD[name]
    response = requests.post(
        server.url + route, data=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=60
    )
    assert response.status_code == status, response.text
    assert re.search(message, response.json()["detail"]), response.text
    assert list(response.json()) == ["detail"] and "\n" not in response.json()["detail"]


def test_what_is_no_request(server):
    def send(data, **headers):
        return requests.post(server.url + "/v1/score", data=data, timeout=60, headers=headers)

    broken = send(b'{"sequences": [', **{"Content-Type": "application/json"})
    assert broken.status_code == 422 and broken.json()["detail"].startswith("the body is not JSON")
    for data, cause in (
        (b"[" * 100_000, "recursion"),
        (b'{"sequences": [' + b"1" * 5_000 + b"]}", "limit"),
        (b'{"sequences": ["\xff"]}', "utf-8"),
    ):
        response = send(data, **{"Content-Type": "application/json"})
        assert response.status_code == 422 and cause in response.json()["detail"], response.text
    response = send(b'{"sequences": ["ACGT"]}', **{"Content-Type": "text/plain"})
    assert response.status_code == 422 and "'text/plain'; send JSON" in response.json()["detail"]
    limit = server.get("/v1/metadata").json()["limits"]["max_body_bytes"]
    large = b'{"sequences": ["' + b"A" * limit + b'"]}'
    for data in (large, iter([large[: limit // 2], large[limit // 2 :]])):  # with its length told beforehand, or not
        response = send(data, **{"Content-Type": "application/json"})
        assert response.status_code == 413 and str(limit) in response.json()["detail"]
    assert server.get("/v1/score").status_code == 405 and server.get("/v2").status_code == 404


def mixed(number):
    """A request of one of three kinds; no two are alike."""
    text = "ACGTTGCA"[number % 8 :] + "GATTACA" * (1 + number % 7)
    if number % 3 == 0:
        body = {"prompt": text, "max_new_tokens": 5 + number % 20, "seed": number, "alphabet": "ACGT"}
        # some share a batch, some cannot
        return "/v1/generate", body | {"temperature": (1.0, 0.5)[number % 2], "return_log_probs": number % 4 == 0}
    if number % 3 == 1:
        return "/v1/score", {"sequences": [text, text[::-1]], "per_base": number % 2 == 0}
    return "/v1/embed", {"sequences": [text], "layers": [number % 2, -1]}


def same(got, want):
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[name], value) for name, value in want.items())
    if isinstance(want, list):
        return len(got) == len(want) and all(map(same, got, want))
    return got == pytest.approx(want, rel=1e-3, abs=1e-4) if isinstance(want, float) else got == want


def test_fifty_clients_lose_nothing(server):
    work = [mixed(number) for number in range(150)]
    alone = [server.ask(*request) for request in work]
    with concurrent.futures.ThreadPoolExecutor(50) as clients:
        together = list(clients.map(lambda request: server.ask(*request), work))
    assert [number for number, (got, want) in enumerate(zip(together, alone)) if not same(got, want)] == []
    until(lambda: server.get("/v1/metadata").json()["load"] == {"waiting": 0, "generating": 0})


def test_who_goes_away_is_dropped(server):
    body = {"prompt": "ACGT", "max_new_tokens": MAX_LENGTH - 4, "stop_at_eod": False}
    stream = server.events(body)
    assert next(stream)[0] == "piece"
    server.ask("/v1/score", {"sequences": ["ACGT"]})
    assert server.generating() == 1, "a score waits for no generation"
    stream.close()
    until(lambda: server.generating() == 0, 5)
    with pytest.raises(requests.Timeout):
        server.post("/v1/generate", body, timeout=0.5)
    until(lambda: server.generating() == 0, 5)


def test_sigterm_finishes_what_runs(server):
    stream = server.events({"prompt": "ACGT", "max_new_tokens": 200, "stop_at_eod": False, "alphabet": "ACGT"})
    text = next(stream)[1]["text"]
    server.process.send_signal(signal.SIGTERM)
    until(lambda: refuses(server.url))
    *pieces, (kind, end) = stream
    assert kind == "done" and len(text + "".join(piece["text"] for _, piece in pieces)) == 200
    assert end["finish_reason"] == "length"
    assert server.process.wait(60) == 0
    assert server.log.read_text().endswith("Stopped\n")


@pytest.mark.slow
def test_sigterm_does_not_wait_for_who_stands_still(checkpoint, tmp_path):
    """One never sends the rest of a request, the other takes a part of a long answer; a third gets all of its own."""
    server = Server(checkpoint, tmp_path)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"sequences": ["ACGT" * 500] * 4, "layers": [0, 1, 2, 3], "pooling": None}).encode()
    head = b"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    half, stalled = (socket.create_connection((host, int(port))) for _ in range(2))
    with half, stalled:
        half.sendall(head % 1000 + b"{")
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(head % len(body) + body)
        assert stalled.recv(12) == b"HTTP/1.1 200"
        stream = server.events({"prompt": "ACGT", "max_new_tokens": 300, "stop_at_eod": False})
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        assert list(stream)[-1][0] == "done"
        assert server.process.wait(30) == 0
    log = server.log.read_text()
    assert "Leaving 2 clients who neither send nor take anything" in log and "Traceback" not in log
    assert log.endswith("Stopped\n")


def refuses(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) != 0
