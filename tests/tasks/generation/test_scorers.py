# SPDX-License-Identifier: Apache-2.0
import contextlib
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

from evo2_megatron.config import UserError
from evo2_megatron.tasks.generation.scorers import check_scores, open_scorer

SEQUENCES = ["GGCC", "ACGT", "AATT"]
FUNCTION = """
import sys
import helper_beside
from statistics import mean

print("loading says something")

def gc(sequences):
    print("scoring says something")
    return [mean(base in helper_beside.STRONG for base in text) for text in sequences]

def array(sequences):
    import numpy
    return numpy.array([len(text) for text in sequences], dtype=numpy.float32)

def fails(sequences):
    return [1 / 0]

def one_number(sequences):
    return 0.5

def text(sequences):
    return "123"

def huge(sequences):
    return [10**400] * 3

def too_few(sequences):
    return [1]

def nan(sequences):
    return [float("nan")] * len(sequences)

def slow(sequences):
    import time
    time.sleep(60)

def leaves(sequences):
    sys.exit(3)

number = 5
"""
COMMAND = """
import json, os, sys
open("pids", "a").write(f"{os.getpid()}\\n")
for line in sys.stdin:
    print(json.dumps({"scores": [text.count("C") for text in json.loads(line)["sequences"]]}), flush=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scorer.py").write_text(FUNCTION)
    Path("helper_beside.py").write_text("STRONG = 'GC'\n")
    Path("command.py").write_text(COMMAND)
    return tmp_path


def scores(**scorer):
    with open_scorer(**scorer) as score:
        return score(SEQUENCES)


def test_a_function_of_a_file_or_a_module(folder):
    assert scores(function="scorer.py:gc") == [1, 0.5, 0]
    assert scores(function=f"{folder}/scorer.py:array") == [4, 4, 4]
    assert scores(function="scorer:gc") == [1, 0.5, 0]


def test_scores_of_a_function_in_this_process():
    assert check_scores(numpy.array([1, 2], dtype=numpy.float32), 2, "it") == [1, 2]
    assert check_scores((1, numpy.float32(2)), 2, "it") == [1, 2]


def test_a_command_is_started_once(folder):
    with open_scorer(command=f"'{sys.executable}' command.py") as score:
        assert [score(SEQUENCES), score(["CCCC"]), score(["C" * 1_000_000])] == [[2, 1, 0], [4], [1_000_000]]
    (pid,) = map(int, Path("pids").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_line_too_many_is_not_taken_for_the_next_answer(folder):
    twice = "import sys; [print('{\"scores\": [1]}', flush=True) for line in sys.stdin for _ in range(2)]"
    # before the next request, or where the scorer is slow to print it, at the end
    with pytest.raises(UserError, match=r"printed '{\"scores\": \[1\]}.*'; .* and nothing else"):  # noqa: SIM117
        with open_scorer(command=f"{sys.executable} -c {shlex.quote(twice)}") as score:
            for _ in range(3):
                assert score(["A"]) == [1]


def test_answers_too_many_that_come_late(folder):
    late = "import sys; [print('{\"scores\": [1]}', flush=True) for line in sys.stdin]; print('{\"scores\": [1]}')"
    with pytest.raises(UserError, match=r"printed '{\"scores\": \[1\]}.n'; .* and nothing else"):  # noqa: SIM117
        with open_scorer(command=f"{sys.executable} -c {shlex.quote(late)}") as score:
            assert score(["A"]) == [1]
    farewell = late.replace("; print('{\"scores\": [1]}')", "; print('bye')")
    with open_scorer(command=f"{sys.executable} -c {shlex.quote(farewell)}") as score:
        assert score(["A"]) == [1]


def test_too_slow_beside_what_keeps_its_output_open(folder):
    start = time.monotonic()
    command = "sh -c 'setsid sleep 15 & exec sleep 30'"
    with open_scorer(command=command, timeout=0.5) as score, pytest.raises(UserError, match="no answer in 0.5 s"):
        score(["A"])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "function, message",
    [
        ("scorer.py:fails", r"failed: ZeroDivisionError: division by zero \(.*scorer.py, line 17\)"),
        ("scorer.py:one_number", "failed: it gave float, not a list of numbers"),
        ("scorer.py:text", "failed: it gave str, not a list of numbers"),
        ("scorer.py:huge", "failed: it gave list, not a list of numbers .int too large"),
        ("scorer.py:too_few", "gave 1 scores for 3 sequences; it must give one for each"),
        ("scorer.py:nan", "gave nan for sequence 0; a score must be a finite number"),
        ("scorer.py:leaves", "ended with exit status 3 instead of answering"),
        ("scorer.py:number", "failed: scorer.py has no function 'number'; check its name"),
        ("scorer.py:missing", "failed: scorer.py has no function 'missing'"),
        ("nowhere.py:gc", "failed: there is no file nowhere.py; check the path"),
        ("no_such_module:gc", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("scorer.py", "failed: name it as path/to/file.py:function or package.module:function"),
    ],
)
def test_functions_that_do_not_work(folder, function, message):
    with pytest.raises(UserError, match=f"^scorer {re.escape(function)} {message}") as error:
        scores(function=function)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise SystemExit(4)", "ended with exit status 4 instead of answering"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9 instead of answering"),
        ("input(); print('hello')", r"printed 'hello\\n'; for each line it reads it must print one line of JSON"),
        ("input(); print('[1, 2, 3]')", r"printed '\[1, 2, 3\]\\n'; for each line"),
        ("input(); print('{}')", r"answered {}; it must print"),
        ('input(); print(\'{"error": "no\\\\nmodel"}\')', "failed: no model"),
        ("input(); print('{\"scores\": [1, 2]}')", "gave 2 scores for 3 sequences"),
        ("input(); print('{\"scores\": [1, 2, NaN]}')", "gave nan for sequence 2"),
        ("input(); print('{\"scores\": [1, 2, null]}')", "gave None for sequence 2"),
        ("input(); print('{\"scores\": [1, 2, 1' + '0' * 400 + ']}')", "gave 1000+.* for sequence 2; a score"),
        ("input(); print('{\"scores\": 5}')", "gave 5 for 3 sequences; it must give a list of numbers"),
    ],
)
def test_commands_that_do_not_work(folder, code, message):
    Path("bad.py").write_text(code)
    command = f"'{sys.executable}' bad.py"
    with pytest.raises(UserError, match=f"^scorer command {re.escape(repr(command))} {message}") as error:
        scores(command=command)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scorer", [{"function": "scorer.py:slow"}, {"command": "sleep 600"}])
def test_no_answer_in_time(folder, scorer):
    start = time.monotonic()
    with pytest.raises(UserError, match="gave no answer in 3 s; make it faster"):
        scores(**scorer, timeout=3)
    assert time.monotonic() - start < 30


def test_an_interrupted_batch_ends_at_once(folder):
    """A program that does not read: what is written to it would block forever."""
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), open_scorer(command="sleep 600") as score:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        score(["C" * 1_000_000])
    assert time.monotonic() - start < 30


def test_what_cannot_be_started(folder):
    with pytest.raises(UserError, match="cannot be started: No such file or directory; check its name"):
        scores(command="./no_such_program --fast")
    with pytest.raises(UserError, match="cannot be read: No closing quotation; check its quotes"):
        scores(command="python 'x")
    with pytest.raises(UserError, match="the scorer command is empty"):
        scores(command=" ")
    with pytest.raises(UserError, match="timeout is 0; it must be a positive number of seconds"):
        scores(command="cat", timeout=0)


def test_a_program_that_stays_is_killed(folder, monkeypatch):
    monkeypatch.setattr("evo2_megatron.tasks.generation.scorers._ENDING_SECONDS", 0.2)
    Path("stays.py").write_text(COMMAND + "import time; time.sleep(60)\n")
    with contextlib.suppress(UserError), open_scorer(command=f"'{sys.executable}' stays.py") as score:
        score(["C"])
    (pid,) = map(int, Path("pids").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
