# SPDX-License-Identifier: Apache-2.0
"""Flag groups that the commands which generate share: the model, how bases are drawn, when to stop, what to write.

And what they print of records.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo2_megatron.cli import groups, model_groups
from evo2_megatron.config import UserError

if TYPE_CHECKING:
    from evo2_megatron.tasks.generation.prompts import Prompt
    from evo2_megatron.tasks.generation.records import Record

logger = logging.getLogger(__name__)

FORMATS = ("jsonl", "fasta", "text")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model; of commands that generate, ``running`` reads all but ``--ckpt-dir``."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--ckpt-dir", type=Path, required=True, metavar="DIR", help="checkpoint, or a folder of them")
    groups.add_base_checkpoint(group)
    groups.add_self_test(group)


def add_output(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of the records; ``running`` reads them but for ``--return-log-probs``."""
    group = parser.add_argument_group("output")
    group.add_argument("--output-file", type=Path, metavar="FILE", help="file for the records (default: none)")
    group.add_argument(
        "--output-format",
        choices=FORMATS,
        metavar="NAME",
        help="jsonl, fasta, or text: a table with tabs; without --output-file, print it (default: by the suffix of "
        "--output-file, jsonl if that says nothing)",
    )
    group.add_argument(
        "--include-prompt", action="store_true", help="in FASTA and text, write the prompt before the completion"
    )
    group.add_argument(
        "--return-log-probs",
        action="store_true",
        help="add each new base's log-probability in nat; to FASTA, their sum and mean",
    )
    return group


def add_length(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add ``--max-seq-length``, which ``running`` reads."""
    group = parser.add_argument_group("length and memory")
    group.add_argument(
        "--max-seq-length",
        type=groups.positive_int,
        metavar="N",
        help="longest prompt and completion together (default: EVO2_MAX_SEQ_LEN; else what the model was trained for, "
        "if memory allows)",
    )
    return group


def printer(args: argparse.Namespace, block: Callable[[Record], None]) -> Callable[[Record], None]:
    """What prints a record: in the format that is asked for, unless it is that of a file; else ``block``.

    Raises:
        UserError: A flag is about the records, which go neither to a file nor, in a format, to the terminal.
    """
    flags = {"--include-prompt": args.include_prompt, "--return-log-probs": args.return_log_probs}
    given = " and ".join(flag for flag, value in flags.items() if value)
    if given and args.output_file is None and not args.output_format:
        raise UserError(f"what is printed has no place for {given}; add --output-file, or --output-format")
    if args.output_format and args.output_file is None:
        return _Table(args.output_format, args.include_prompt).show
    return block


class _Table:
    """Prints records in a file's format."""

    def __init__(self, format_name: str, include_prompt: bool) -> None:
        self._format, self._include_prompt = format_name, include_prompt
        self._headless = False

    def show(self, record: Record) -> None:
        from evo2_megatron.tasks.generation.records import write_as

        text = write_as(self._format, [record], include_prompt=self._include_prompt, heading=not self._headless)
        print(text, end="", flush=True)
        self._headless = True


def running(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that ``infer`` and ``guide`` of ``tasks.generation`` share: how the model runs, what is written."""
    return {
        "max_seq_length": given(args.max_seq_length, "EVO2_MAX_SEQ_LEN"),
        "parallel": groups.parallel(args),
        "precision": groups.precision(args),
        "base_ckpt_dir": groups.base_checkpoint(args),
        "fp8": model_groups.fp8_choice(args),
        "with_self_test": groups.self_test(args),
        "provider_overrides": model_groups.provider_overrides(args),
        "output_file": args.output_file,
        "output_format": args.output_format,
        "include_prompt": args.include_prompt,
    }


def prompts(args: argparse.Namespace) -> list[Prompt]:
    """Of ``--prompt-file``, or else ``--prompt`` alone."""
    from evo2_megatron.tasks.generation.prompts import Prompt, read_prompts
    from evo2_megatron.tasks.generation.records import part_of
    from evo2_megatron.tasks.transfer import check_no_input

    if args.prompt_file is None:
        return [Prompt("0", args.prompt)]
    if args.output_file is not None:
        check_no_input((args.output_file, part_of(args.output_file)), [args.prompt_file])
    return read_prompts(args.prompt_file)


def add_prompt_case(parser: argparse._ActionsContainer) -> None:
    """Add ``--keep-prompt-case``, which ``drawing`` reads."""
    parser.add_argument(
        "--keep-prompt-case",
        action="store_true",
        help="show prompts to the model as they are, not in upper case as in training",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``drawing`` reads, with those of ``add_stopping`` and ``add_prompt_case``."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0 takes the most probable base (default: 1.0)"
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="draw among the N most probable; 0: off, 1: the most probable (default: 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=0.0,
        metavar="X",
        help="draw among the fewest with mass X, after --top-k; 0: off (default: 0)",
    )
    group.add_argument(
        "--alphabet",
        type=_letters,
        metavar="LETTERS",
        help="draw only these, such as ACGT; log-probabilities stay the model's own (default: every token)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="of the first sequence; the others' are made from it, and each record has its own (default: 1234)",
    )


def add_stopping(parser: argparse.ArgumentParser, *, max_new_tokens: int = 100) -> None:
    """Add the flags that ``drawing`` reads, with those of ``add_sampling``."""
    group = parser.add_argument_group("stopping")
    group.add_argument(
        "--max-new-tokens",
        type=groups.positive_int,
        default=max_new_tokens,
        metavar="N",
        help=f"bases to add (default: {max_new_tokens})",
    )
    group.add_argument(
        "--stop-string",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a sequence when its new bases hold this, and cut it off; may be given several times (default: none)",
    )
    group.add_argument("--include-stop-string", action="store_true", help="keep the stop string in the result")
    group.add_argument(
        "--stop-at-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end a sequence when the model ends the document; with --no-stop-at-eod, it cannot (default: yes)",
    )


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``GenerationSettings``."""
    from evo2_megatron.tasks.generation.sampling import Sampling

    return {
        "max_new_tokens": args.max_new_tokens,
        "sampling": Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
        "stop_at_eod": args.stop_at_eod,
        "alphabet": args.alphabet or "",
        "stop_strings": tuple(args.stop_string),
        "include_stop_string": args.include_stop_string,
        "keep_prompt_case": args.keep_prompt_case,
    }


def _letters(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("give at least one letter")
    return text


def given(flag: int | None, variable: str) -> int | None:
    """The flag's value, else the environment variable's, else None."""
    text = os.environ.get(variable)
    if flag is not None or not text:
        return flag
    if not text.isdecimal():
        raise UserError(f"environment variable {variable} is {text!r}; set it to a whole number, or unset it")
    logger.info("%s is set: %s", variable, text)
    return int(text)
