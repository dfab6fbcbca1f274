# SPDX-License-Identifier: Apache-2.0
"""A Python function as a program that scores: the process that ``scorers.open_scorer`` starts for it.

It prints ``{"ready": true}`` when the function is loaded, then follows the protocol of ``scorers``. An exception
becomes ``{"error": ...}`` with the place where it was raised, and ends the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from evo2_megatron.config import UserError


def load_function(spec: str) -> Callable[[list[str]], Any]:
    """The function that ``path/to/file.py:name`` or ``package.module:name`` means; UserError if there is none.

    Modules beside the file, or else in the current folder, can be imported.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise UserError("name it as path/to/file.py:function or package.module:function")
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise UserError(f"there is no file {where}; check the path")
        sys.path.insert(0, str(path.parent))
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[path.stem] = module
        module_spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{where} has no function {name!r}; check its name")
    return function


def numbers(scores: Any) -> list[float]:
    """Floats of a list, an array or a tensor; UserError if it is none of them."""
    if isinstance(scores, (str, bytes, dict, set, frozenset)):  # their items would be taken for scores
        raise UserError(f"it gave {type(scores).__name__}, not a list of numbers")
    try:
        return [float(score) for score in scores]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"it gave {type(scores).__name__}, not a list of numbers ({error})") from error


def reason(error: BaseException, trace: TracebackType | None) -> str:
    """An exception in one line, and where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(trace)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def main() -> None:
    """Score until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # what the function prints must not come between the answers
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    sys.excepthook = lambda kind, error, trace: reply({"error": reason(error, trace)})
    function = load_function(sys.argv[1])
    reply({"ready": True})
    for line in sys.stdin:
        reply({"scores": numbers(function(json.loads(line)["sequences"]))})


if __name__ == "__main__":
    main()
