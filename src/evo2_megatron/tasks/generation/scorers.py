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
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed

Score = Callable[[list[str]], Sequence[float]]
"""Gives one number for each sequence, higher is better."""

TIMEOUT = 600.0
"""Seconds that a scorer may take for a batch, and a Python scorer to load, unless told otherwise."""

_PIPE_BYTES = 1 << 16
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
                argv, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{name} cannot be started: {error.strerror}; check its name and path") from error
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._printed = b""  # not read as an answer yet
        self._is_asked = False

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
        if request:
            self._check_silent()
        self._is_asked = True
        line = self._exchange(memoryview(request.encode()))
        self._is_asked = False
        if not line:
            raise UserError(
                f'{self._name} {self._how_it_ended()}; try it by hand with the line {{"sequences": ["A"]}}'
            )
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._no_answer(line)
        if "error" in answer:
            raise UserError(f"{self._name} failed: {' '.join(str(answer['error']).split())}")
        self._check_silent()
        return answer

    def _check_silent(self) -> None:
        """UserError if there is output beside the answers, of which the next request would take one for its own."""
        if not self._printed:
            self._printed = self._process.stdout.read() or b""
        if self._printed:
            raise self._no_answer(self._printed)

    def _no_answer(self, printed: bytes) -> UserError:
        return UserError(
            f"{self._name} printed {_short(printed.decode(errors='replace'))}; for each line it reads it must print "
            'one line of JSON, {"scores": [...]}, and nothing else'
        )

    def _exchange(self, request: memoryview) -> bytes:
        """Write a request and read a line, either as far as the pipe takes or has it; nothing if output has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        until = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as pipes:
            pipes.register(stdout, selectors.EVENT_READ)
            if request:
                pipes.register(stdin, selectors.EVENT_WRITE)
            while request or b"\n" not in self._printed:
                ready = pipes.select(max(until - time.monotonic(), 0))
                if not ready:
                    self._kill()
                    raise UserError(
                        f"{self._name} gave no answer in {self._timeout:g} s; make it faster, lower --beams or "
                        "--samples, or raise --scorer-timeout"
                    )
                if any(key.fileobj is stdin for key, _ in ready):
                    try:
                        request = request[stdin.write(request) or 0 :]
                    except BrokenPipeError:  # a program that has ended says so by the end of its output
                        request = request[:0]
                    if not request:
                        pipes.unregister(stdin)
                elif not (printed := stdout.read(_PIPE_BYTES)):
                    break
                else:
                    self._printed += printed
        line, newline, self._printed = self._printed.partition(b"\n")
        return line + newline

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

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """End its input, wait a moment, and kill what is left; at once if it was interrupted at work.

        Raises:
            UserError: It gave more answers than it was asked for, of which earlier requests may have taken one each.
        """
        if self._is_asked:
            self._kill()
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        self._kill()
        self._printed += self._process.stdout.read() or b""
        self._process.stdout.close()
        if error is None and b'"scores"' in self._printed:
            raise self._no_answer(self._printed)


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
