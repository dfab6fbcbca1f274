#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Requests per second of a running evo2_serve: from one client, from many at once, and from many that come by and by.

In the last column each client begins at a random moment of --arrive-within seconds and asks as soon as it has its
answer, and generations are of random length, as many tokens in all as in the other columns. No request may be lost.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import time

import requests

KINDS = ("generate", "score", "embed")
Request = tuple[str, dict]


def work(kind: str, num_requests: int, length: int, new_tokens: int, *, spread: int = 0) -> list[Request]:
    """Requests with made-up bases, the same in every run; new tokens differ by up to ``spread``, but not in sum."""
    bases = random.Random(1)
    made, more = [], 0
    for seed in range(num_requests):
        text = "".join(bases.choices("ACGT", k=length))
        more = -more if seed % 2 else bases.randint(-spread, spread)
        bodies = {
            "generate": {"prompt": text, "max_new_tokens": new_tokens + more, "stop_at_eod": False, "seed": seed},
            "score": {"sequences": [text]},
            "embed": {"sequences": [text], "layers": [-1]},
        }
        made.append((f"/v1/{kind}", bodies[kind]))
    return made


def seconds(url: str, requested: list[Request], num_clients: int, *, within: float = 0.0) -> float:
    """Time until the last of the requests is answered; clients begin at random within so many seconds."""
    moments = random.Random(2)

    def ask(requests_of_one: list[Request], wait: float) -> None:
        time.sleep(wait)
        for route, body in requests_of_one:
            requests.post(url + route, json=body, timeout=600).raise_for_status()

    dealt = [requested[client::num_clients] for client in range(num_clients)]
    waits = [moments.uniform(0, within) for _ in dealt]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_clients) as clients:
        list(clients.map(ask, dealt, waits))
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--length", type=int, default=200, help="bases of a sequence or prompt")
    parser.add_argument("--new-tokens", type=int, default=50)
    parser.add_argument("--arrive-within", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    print(f"{'':10}{'1 client':>12}{f'{args.clients} at once':>14}{f'{args.clients} by and by':>16}   requests/s")
    for kind in args.kinds:
        alike = work(kind, args.requests, args.length, args.new_tokens)
        mixed = work(kind, args.requests, args.length, args.new_tokens, spread=args.new_tokens - 1)
        seconds(args.url, alike[:2], 1)  # what is made at first use is not counted
        one = seconds(args.url, alike, 1)
        many = seconds(args.url, alike, args.clients)
        later = seconds(args.url, mixed, args.clients, within=args.arrive_within)
        print(f"{kind:10}{len(alike) / one:12.1f}{len(alike) / many:14.1f}{len(mixed) / later:16.1f}")


if __name__ == "__main__":
    main()
