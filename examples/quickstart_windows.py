# SPDX-License-Identifier: Apache-2.0
"""Write the documents of a preprocessed dataset, without their reverse complements, as FASTA.

Usage: python quickstart_windows.py DATASET_PREFIX OUTPUT.fa
"""

import sys
from pathlib import Path


def read_documents(prefix: Path | str) -> list[str]:
    """Documents of ``PREFIX.bin`` as preprocess_evo2 writes them by default: a byte per base, a zero after each."""
    return [document.decode("ascii") for document in Path(f"{prefix}.bin").read_bytes().split(b"\0")[:-1]]


def main(prefix: str, output: str) -> None:
    """Write every other document: with ``embed_reverse_complement`` each is followed by its other strand."""
    windows = read_documents(prefix)[::2]
    Path(output).write_text("".join(f">window_{number}\n{bases}\n" for number, bases in enumerate(windows, 1)))
    print(f"{len(windows)} held-out windows, {sum(map(len, windows))} bases, in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
