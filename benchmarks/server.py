#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Requests per second of a running evo2_serve, from one client and from many; no request may be lost."""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import time

import requests


def work(kind: str, num_requests: int, length: int, new_tokens: int) -> list[tuple[str, dict]]:
    """Requests with made-up bases, the same in every run."""
    bases = random.Random(1)
    made = []
    for seed in range(num_requests):
        text = "".join(bases.choices("ACGT", k=length))
        bodies = {
            "generate": {"prompt": text, "max_new_tokens": new_tokens, "stop_at_eod": False, "seed": seed},
            "score": {"sequences": [text]},
            "embed": {"sequences": [text], "layers": [-1]},
        }
        made.append((f"/v1/{kind}", bodies[kind]))
    return made


def seconds(url: str, requested: list[tuple[str, dict]], num_clients: int) -> float:
    """Time until the last of the requests is answered."""

    def ask(request: tuple[str, dict]) -> None:
        response = requests.post(url + request[0], json=request[1], timeout=600)
        response.raise_for_status()

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_clients) as clients:
        list(clients.map(ask, requested))
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--length", type=int, default=200, help="bases of a sequence or prompt")
    parser.add_argument("--new-tokens", type=int, default=50)
    args = parser.parse_args()
    print(f"{'':10}{'1 client':>12}{f'{args.clients} clients':>14}   requests/s")
    for kind in ("generate", "score", "embed"):
        requested = work(kind, args.requests, args.length, args.new_tokens)
        seconds(args.url, requested[:2], 1)  # what is made at first use is not counted
        one, many = (len(requested) / seconds(args.url, requested, clients) for clients in (1, args.clients))
        print(f"{kind:10}{one:12.1f}{many:14.1f}")


if __name__ == "__main__":
    main()
