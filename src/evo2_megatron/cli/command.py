# SPDX-License-Identifier: Apache-2.0
"""What every command is: its parser, how it logs, how it ends and how an error is shown."""

from __future__ import annotations

import argparse
import difflib
import errno
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from evo2_megatron.config import UserError

_GRACE_SECONDS = 5.0  # time for rank 0 to report an error that all ranks share
_START_SECONDS = 3.0  # that a core needs to start a process, rank 0, too
_OBJECTS_BETWEEN_COLLECTIONS = 20_000  # with Python's 700, an eighth of a command's start goes into them
_interrupted = threading.Event()
_REMEDIES = {
    errno.ENOSPC: "make room, or write somewhere else",
    errno.EACCES: "ask its owner, or choose another",
    errno.ENAMETOOLONG: "choose a shorter one",
}


class Parser(argparse.ArgumentParser):
    """Argument parser without prefix matching that reports a wrong command line on rank 0 only."""

    def __init__(self, prog: str, description: str | None) -> None:
        """``prog``: name of the command. ``description``: shown by ``--help``."""
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.register("type", Path, _path)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """As argparse does; of an unknown flag it names the one that looks most like it."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = next((text.partition("=")[0] for text in unknown if text.startswith("-")), "")
            alike = difflib.get_close_matches(first, self._option_string_actions, n=1, cutoff=0.75)
            hint = f" (did you mean {alike[0]}?)" if alike else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed

    def error(self, message: str) -> None:
        """Exit with status 2, as argparse does, but with one line: a list of all flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the flags\n" if _rank() == 0 else None)


def run(prog: str, main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main(argv)``; show a UserError as ``<prog>: error: <line>`` on stderr and exit with status 2.

    Rank 0 speaks for all. Another rank that fails waits a moment first: were it to exit at once, the launcher would
    end rank 0 before it has spoken. If nobody ended it meanwhile, the fault was its own, and it reports it.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main(argv)
        print(end="", flush=True)  # knows what to do where a shell's >&- has closed it
    except KeyboardInterrupt:
        _end_interrupted(prog)
    except ImportError:
        if not _interrupted.is_set():  # torch, while it loads, makes one of Ctrl-C
            raise
        _end_interrupted(prog)
    except BrokenPipeError:
        _print_no_more()  # who reads it has seen enough
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        _print_no_more()
        name = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"{prog}: error: {name}{error.strerror}; {_REMEDIES[error.errno]}\n")
        sys.exit(2)
    except UserError as error:
        speaker = f"{prog}: error"
        if _rank() != 0:
            # rank 0 has spoken when the launcher ends this one, which then has nothing to add
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            per_core = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / (os.cpu_count() or 1)
            time.sleep(max(_GRACE_SECONDS, _START_SECONDS * per_core))
            speaker += f" on rank {_rank()}"
        sys.stderr.write(f"{speaker}: {error}\n")
        sys.exit(2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _end_interrupted(prog: str) -> None:
    sys.stderr.write(f"{prog}: interrupted\n" if _rank() == 0 else "")
    sys.exit(128 + signal.SIGINT)


def _print_no_more() -> None:
    """Have nothing flushed to where it could not be written when Python ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def clean_up_when_terminated() -> None:
    """Make SIGTERM end the program as Ctrl-C does, so that what it was writing is removed."""
    signal.signal(signal.SIGTERM, _interrupt)


def set_up_logging(*, debug: bool = False) -> None:
    """Send log lines to stderr: ours from INFO up, on rank 0; the libraries' from WARNING up; with ``debug`` all."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    if not debug:
        logging.getLogger("evo2_megatron").setLevel(logging.INFO if _rank() == 0 else logging.ERROR)
        # what libraries tell each other concerns their developers; the variable reaches helper processes
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron|torch")
        warnings.filterwarnings("ignore", message=".*is experimental", category=UserWarning)
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")


def _path(text: str) -> Path:
    """What ``type=Path`` means: of an empty variable of a shell, pathlib would make the current folder.

    A shell leaves ``~`` as it is in ``--flag=~/folder`` and within quotes, and a folder of that name is a trap.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
