# SPDX-License-Identifier: Apache-2.0
"""Generate sequences that a scorer of yours rates high: draw chunks, keep the best, go on from there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo2_megatron.cli import command, generation_groups, groups, launch_groups, model_groups

if TYPE_CHECKING:
    from evo2_megatron.tasks.generation.generate import GenerationSettings

PROG = "evo2_guide"
SCORER_SECONDS = 600.0
BEAMS, SAMPLES, CHUNK = 2, 8, 128
MAX_NEW_TOKENS = 1024


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = command.Parser(PROG, __doc__)
    generation_groups.add_checkpoint(parser)
    _add_prompts(parser)
    _add_scorer(parser)
    _add_search(parser)
    generation_groups.add_sampling(parser)
    generation_groups.add_stopping(parser, max_new_tokens=MAX_NEW_TOKENS)
    generation_groups.add_output(parser)
    _add_memory(parser)
    groups.add_parallel(parser)
    launch_groups.add_devices(parser, divides=True)
    model_groups.add_precision_and_kernels(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``evo2_guide``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    if launch_groups.model_on_devices(args, argv, parallel=groups.parallel(args), copies=False):
        return
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.generation.guide import guide  # torch loads here, not for --help
    from evo2_megatron.tasks.generation.guided import SearchSettings
    from evo2_megatron.tasks.generation.scorers import open_scorer

    prompts = generation_groups.prompts(args)
    search = SearchSettings(beams=args.beams, samples=args.samples, chunk=args.chunk_length, score_of=args.score_of)
    with open_scorer(function=args.scorer, command=args.scorer_command, timeout=args.scorer_timeout) as score:
        guide(
            prompts,
            args.ckpt_dir,
            _settings(args, width=search.width),
            search,
            score,
            **generation_groups.running(args),
            on_record=generation_groups.printer(args, _show),
        )


def _settings(args: argparse.Namespace, *, width: int) -> GenerationSettings:
    from evo2_megatron.tasks.generation.generate import GenerationSettings

    return GenerationSettings(
        **generation_groups.drawing(args),
        return_log_probs=args.return_log_probs,
        max_batch_size=args.max_batch_size or width,
    )


def _show(record: dict[str, Any]) -> None:
    mean = record["log_prob_mean"]
    likely = "" if mean is None else f", mean log-probability {mean:.6g}"
    heading = f"=== [{record['id']}.{record['sample']}] score {record['score']:.6g}{likely} ==="
    print(f"{heading}\n{record['completion']}\n", flush=True)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    group = prompts.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="sequence to start from (default: none)")
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="instead: FASTA, JSON Lines or text, as for infer_evo2; each prompt is a search (default: none)",
    )
    generation_groups.add_prompt_case(prompts)


def _add_scorer(parser: argparse.ArgumentParser) -> None:
    scorer = parser.add_argument_group("scorer")
    group = scorer.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--scorer",
        metavar="FILE.py:NAME",
        help="Python function, or package.module:NAME; it gets a list of strings and returns one number for each, "
        "higher is better (default: none)",
    )
    group.add_argument(
        "--scorer-command",
        metavar="COMMAND",
        help='instead: a program, started once; for each line {"sequences": ["ACGT", ...]} that it reads it prints '
        'one, {"scores": [0.5, ...]} (default: none)',
    )
    scorer.add_argument(
        "--score-of",
        choices=("sequence", "completion"),
        default="sequence",
        metavar="WHAT",
        help="what the scorer gets: sequence, the prompt with all new bases; or completion, the new bases alone "
        "(default: sequence)",
    )
    scorer.add_argument(
        "--scorer-timeout",
        type=float,
        default=SCORER_SECONDS,
        metavar="SECONDS",
        help=f"that the scorer may take for a round (default: {SCORER_SECONDS:g})",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    sizes = {
        "--beams": (BEAMS, "sequences that go on after each round, and results"),
        "--samples": (SAMPLES, "continuations of each in a round; more find better scores"),
        "--chunk-length": (CHUNK, "bases that a round adds"),
    }
    for flag, (default, meaning) in sizes.items():
        group.add_argument(
            flag, type=groups.positive_int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = generation_groups.add_length(parser)
    group.add_argument(
        "--max-batch-size",
        type=groups.positive_int,
        metavar="N",
        help="continuations at a time; less memory, same result (default: all of a round)",
    )


if __name__ == "__main__":
    main()
