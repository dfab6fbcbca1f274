# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from processes import launch


def test_parts_give_what_the_whole_gives():
    launch(Path(__file__).with_name("context_parallel_worker.py"))
