# SPDX-License-Identifier: Apache-2.0
"""Continue DNA sequences, one base at a time, with a trained model."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

PROG = "infer_evo2"

DEFAULT_PROMPT = (
    "|d__Bacteria;p__Pseudomonadota;c__Gammaproteobacteria;o__Enterobacterales;f__Enterobacteriaceae;"
    "g__Escherichia;s__Escherichia|"
)


def build_parser() -> argparse.ArgumentParser:
    """All flags; the defaults of sampling and memory are in the help."""
    parser = groups.Parser(PROG, __doc__)
    checkpoint = parser.add_argument_group("checkpoint")
    checkpoint.add_argument("--ckpt-dir", type=Path, required=True, metavar="DIR", help="Megatron Bridge checkpoint")
    groups.add_base_checkpoint(checkpoint)
    groups.add_self_test(checkpoint)
    _add_prompts(parser)
    _add_sampling(parser)
    _add_memory(parser)
    groups.add_parallel(parser)
    precision = parser.add_argument_group("precision and kernels")
    groups.add_precision(precision)
    groups.add_vortex_style_fp8(precision)
    groups.add_fp8_choice(precision)
    groups.add_kernels(precision)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``infer_evo2``."""
    groups.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    groups.set_up_logging()

    max_seq_length = _given(args.max_seq_length, "EVO2_MAX_SEQ_LEN")
    prefill_chunk = _given(args.prompt_segmentation_threshold, "EVO2_PST")

    from evo2_megatron.tasks.generate import PREFILL_CHUNK, GenerationSettings  # torch loads here, not for --help
    from evo2_megatron.tasks.infer import infer
    from evo2_megatron.tasks.prompts import Prompt, read_prompts
    from evo2_megatron.tasks.sampling import Sampling

    settings = GenerationSettings(
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
        return_log_probs=args.return_log_probs,
        max_batch_size=args.max_batch_size,
        prefill_chunk=PREFILL_CHUNK if prefill_chunk is None else prefill_chunk,
    )
    switches = {
        "vortex_style_fp8": groups.vortex_style_fp8(args),
        "use_subquadratic_ops": groups.use_subquadratic_ops(args),
    }
    infer(
        [Prompt("0", args.prompt)] if args.prompt_file is None else read_prompts(args.prompt_file),
        args.ckpt_dir,
        settings,
        max_seq_length=max_seq_length,
        parallel=groups.parallel(args),
        precision=groups.precision(args),
        base_ckpt_dir=groups.base_checkpoint(args),
        fp8=groups.fp8_choice(args),
        with_self_test=groups.self_test(args),
        provider_overrides={name: value for name, value in switches.items() if value is not None},
        output_file=args.output_file,
        on_record=_show,
    )


def _given(flag: int | None, variable: str) -> int | None:
    """The flag's value, else the environment variable's, else None."""
    text = os.environ.get(variable)
    if flag is not None or not text:
        return flag
    if not text.isdecimal():
        raise UserError(f"environment variable {variable} is {text!r}; set it to a whole number, or unset it")
    logger.info("%s is set: %s", variable, text)
    return int(text)


def _show(record: dict[str, Any]) -> None:
    print(f"=== [{record['id']}] Generated Text ===\n{record['completion']}\n", flush=True)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and output")
    group.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="sequence to continue (default: lineage of E. coli)"
    )
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="JSONL",
        help='used instead: one {"id": "...", "prompt": "..."} per line (default: none)',
    )
    group.add_argument("--output-file", type=Path, metavar="JSONL", help="file for the records (default: none)")
    group.add_argument("--return-log-probs", action="store_true", help="add each new base's log-probability in nat")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=groups.positive_int, default=100, metavar="N", help="bases to add (default: 100)"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0 takes the most probable base (default: 1.0)"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="draw among the N most probable; 0: off (default: 0)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=0.0,
        metavar="X",
        help="draw among the fewest with mass over X; 0: off (default: 0)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="decides, with a prompt's line number, its random numbers (default: 1234)",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("length and memory")
    group.add_argument(
        "--max-seq-length",
        type=groups.positive_int,
        metavar="N",
        help="longest prompt and completion together (default: EVO2_MAX_SEQ_LEN; else what the model was trained for, "
        "if memory allows)",
    )
    group.add_argument(
        "--max-batch-size", type=groups.positive_int, default=1, metavar="N", help="prompts at a time (default: 1)"
    )
    group.add_argument(
        "--prompt-segmentation-threshold",
        type=int,
        metavar="N",
        help="most tokens of a prompt that are processed at once, 0: all; less memory, same result "
        "(default: EVO2_PST, else 2048)",
    )
