# SPDX-License-Identifier: Apache-2.0
"""Continue DNA sequences, one base at a time, with a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo2_megatron.cli import command, generation_groups, groups, launch_groups, model_groups
from evo2_megatron.config import UserError

if TYPE_CHECKING:
    from evo2_megatron.tasks.generation.generate import GenerationSettings
    from evo2_megatron.tasks.generation.infer import Piece

PROG = "infer_evo2"

DEFAULT_PROMPT = (
    "|d__Bacteria;p__Pseudomonadota;c__Gammaproteobacteria;o__Enterobacterales;f__Enterobacteriaceae;"
    "g__Escherichia;s__Escherichia|"
)


LINE_BASES = 60
"""Of each line that ``--stream`` prints of several sequences."""


def build_parser() -> argparse.ArgumentParser:
    """All flags; the defaults of sampling and memory are in the help."""
    parser = command.Parser(PROG, __doc__)
    generation_groups.add_checkpoint(parser)
    _add_prompts(parser)
    _add_output(parser)
    generation_groups.add_sampling(parser)
    generation_groups.add_stopping(parser)
    _add_memory(parser)
    groups.add_parallel(parser)
    launch_groups.add_devices(parser, divides=True)
    model_groups.add_precision_and_kernels(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``infer_evo2``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    if launch_groups.model_on_devices(args, argv, parallel=groups.parallel(args)):
        return
    command.clean_up_when_terminated()
    if args.stream and args.output_format and args.output_file is None:
        raise UserError("--stream prints bases as they come, not --output-format; give --output-file for the records")

    from evo2_megatron.tasks.generation.infer import infer  # torch loads here, not for --help

    prompts = generation_groups.prompts(args)
    printer: dict[str, Any] = {"on_record": generation_groups.printer(args, _show)}
    if args.stream:
        one = len(prompts) * args.num_samples == 1
        printer = {"on_piece": (_StreamOfOne(prompts[0].id) if one else _StreamOfMany()).show}
    infer(
        prompts,
        args.ckpt_dir,
        _settings(args),
        num_samples=args.num_samples,
        **generation_groups.running(args),
        **printer,
    )


def _settings(args: argparse.Namespace) -> GenerationSettings:
    from evo2_megatron.tasks.generation.generate import PREFILL_CHUNK, GenerationSettings

    prefill_chunk = generation_groups.given(args.prompt_segmentation_threshold, "EVO2_PST")
    return GenerationSettings(
        **generation_groups.drawing(args),
        return_log_probs=args.return_log_probs,
        max_batch_size=args.max_batch_size,
        prefill_chunk=PREFILL_CHUNK if prefill_chunk is None else prefill_chunk,
        cuda_graphs=args.cuda_graphs,
    )


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _show(record: dict[str, Any]) -> None:
    name = record["id"] if "sample" not in record else f"{record['id']}.{record['sample']}"
    _print(f"=== [{name}] Generated Text ===\n{record['completion']}\n\n")


class _StreamOfOne:
    """Prints the only sequence as it grows; what is there in the end is what ``_show`` prints."""

    def __init__(self, prompt_id: str) -> None:
        self._heading = f"=== [{prompt_id}] Generated Text ===\n"

    def show(self, piece: Piece) -> None:
        _print(self._heading + piece.text + ("\n\n" if piece.finish_reason else ""))
        self._heading = ""


class _StreamOfMany:
    """Prints lines of several sequences that grow together: name, tab, the next bases."""

    def __init__(self) -> None:
        self._waiting: dict[int, str] = {}

    def show(self, piece: Piece) -> None:
        name = piece.id if piece.sample is None else f"{piece.id}.{piece.sample}"
        text = self._waiting.pop(piece.number, "") + piece.text
        while len(text) >= LINE_BASES or (text and piece.finish_reason):
            _print(f"{name}\t{text[:LINE_BASES]}\n")
            text = text[LINE_BASES:]
        if text:
            self._waiting[piece.number] = text


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="sequence to continue (default: lineage of E. coli)"
    )
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help='used instead, plain or gzip: FASTA; JSON Lines with {"id": "...", "prompt": "...", "seed": 1}, of which '
        "only prompt must be; or text with one prompt per line (default: none)",
    )
    generation_groups.add_prompt_case(group)
    group.add_argument(
        "--num-samples",
        type=groups.positive_int,
        default=1,
        metavar="N",
        help="continuations of each prompt, each with its own seed (default: 1)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = generation_groups.add_output(parser)
    group.add_argument(
        "--stream",
        action="store_true",
        help="print bases as they are made; of several sequences, in lines with the id before them",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = generation_groups.add_length(parser)
    group.add_argument(
        "--max-batch-size", type=groups.positive_int, default=1, metavar="N", help="sequences at a time (default: 1)"
    )
    group.add_argument(
        "--prompt-segmentation-threshold",
        type=groups.non_negative_int,
        metavar="N",
        help="most tokens of a prompt that are processed at once, 0: all; less memory, same result "
        "(default: EVO2_PST, else 2048)",
    )
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="launch the kernels of a new token together: faster where a GPU waits for its host; one GPU per model",
    )


if __name__ == "__main__":
    main()
