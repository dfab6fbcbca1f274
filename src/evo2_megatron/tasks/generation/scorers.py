# SPDX-License-Identifier: Apache-2.0
"""Ask a scorer of the user's how good sequences are: a program, or a Python function in a process of its own.

The program is started once. For each batch it reads one line of JSON, ``{"sequences": ["ACGT", ...]}``, and prints
one, ``{"scores": [0.5, ...]}``: a finite number for each sequence, higher is better; or ``{"error": "why"}``. It ends
when its input ends. What it writes to stderr is shown as it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from numbers import Real
from typing import Any

from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed

Score = Callable[[list[str]], Sequence[float]]
"""Gives one number for each sequence, higher is better."""

TIMEOUT = 600.0
"""Seconds that a scorer may take for a batch, and a Python scorer to load, unless told otherwise."""

_ENDING_SECONDS = 5.0  # for a program to end by itself when its input has ended


def check_scores(scores: Any, count: int, name: str) -> list[float]:
    """The scores as floats; UserError unless they are ``count`` finite numbers."""
    if hasattr(scores, "tolist"):  # an array or a tensor
        scores = scores.tolist()
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise UserError(f"{name} gave {_short(scores)} for {count} sequences; it must give a list of numbers")
    if len(scores) != count:
        raise UserError(f"{name} gave {len(scores)} scores for {count} sequences; it must give one for each")
    for number, score in enumerate(scores):
        if not isinstance(score, Real) or not _is_finite(score):
            raise UserError(f"{name} gave {_short(score)} for sequence {number}; a score must be a finite number")
    return [float(score) for score in scores]


def _is_finite(score: Real) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # a whole number beyond any float
        return False


@contextlib.contextmanager
def open_scorer(
    *, function: str | None = None, command: str | None = None, timeout: float = TIMEOUT
) -> Iterator[Score]:
    """Start the scorer that a command line names, on rank 0; it ends with the block.

    Args:
        function: ``path/to/file.py:name`` or ``package.module:name``, called with a list of strings. This or
            ``command``.
        command: Program and arguments, divided as a shell does; no shell runs.
        timeout: Seconds for one batch.

    Yields:
        What calls it. On other ranks, what must not be called.

    Raises:
        UserError: It cannot be started or loaded.
    """
    if not 0 < timeout < math.inf:
        raise UserError(f"the scorer's timeout is {timeout}; it must be a positive number of seconds")
    if distributed.rank() != 0:
        yield _elsewhere
        return
    if function is not None:
        argv = [sys.executable, "-m", "evo2_megatron.tasks.generation.scorer_child", function]
        name = f"scorer {function}"
    else:
        argv, name = _words(command or ""), f"scorer command {command!r}"
    with ScorerProcess(argv, name=name, timeout=timeout) as scorer:
        if function is not None:
            scorer.wait_until_ready()
        yield scorer


class ScorerProcess:
    """A program that scores batches; a context manager that ends it."""

    def __init__(self, argv: Sequence[str], *, name: str, timeout: float = TIMEOUT) -> None:
        """Start it; UserError if that cannot be.

        ``name``: what error messages call it. ``timeout``: seconds for one batch.
        """
        self._name, self._timeout = name, timeout
        try:
            # a session of its own: Ctrl-C is for us to handle, and what it starts ends with it
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{name} cannot be started: {error.strerror}; check its name and path") from error
        # a pipe can block in both directions, which only another thread can give up on
        self._thread = ThreadPoolExecutor(1)
        self._exchanging: Future[str] | None = None

    def __call__(self, sequences: list[str]) -> list[float]:
        """Scores of a batch.

        Raises:
            UserError: There is no answer in time, the program has ended, or its answer is no list of scores.
        """
        answer = self._ask(json.dumps({"sequences": sequences}) + "\n")
        if "scores" not in answer:
            raise UserError(f'{self._name} answered {_short(answer)}; it must print {{"scores": [...]}}')
        return check_scores(answer["scores"], len(sequences), self._name)

    def wait_until_ready(self) -> None:
        """Wait for the line that a program may print first; UserError as for a call."""
        self._ask("")

    def _ask(self, request: str) -> dict[str, Any]:
        try:
            self._exchanging = self._thread.submit(self._exchange, request)
            line = self._exchanging.result(self._timeout)
        except FuturesTimeoutError:
            self._kill()
            raise UserError(
                f"{self._name} gave no answer in {self._timeout:g} s; make it faster, lower --beams or --samples, or "
                "raise --scorer-timeout"
            ) from None
        if not line:
            raise UserError(
                f'{self._name} {self._how_it_ended()}; try it by hand with the line {{"sequences": ["A"]}}'
            )
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(
                f"{self._name} printed {_short(line)}; for each line it reads it must print one line of JSON, "
                '{"scores": [...]}, and nothing else'
            )
        if "error" in answer:
            raise UserError(f"{self._name} failed: {' '.join(str(answer['error']).split())}")
        return answer

    def _exchange(self, request: str) -> str:
        # a program that has ended takes nothing, and says so by the end of its output
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request)
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output instead of answering"
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return f"{how} instead of answering"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> ScorerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End its input, wait a moment, and kill what is left; at once if it was interrupted at work."""
        if self._exchanging is not None and not self._exchanging.done():
            self._kill()
        self._thread.shutdown()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        self._kill()
        self._process.stdout.close()


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"scorer command {command!r} cannot be read: {error}; check its quotes") from None
    if not words:
        raise UserError("the scorer command is empty; give a program and its arguments")
    return words


def _elsewhere(sequences: list[str]) -> list[float]:
    raise AssertionError("only rank 0 has the scorer")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
