# SPDX-License-Identifier: Apache-2.0
"""Strands and alphabets."""

import pytest

from evo2_megatron.data.nucleotides import back_transcribe, complement, reverse_complement, transcribe

# which bases each IUPAC code stands for
CODES = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
PARTNER = {"A": "T", "C": "G", "G": "C", "T": "A"}


@pytest.mark.parametrize("code", CODES)
def test_complement_of_a_code_is_the_code_of_the_partners(code):
    partners = "".join(sorted(PARTNER[base] for base in CODES[code]))
    expected = next(other for other, bases in CODES.items() if bases == partners)

    assert complement(code) == expected
    assert complement(code.lower()) == expected.lower()
    assert complement(code.encode()) == expected.encode()


def test_complement_reads_u_as_t_and_leaves_the_rest():
    assert complement("Uu-.*@#|1") == "Aa-.*@#|1"
    assert complement(bytes(range(128, 256))) == bytes(range(128, 256))


def test_reverse_complement():
    assert reverse_complement("AACgtN") == "NacGTT"
    assert reverse_complement(b"AACgtN") == b"NacGTT"
    assert reverse_complement("") == ""


def test_transcription_in_both_cases():
    assert transcribe("ACGTacgtN") == "ACGUacguN"
    assert back_transcribe(b"ACGUacguN") == b"ACGTacgtN"
