# SPDX-License-Identifier: Apache-2.0
"""FASTA to indexed datasets, read back byte by byte."""

import gzip
import random
from pathlib import Path

import pytest

from bgzip import bgzip
from documents import read_back
from evo2_megatron.config import UserError
from evo2_megatron.data import documents as task
from evo2_megatron.data.indexed_dataset import IndexedDatasetWriter
from evo2_megatron.data.lineage import Lineage
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.preprocess_config import PreprocessConfig
from evo2_megatron.data.tokenizer import tokenizer_dir
from evo2_megatron.tasks.preparation.preprocess import check, count, preprocess

LAMBDA = Path(__file__).parents[3] / "examples" / "data" / "lambda_phage.fa"
ALL_TRAIN = {"train_split": 1.0, "valid_split": 0.0, "test_split": 0.0}
ENDINGS = [f"{split}{ending}" for split in ("test", "train", "val") for ending in (".bin", ".idx")]


def write_fasta(path, records):
    path.write_text("".join(f">{name} x\n{text[:7]}\n{text[7:]}\n" for name, text in records.items()))
    return str(path)


def run(tmp_path, datapaths, **settings):
    """Documents by split, as text where they are bytes."""
    config = PreprocessConfig(datapaths=datapaths, output_dir=str(tmp_path / "out"), output_prefix="x", **settings)
    summary = preprocess(config)
    documents = {split: list(map(bytes, read_back(prefix))) for split, prefix in config.output_prefixes.items()}
    assert summary.num_documents == {split: len(texts) for split, texts in documents.items()}
    assert summary.num_tokens == {split: sum(map(len, texts)) for split, texts in documents.items()}
    dry = count(config)
    assert dry._replace(seconds=0) == summary._replace(seconds=0)
    return documents


@pytest.fixture
def fasta(tmp_path):
    return write_fasta(tmp_path / "a.fa", {"one": "ACGTacgtNNnRYu", "two": "TTTTTTTTGA"})


def test_documents_are_the_records(tmp_path, fasta):
    assert run(tmp_path, [fasta], **ALL_TRAIN) == {
        "train": [b"ACGTacgtNNnRYu\0", b"TTTTTTTTGA\0"], "val": [], "test": [],
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"x_nucleotide_fast_tokenizer_256_{ending}" for ending in ENDINGS
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"append_eod": False}, [b"ACGTacgtNNnRYu", b"TTTTTTTTGA"]),
        ({"force_uppercase": True}, [b"ACGTACGTNNNRYU\0", b"TTTTTTTTGA\0"]),
        ({"transcribe": "transcribe"}, [b"ACGUacguNNnRYu\0", b"UUUUUUUUGA\0"]),
        ({"transcribe": "back_transcribe"}, [b"ACGTacgtNNnRYt\0", b"TTTTTTTTGA\0"]),
        ({"nnn_filter": True}, [b"TTTTTTTTGA\0"]),
        ({"enforce_sample_length": 16}, [b"ACGTacgtNNnRYu\0\1", b"TTTTTTTTGA\0\1\1\1\1\1"]),
        ({"random_reverse_complement": 1.0}, [b"aRYnNNacgtACGT\0", b"TCAAAAAAAA\0"]),
        (
            {"embed_reverse_complement": True},
            [b"ACGTacgtNNnRYu\0", b"aRYnNNacgtACGT\0", b"TTTTTTTTGA\0", b"TCAAAAAAAA\0"],
        ),
        (
            {"embed_reverse_complement": True, "random_reverse_complement": 1.0, "transcribe": "transcribe"},
            [b"aRYnNNacguACGU\0", b"ACGUacguNNnRYu\0", b"UCAAAAAAAA\0", b"UUUUUUUUGA\0"],
        ),
        ({"split_window_length": 6}, [b"ACGTac\0", b"gtNNnR\0", b"Yu\0", b"TTTTTT\0", b"TTGA\0"]),
        ({"split_window_length": 6, "nnn_filter": True}, [b"ACGTac\0", b"Yu\0", b"TTTTTT\0", b"TTGA\0"]),
    ],
)
def test_options(tmp_path, fasta, settings, expected):
    assert run(tmp_path, [fasta], **ALL_TRAIN, **settings)["train"] == expected


@pytest.mark.parametrize(
    ("text", "skipped"), [("A" * 62 + "NNnA", True), ("A" * 63 + "nNNA", True), ("A" * 62 + "NNANA", False)]
)
def test_nnn_filter_sees_across_blocks(tmp_path, monkeypatch, text, skipped):
    monkeypatch.setattr(task, "BLOCK_BYTES", 64)
    fasta = write_fasta(tmp_path / "a.fa", {"a": text, "b": "C"})

    assert len(run(tmp_path, [fasta], nnn_filter=True, **ALL_TRAIN)["train"]) == 2 - skipped


def test_random_reverse_complement_follows_its_probability(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {f"r{i}": "AAAC" for i in range(1000)})
    documents = run(tmp_path, [fasta], random_reverse_complement=0.3, append_eod=False, **ALL_TRAIN)["train"]

    assert documents.count(b"GTTT") == pytest.approx(300, abs=45)
    assert documents.count(b"GTTT") + documents.count(b"AAAC") == 1000


def test_lineage_tags_repeat(tmp_path, fasta):
    tag = Lineage(domain="Bacteria").tag()
    documents = run(
        tmp_path, [fasta], taxonomy_data={"wo": Lineage(domain="Bacteria"), "t": Lineage()},
        prompt_spacer_length=len(tag) + 4, embed_reverse_complement=True, force_uppercase=True, **ALL_TRAIN,
    )["train"]  # fmt: skip

    assert documents[:2] == [b"ACGTACGTNNNRYU\0", b"ARYNNNACGTACGT\0"]
    assert documents[2] == f"{tag}TTTT{tag}TTTT{tag}GA\0".encode()
    assert documents[3] == f"{tag}TCAA{tag}AAAA{tag}AA\0".encode()


def test_a_lineage_that_no_record_has_is_told(tmp_path, fasta):
    lineages = {"tow": Lineage(domain="Bacteria"), "t": Lineage(), "two": Lineage()}  # "t" comes first for "two"
    config = PreprocessConfig(datapaths=[fasta], output_dir=str(tmp_path), taxonomy_data=lineages, **ALL_TRAIN)
    for summary in (count(config), preprocess(config)):
        (note,) = (note for note in summary.notes if "taxonomy" in note)
        assert note.startswith("a.fa: 2 of 3 keys of taxonomy_data gave no record a tag, such as 'tow', 'two': the")


def test_dtype_too_small_for_a_tag(tmp_path, fasta):
    settings = {
        "datapaths": [fasta], "output_dir": str(tmp_path), "taxonomy_data": {"one": Lineage(genus="\u0100")},
        "hf_tokenizer_model_path": str(tokenizer_dir(512)),
    } | ALL_TRAIN  # fmt: skip
    with pytest.raises(UserError, match="uint8 cannot hold token id 256"):
        preprocess(PreprocessConfig(**settings))
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]

    config = PreprocessConfig(**settings, indexed_dataset_dtype="uint16")
    preprocess(config)
    assert 256 in read_back(config.output_prefixes["train"], "H")[0]
    assert config.output_prefixes["train"].name == "nucleotide_fast_tokenizer_512_train"


@pytest.mark.parametrize("num_bases", [1, 127, 128, 129, 1000, 1009])
@pytest.mark.parametrize("window", [None, 127, 128])
def test_long_records_do_not_depend_on_blocks_or_memory(tmp_path, monkeypatch, num_bases, window):
    sequence = "".join(random.Random(num_bases).choices("ACGTacgtN", k=num_bases))
    path = write_fasta(tmp_path / "a.fa", {"a": sequence, "b": sequence[::-1], "c": "ACGT"})
    settings = {"embed_reverse_complement": True, "nnn_filter": True, "split_window_length": window} | ALL_TRAIN
    whole = run(tmp_path, [path], **settings)["train"]
    monkeypatch.setattr(task, "BLOCK_BYTES", 64)
    monkeypatch.setattr(task, "_MEMORY_BYTES", 100)
    monkeypatch.setattr("evo2_megatron.data.fasta.BLOCK_BYTES", 50)

    assert run(tmp_path, [path], **settings)["train"] == whole
    pieces = [
        text[at : at + (window or len(text))]
        for text in (sequence, sequence[::-1], "ACGT")
        for at in range(0, len(text), window or len(text))
    ]
    kept = [piece for piece in pieces if "NNN" not in piece.upper()]
    expected = [strand.encode() + b"\0" for piece in kept for strand in (piece, reverse_complement(piece))]
    assert whole == expected


def test_windows_of_one_genome_make_three_splits_without_leaks(tmp_path):
    settings = {"split_window_length": 2048, "embed_reverse_complement": True, "seed": 1}
    documents = run(tmp_path, [str(LAMBDA)], **settings)
    genome = "".join(line.strip() for line in LAMBDA.read_text().splitlines()[1:])

    assert sum(map(len, documents.values())) == 48
    covered = set()
    for texts in documents.values():
        assert texts
        for forward, backward in zip(texts[::2], texts[1::2], strict=True):  # both strands, in the same split
            assert reverse_complement(forward[:-1]) == backward[:-1]
            at = genome.index(forward[:-1].decode())
            assert at % 2048 == 0 and at not in covered
            covered.add(at)
    assert len(covered) == 24
    assert run(tmp_path, [str(LAMBDA)], **settings) == documents
    assert run(tmp_path, [str(LAMBDA)], **settings | {"seed": 2}) != documents


def test_splits_follow_seed_only(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {f"r{i}": f"ACGT{'A' * i}" for i in range(60)})
    first = run(tmp_path, [fasta], seed=3)

    assert all(first.values())
    assert run(tmp_path, [fasta], seed=3) == first
    assert run(tmp_path, [fasta], seed=4) != first
    assert run(tmp_path, [fasta]) == run(tmp_path, [fasta], seed=0)
    # a strand option changes the text, not the split
    both = run(tmp_path, [fasta], seed=3, embed_reverse_complement=True)
    assert {split: texts[::2] for split, texts in both.items()} == first


NAMED = {f"chr{i}": "ACGTT"[i % 5] * (20 + i) for i in range(40)}


def names_of(documents):
    """Records that each split has documents of; their lengths tell."""
    return {split: {f"chr{len(text) - 21}" for text in texts} for split, texts in documents.items()}


def test_lists_of_names(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", NAMED)
    (tmp_path / "names.txt").write_text("chr1\n\n chr22 \r\n")
    both = {"valid_contigs": ["chr3", "chr7"], "test_contigs": str(tmp_path / "names.txt")}
    rest = NAMED.keys() - {"chr3", "chr7", "chr1", "chr22"}

    # the only split without a list gets what is in none
    assert names_of(run(tmp_path, [fasta], **both)) == {
        "train": rest, "val": {"chr3", "chr7"}, "test": {"chr1", "chr22"},
    }  # fmt: skip
    # two splits without one share it by weight
    shared = names_of(run(tmp_path, [fasta], train_split=0.5, valid_split=0.5, test_contigs=["chr1", "chr22"]))
    assert shared["test"] == {"chr1", "chr22"}
    assert min(len(shared["train"]), len(shared["val"])) > 10 and not shared["train"] & shared["val"]
    # three lists leave the others out
    assert names_of(run(tmp_path, [fasta], train_contigs=["chr0"], **both)) == {
        "train": {"chr0"}, "val": {"chr3", "chr7"}, "test": {"chr1", "chr22"},
    }  # fmt: skip
    # a listed record is not cut up between splits
    windows = run(tmp_path, [fasta], split_window_length=5, append_eod=False, **both)
    assert b"".join(windows["val"]).decode() == NAMED["chr3"] + NAMED["chr7"]


def test_all_windows_of_a_contig_in_one_split(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {f"r{i}": "ACGT"[i % 4] * 30 + f"{'ACGT'[i // 4]}" for i in range(16)})
    settings = {"split_window_length": 31, "train_split": 0.5, "valid_split": 0.5, "test_split": 0.0}
    whole = run(tmp_path, [fasta], **settings)
    cut = run(tmp_path, [fasta], **settings | {"split_window_length": 7, "split_by": "contig", "append_eod": False})

    assert all(whole[split] for split in ("train", "val"))
    for split in whole:
        assert b"".join(cut[split]) == b"".join(whole[split]).replace(b"\0", b"")


def test_workers_change_nothing(tmp_path):
    text = b"".join(b">r%d\n%s\n" % (i, b"ACGTNacgt"[i % 9 :] * 300) for i in range(40))
    (tmp_path / "a.fa").write_bytes(text)
    (tmp_path / "a.fa.gz").write_bytes(bgzip(text))
    settings = {"embed_reverse_complement": True, "random_reverse_complement": 0.5, "seed": 3}
    plain = run(tmp_path, [str(tmp_path / "a.fa")], **settings)

    for workers in (1, 2, 7):
        assert run(tmp_path, [str(tmp_path / "a.fa.gz")], workers=workers, **settings) == plain


def test_complement_of_the_former_recipe(tmp_path, fasta):
    settings = {"embed_reverse_complement": True, "complement_upper_case_only": True}
    assert run(tmp_path, [fasta], **ALL_TRAIN, **settings)["train"] == [
        b"ACGTacgtNNnRYu\0", b"uYRnNNtgcaACGT\0", b"TTTTTTTTGA\0", b"TCAAAAAAAA\0",
    ]  # fmt: skip


def test_two_runs_at_a_time(tmp_path, fasta):
    config = PreprocessConfig(datapaths=[fasta], output_dir=str(tmp_path / "out"), **ALL_TRAIN)
    (tmp_path / "out").mkdir()
    other = IndexedDatasetWriter(config.output_prefixes["val"], "uint8")
    with pytest.raises(UserError, match="another run is writing"):
        preprocess(config)
    other.discard()
    preprocess(config)


def test_tokenizer_of_the_hub(tmp_path, fasta, monkeypatch):
    fetched = []

    def download(name, file):
        fetched.append((name, file))
        return str(tokenizer_dir(512) / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config = PreprocessConfig(datapaths=[fasta], hf_tokenizer_model_name="some/Tok 512")
    assert config.vocab_size() == 512
    assert fetched == [("some/Tok 512", "tokenizer.json")]
    assert config.output_prefixes["val"] == Path("some--tok512_val")


def test_no_such_tokenizer_on_the_hub(fasta):
    with pytest.raises(UserError, match="cannot get the tokenizer no/such from the hub"):
        PreprocessConfig(datapaths=[fasta], hf_tokenizer_model_name="no/such").vocab_size()


def test_several_files_and_gzip(tmp_path, fasta):
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(b">b\nGG\n>c\n\n"))
    documents = run(tmp_path, [fasta, str(tmp_path / "b.fa.gz")], drop_empty_sequences=True, **ALL_TRAIN)

    assert documents["train"] == [b"ACGTacgtNNnRYu\0", b"TTTTTTTTGA\0", b"GG\0"]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (">a\nAC\n", {}, r"1 document\(s\) are too few for 3 splits .* split_window_length"),
        (">a\nAC\n>b\n>c\nGG\n", ALL_TRAIN, "record 'b' of .* has no bases; set drop_empty_sequences"),
        (">a\nAC\n>b\n", ALL_TRAIN | {"nnn_filter": True}, "record 'b' of .* has no bases"),
        (">a\nAC\n>b\nA\u00e9\n", ALL_TRAIN, r"record 'b' of .* contains b'\\xc3'"),
        (">a\nA<EOS>\n", ALL_TRAIN | {"embed_reverse_complement": True}, "record 'a' of .* contains b'<'"),
        (">a\nANNNA\n", ALL_TRAIN | {"nnn_filter": True}, "filters left no document"),
        (">a\nACGT\n", ALL_TRAIN | {"enforce_sample_length": 4}, "makes 5 tokens; enforce_sample_length is 4"),
        ("ACGT\n", ALL_TRAIN, "is not FASTA"),
    ],
)
def test_an_error_leaves_no_file(tmp_path, text, settings, message):
    (tmp_path / "a.fa").write_text(text, encoding="utf-8")
    config = PreprocessConfig(datapaths=[str(tmp_path / "a.fa")], output_dir=str(tmp_path / "out"), **settings)

    with pytest.raises(UserError, match=message):
        preprocess(config)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        preprocess(config)
    assert list((tmp_path / "out").iterdir()) == []


def test_output_that_cannot_be_written(tmp_path, fasta):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: "):
        preprocess(PreprocessConfig(datapaths=[fasta], output_dir=str(tmp_path / "file")))
    with pytest.raises(UserError, match="Not a directory"):
        preprocess(PreprocessConfig(datapaths=[fasta], output_dir=str(tmp_path / "file" / "new")))


def check_text(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    return check(tmp_path / "config.yaml")


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_existing_output_is_noticed(tmp_path, fasta, ending):
    text = f"- {{datapaths: ['{fasta}'], output_dir: '{tmp_path}', output_prefix: x"
    assert len(check_text(tmp_path, text + "}").configs) == 1
    (tmp_path / f"x_nucleotide_fast_tokenizer_256_{ending}").write_text("")

    with pytest.raises(UserError, match=f"{ending} exists; set overwrite to true"):
        check_text(tmp_path, text + "}")
    assert len(check_text(tmp_path, text + ", overwrite: true}").configs) == 1


def test_folders_in_the_prefix_are_made(tmp_path, fasta):
    config = PreprocessConfig(datapaths=[fasta], output_dir=str(tmp_path / "out"), output_prefix="sub/x", test_split=0)
    preprocess(config)
    assert len(list((tmp_path / "out" / "sub").iterdir())) == 6


def test_checks_before_work(tmp_path, fasta):
    with pytest.raises(UserError, match=r"no such FASTA file: none\.fa"):
        check_text(tmp_path, "- {datapaths: [none.fa]}")
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; list its FASTA files"):
        check_text(tmp_path, f"- {{datapaths: ['{tmp_path}']}}")
    with pytest.raises(UserError, match=r"two datasets write .*x_nucleotide_fast_tokenizer_256_train\.bin"):
        check_text(tmp_path, f"- &a {{datapaths: ['{fasta}'], output_prefix: x}}\n- *a")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json"):
        check_text(tmp_path, f"- {{datapaths: ['{fasta}'], hf_tokenizer_model_path: '{tmp_path}'}}")
