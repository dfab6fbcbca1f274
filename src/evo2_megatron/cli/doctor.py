# SPDX-License-Identifier: Apache-2.0
"""Say what is installed, what of it is used, what is missing, and the command that mends it.

The smallest model is run and its logits are compared with a slow reference. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evo2_megatron.cli import command

if TYPE_CHECKING:
    from evo2_megatron.tasks.doctor import Finding

PROG = "evo2_doctor"


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead, to attach to a report")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``evo2_doctor``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)

    from evo2_megatron.tasks.doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        _show(findings)
    if any(finding.status == "problem" for finding in findings):
        sys.exit(1)


def _show(findings: list[Finding]) -> None:
    topics = dict.fromkeys(finding.topic for finding in findings)
    for topic in topics:
        print(topic)
        for finding in findings:
            if finding.topic == topic:
                print(f"  {finding.status:8} {finding.name:20} {finding.text}")
                if finding.fix:
                    print(f"  {'':8} {'':20} mend it: {finding.fix}")
    num_problems = sum(finding.status == "problem" for finding in findings)
    print(f"{num_problems} problem{'s'[: num_problems != 1]}" if num_problems else "no problems")


if __name__ == "__main__":
    main()
