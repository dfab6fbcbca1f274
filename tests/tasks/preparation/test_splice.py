# SPDX-License-Identifier: Apache-2.0
"""Transcripts from a genome: strands, stitching, dialects, order, and what becomes of broken files."""

import gzip
import re

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data import genome
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.tasks.preparation.splice import StitchedSettings, flanks, splice

ONE = "ACGTTGCAacgttgcaNNRYACGATCGATTTACCAGT"
NOT_NUMBERED = "exon numbers are not 1, 2, 3 and so on"
SEVERAL = "on several contigs or strands"
COMPLEMENT_UPPER = str.maketrans("ACGT", "TGCA")
TWO = "GGGTTTCCCAAATTTGGGCC"


def exon(start, end, *, contig="one", strand="+", gene="G", transcript="T", number=1):
    ids = f'gene_id "{gene}"; transcript_id "{transcript}"; exon_number "{number}";'
    return f"{contig}\tsource\texon\t{start}\t{end}\t.\t{strand}\t.\t{ids}\n"


def own_line(start, end, *, contig="one", strand="+", gene="G", transcript="T"):
    ids = f'gene_id "{gene}"; transcript_id "{transcript}";'
    return f"{contig}\tsource\ttranscript\t{start}\t{end}\t.\t{strand}\t.\t{ids}\n"


GOOD = own_line(2, 9) + exon(2, 4) + exon(7, 9, number=2)
GOOD_RECORD = (b"one|G|T", b"CGTCAa")
OTHER = exon(3, 6, contig="two", strand="-", gene="H", transcript="U")
OTHER_RECORD = (b"two|H|U", b"AAAC")


@pytest.fixture
def run(tmp_path):
    """Splice from text; returns the records and the summary, with the problems added."""

    def run(gtf, fasta=f">one first\n{ONE[:10]}\n{ONE[10:]}\n>two\n{TWO}\n", **settings):
        (tmp_path / "genome.fa").write_bytes(fasta if isinstance(fasta, bytes) else fasta.encode())
        (tmp_path / "genes.gtf").write_bytes(gtf if isinstance(gtf, bytes) else gtf.encode())
        problems = []
        paths = [tmp_path / name for name in ("genome.fa", "genes.gtf", "out.fa")]
        summary = splice(*paths, report=problems.append, **settings)
        lines = paths[2].read_bytes().splitlines()
        assert summary.num_transcripts == len(lines) // 2
        assert sum(summary.left_out.values()) == len(problems)
        return list(zip((line[1:] for line in lines[::2]), lines[1::2])), problems

    return run


def test_both_strands(run):
    records, problems = run(
        GOOD + own_line(2, 18, strand="-", transcript="R") + exon(13, 18, strand="-", transcript="R")
        + exon(2, 4, strand="-", transcript="R", number=2)
    )  # fmt: skip

    assert records == [GOOD_RECORD, (b"one|G|R", reverse_complement(ONE[1:4] + ONE[12:18]).encode())]
    assert problems == []


def test_former_complement(run):
    records, _ = run(exon(7, 19, strand="-"), former=True)

    assert records == [(b"one|G|T", b"RNNacgttgcaTG")]


@pytest.mark.parametrize(
    "attributes",
    [
        'gene_id "G"; gene_version "2"; transcript_id "T"; transcript_version "1"; exon_number "{n}"; gene_name "x";',
        'gene_id "G"; transcript_id "T"; gene_type "a b"; transcript_name "T-1"; exon_number {n}; level 2;',
        'gene_id "G"; transcript_id "T"; db_xref "GeneID:1"; product "a; exon_number 7; b"; exon_number "{n}"; ',
        "gene_id G; transcript_id T; exon_number {n};",
        "gene_id G ; transcript_id T ; exon_number {n}",
        'transcript_id "T"; gene_id "G"; exon_number "{n}"',
        'exon_number {n}; note "x "y" z"; transcript_id "T"; gene_id "G";',
        'gene_id "G"; transcript_id "T";',
        'gene_id "G";transcript_id "T";exon_number "{n}";',
        'gene_id "G"; transcript_id "T"; tag; exon_number "{n}"; gene_id "later"; transcript_id "later";',
    ],
)
@pytest.mark.parametrize("strand", "+-")
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_dialects(run, attributes, strand, compress):
    intervals = [(2, 4), (7, 9), (11, 12), (20, 30)]
    lines = [
        f"one\tx\texon\t{start}\t{end}\t.\t{strand}\t.\t" + attributes.format(n=n) + "\n"
        for n, (start, end) in enumerate(intervals[:: 1 if strand == "+" else -1], 1)
    ]
    records, problems = run(compress("".join(lines).encode()))

    forward = "".join(ONE[start - 1 : end] for start, end in intervals)
    assert records == [(b"one|G|T", (forward if strand == "+" else reverse_complement(forward)).encode())]
    assert problems == []


def test_lines_of_transcripts_may_be_interleaved_and_keep_the_order_of_first_mention(run):
    lines = [
        own_line(1, 9, transcript="B"), own_line(3, 12, transcript="A"), exon(3, 4, transcript="A"),
        exon(1, 2, transcript="B"), exon(11, 12, transcript="A", number=2), exon(8, 9, transcript="B", number=2),
    ]  # fmt: skip
    records, problems = run("".join(lines))

    assert records == [(b"one|G|B", b"ACAa"[:2] + ONE[7:9].encode()), (b"one|G|A", (ONE[2:4] + ONE[10:12]).encode())]
    assert problems == []


def test_a_number_before_the_names_does_not_say_whose_exon_is_next(run):
    lines = [exon(2, 4, transcript="A"), exon(3, 5, transcript="B"), exon(7, 9, transcript="A", number=2)]
    turned = [re.sub(r"(.*\t)(.*;) (exon_number .*;)\n", r"\1\3 \2\n", line) for line in lines]
    for some in (lines, turned):
        records, problems = run("".join(some))
        assert records == [(b"one|G|A", (ONE[1:4] + ONE[6:9]).encode()), (b"one|G|B", ONE[2:5].encode())]
        assert problems == []


def test_more_exons_than_numbers_prepared(run):
    fasta = ">one\n" + "ACGTT" * 1200 + "\n"
    records, problems = run("".join(exon(5 * n, 5 * n + 1, number=n) for n in range(1, 1100)), fasta)

    assert records == [(b"one|G|T", b"TA" * 1099)]
    assert problems == []


def test_only_longest_transcript(run):
    lines = [
        exon(1, 3, transcript="short"), exon(1, 5, transcript="long"), exon(2, 6, transcript="as long"),
        exon(1, 99, transcript="too long"), exon(2, 3, gene="H"),
    ]  # fmt: skip
    records, problems = run("".join(lines), only_longest=True)

    assert [name for name, _ in records] == [b"one|G|long", b"one|H|T"]
    assert [problem.kind for problem in problems] == ["past the end of its contig"]


@pytest.mark.parametrize(
    ("strand", "settings", "expected"),
    [
        ("+", {}, (ONE[:11], ONE[11:27], ONE[27:34])),
        ("-", {}, (ONE[1:11], ONE[11:27], ONE[27:])),
        ("+", {"overlap": True}, (ONE[:11], ONE[11:28], ONE[26:34])),
        ("-", {"overlap": True}, (ONE[1:11], ONE[11:28], ONE[26:])),
    ],
)
def test_stitched(run, strand, settings, expected):
    """Exons 4-9, 14-26, 29-32; introns of 4 and 2 bases; a flank of 2 gets half of what is there."""
    intervals = [(4, 9), (14, 26), (29, 32)]
    lines = [exon(*i, strand=strand, number=n) for n, i in enumerate(intervals[:: 1 if strand == "+" else -1], 1)]
    records, _ = run("".join(lines), stitched=StitchedSettings(promoter=30, intron=2, **settings))

    sequence = "@".join(expected)
    assert records == [(b"one|G|T", (sequence if strand == "+" else reverse_complement(sequence)).encode())]


@pytest.mark.parametrize(("gap", "left", "right"), [(0, 0, 0), (1, 1, 0), (2, 1, 1), (5, 3, 2), (8, 4, 4), (9, 4, 4)])
@pytest.mark.parametrize("reverse", [False, True])
def test_flanks_share_a_short_intron(gap, left, right, reverse):
    starts, ends = flanks([100, 110 + gap], [110, 130 + gap], 1000, StitchedSettings(intron=4), reverse=reverse)

    assert ends[0] == 110 + left
    assert starts[1] == 110 + gap - right
    assert (starts[0], ends[1]) == ((96, 1000) if reverse else (0, 134 + gap))


@pytest.mark.parametrize(
    ("strand", "start", "expected"),
    [
        ("+", 14, ONE[11:23]),  # no @, and the first base is lost
        ("+", 2, ONE[18:23]),  # a promoter that would begin before the contig takes the first exon with it
        ("-", 14, ONE[23:16:-1] + "@" + ONE[16:10:-1]),
        ("-", 17, ONE[23:16:-1] + "@" + ONE[19:13:-1]),  # flanks overlap
    ],
)
def test_former_stitching(run, strand, start, expected):
    first, last = exon(start, start + 1 if start > 2 else 15, strand=strand), exon(20, 21, strand=strand, number=2)
    if strand == "-":
        first, last = exon(20, 21, strand="-"), exon(start, start + 1, strand="-", number=2)
    records, _ = run(first + last, former=True, stitched=StitchedSettings(promoter=3, intron=2))

    assert records == [(b"one|G|T", (expected.translate(COMPLEMENT_UPPER) if strand == "-" else expected).encode())]


@pytest.mark.parametrize(
    ("broken", "kinds"),
    [
        ('one source exon 1 5 . + . gene_id "G9";\n', ["broken line"]),
        (exon(1, 5, transcript="X").replace("\t.\t+", " .\t+"), ["broken line", "an exon's line is broken"]),
        (exon(0, 5, transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon(-3, 5, transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon(6, 5, transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon(3, "4_0", transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon(3, "9" * 5000, transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon("9" * 5000, 5, transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon("", 5, transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon(5, 1000, transcript="X"), ["past the end of its contig"]),
        (exon(1, 5, contig="three", transcript="X"), ["contig is not in the FASTA file"]),
        (exon(1, 5, strand="x", transcript="X"), ["strand is not + or -"]),
        (exon(1, 5).replace('transcript_id "T"; ', ""), ["broken line"]),
        (exon(1, 5, transcript=""), ["broken line"]),
        (exon(1, 5, gene=""), ["broken line"]),
        (exon(1, 5).replace('"T"', '"T'), ["broken line"]),
        (exon(1, 5, number="one", transcript="X"), ["broken line", "an exon's line is broken"]),
        (exon(1, 5, transcript="X").replace('r "1"', 'r "1'), ["broken line", "an exon's line is broken"]),
        (own_line(1, 5, transcript="X"), ["no exons"]),
        (own_line(5, 1, transcript="X") + exon(1, 5, transcript="X"), ["broken line", "its own line is broken"]),
        (own_line(1, 5, transcript="X") * 2 + exon(1, 5, transcript="X"), ["described twice"]),
        (own_line(1, 9, transcript="X") + exon(1, 5, transcript="X"), ["exons end elsewhere than its own line says"]),
        (exon(1, 5, transcript="X") + exon(4, 9, transcript="X", number=2), ["exons overlap"]),
        (exon(1, 5, transcript="X") * 2, [NOT_NUMBERED]),
        (exon(1, 5, transcript="X") + exon(8, 9, transcript="X", number=3), [NOT_NUMBERED]),
        (exon(8, 9, transcript="X") + exon(1, 5, transcript="X", number=2), ["exon numbers contradict the positions"]),
        (exon(1, 5, transcript="X") + exon(8, 9, transcript="X", strand="-", number=2), [SEVERAL]),
        (exon(1, 5, transcript="X") + exon(8, 9, transcript="X", contig="two", number=2), [SEVERAL]),
        ("\0\x01\x02\xff\n", ["broken line"]),
    ],
)  # fmt: skip
def test_what_is_broken_is_reported_and_touches_nothing_else(run, broken, kinds):
    records, problems = run(GOOD + broken + OTHER)

    assert records == [GOOD_RECORD, OTHER_RECORD]
    assert [problem.kind for problem in problems] == kinds
    lines = range(4, 4 + broken.count("\n"))
    assert all(problem.line in lines for problem in problems)


@pytest.mark.parametrize(
    "gtf",
    [
        (GOOD + OTHER).replace("\n", "\r\n"),
        "\ufeff" + GOOD + OTHER,
        "\ufeff# comment\n\n#!x\n" + GOOD + "\n \n###\n" + OTHER.rstrip("\n"),
        GOOD + "#" + exon(10, 11, number=3) + "#" + own_line(2, 11) + "#" + own_line(1, 5, transcript="X") + OTHER,
        gzip.compress(GOOD.encode()) + gzip.compress(OTHER.encode()),
        GOOD + OTHER.replace("-", "-").replace("\tsource\t", "\t\t"),
        GOOD + GOOD.replace("\texon\t", "\tCDS\t").replace("\ttranscript\t", "\tgene\t") + OTHER,
    ],
)
def test_harmless_differences(run, gtf):
    records, problems = run(gtf)

    assert records == [GOOD_RECORD, OTHER_RECORD]
    assert problems == []


@pytest.mark.parametrize(
    "lines",
    [
        exon(7, 9, number=1, strand="-") + exon(2, 4, number=2, strand="-"),
        exon(2, 4, number=1, strand="-") + exon(7, 9, number=2, strand="-"),  # as StringTie counts
        exon(2, 4, number=2, strand="-") + exon(7, 9, number=1, strand="-"),  # sorted by position
    ],
)
def test_exon_numbers_on_the_reverse_strand(run, lines):
    records, problems = run(lines)

    assert records == [(b"one|G|T", reverse_complement(ONE[1:4] + ONE[6:9]).encode())]
    assert problems == []


def test_a_strand_of_a_dot_is_forward(run):
    assert run(exon(2, 4, strand=".")) == ([(b"one|G|T", b"CGT")], [])


@pytest.mark.parametrize(
    ("gtf", "fasta", "message"),
    [
        (b"", None, "has no exon or transcript"),
        (b"\n# only comments\n", None, "has no exon or transcript"),
        (bytes(range(256)) * 8000, None, "has no exon or transcript|more than 1048576 bytes"),
        (b"x" * (3 << 20), None, "has a line of more than 1048576 bytes"),
        (GOOD.replace("\n", "\r").encode() * 10_000, None, "has a line of more than"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-9], None, "damaged or cut off"),
        (b"##gff-version 3\none\tx\texon\t1\t5\t.\t+\t.\tID=e1;Parent=T\n", None, "is GFF3, not GTF"),
        (b"one\tx\texon\t1\t5\t.\t+\t.\tID=e1;Parent=T\n", None, "has no exon or transcript"),
        (exon(1, 5, contig="chr1").encode(), None, "its contigs are one, two"),
        (GOOD.encode(), b"", "holds no FASTA records"),
        (GOOD.encode(), b"ACGT\n", "is not FASTA"),
        (GOOD.encode(), b">one\nAC\n>one\nAC\n", "two records are named 'one'"),
        (GOOD.encode(), b">one\nAC\n>\nAC\n", "a record has no name"),
        (GOOD.encode(), gzip.compress(b">one\n" + ONE.encode(), mtime=0)[:-9], "damaged or cut off"),
        (GOOD.encode(), b">one\n", "1 past the end of its contig"),
    ],
)
def test_files_that_cannot_be_used(run, tmp_path, gtf, fasta, message):
    with pytest.raises(UserError, match=message):
        run(gtf, **({} if fasta is None else {"fasta": fasta}))
    assert not list(tmp_path.glob("*out.fa*"))


def test_paths_that_cannot_be_used(run, tmp_path):
    run(GOOD)
    fasta, gtf = tmp_path / "genome.fa", tmp_path / "genes.gtf"
    with pytest.raises(UserError, match="no such GTF file"):
        splice(fasta, tmp_path / "none.gtf", tmp_path / "new.fa")
    with pytest.raises(UserError, match="no such FASTA file"):
        splice(tmp_path / "none.fa", gtf, tmp_path / "new.fa")
    with pytest.raises(UserError, match="is an input"):
        splice(fasta, gtf, fasta)
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        splice(fasta, gtf, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genes.gtf", "genome.fa", "out.fa"]


def test_a_transcript_longer_than_what_is_read_at_once(run, monkeypatch):
    monkeypatch.setattr("evo2_megatron.tasks.preparation.splice._LONGEST_SPAN", 5)
    monkeypatch.setattr(genome, "BLOCK_BYTES", 4)

    assert run(GOOD + OTHER) == ([GOOD_RECORD, OTHER_RECORD], [])
