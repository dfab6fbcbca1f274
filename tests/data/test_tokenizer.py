# SPDX-License-Identifier: Apache-2.0
"""The table tokenizer against the Hugging Face folders, and the folders against their generator."""

import json

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data import tokenizer_files
from evo2_megatron.data.tokenizer import (
    SEQUENCE_TOKENS,
    VOCAB_SIZES,
    decode,
    encode,
    encode_sequence,
    outside_vocabulary,
    read_vocab_size,
    tokenizer_dir,
)

TEXTS = [
    "",
    "ACGTNacgtn",
    "@#|_; \t\n\r",
    "".join(map(chr, range(700))),
    "A<EOS>C<PAD><BOS>g<SEP>|d__Bacteria;s__None|<UNK>t",
    "<EOS <eos><<EOS>>",
    "\u4e2dA\U0001f9ec",
]


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def hugging_face(request):
    """The folder as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_hugging_face(hugging_face, text):
    assert encode(text, len(hugging_face)) == hugging_face(text).input_ids


@pytest.mark.parametrize("skip", [False, True])
def test_decode_equals_hugging_face(hugging_face, skip):
    ids = [*range(len(hugging_face)), 65, 0, 0, 67]

    assert decode(ids, skip_special_tokens=skip) == hugging_face.decode(ids, skip_special_tokens=skip)


def test_hugging_face_special_tokens(hugging_face):
    special = hugging_face.eos_token_id, hugging_face.pad_token_id, hugging_face.bos_token_id
    assert special == (0, 1, 2)
    assert (hugging_face.sep_token_id, hugging_face.unk_token_id) == (3, 4)
    assert hugging_face.padding_side == "right"
    assert hugging_face(["AC", "A"], padding=True).input_ids == [[65, 67], [65, 1]]


def test_round_trip():
    text = "|d__Bacteria;p__None|ACGTNNnnacgt-@#\tRYKM"

    assert decode(encode(text)) == text


def test_encode_known_ids():
    assert encode("ACGTNacgtn") == [65, 67, 71, 84, 78, 97, 99, 103, 116, 110]
    assert encode("@#|_; ") == [64, 35, 124, 95, 59, 32]
    assert encode("\x00\x04\u0100") == [4, 4, 4]
    assert encode("\u0100", 512) == [256]


def test_outside_vocabulary():
    assert outside_vocabulary("AC\u0100GT\x00\u0100") == ["\u0100", "\x00"]
    assert outside_vocabulary("AC\u0100", 512) == []


def test_encode_sequence_equals_encode_where_it_is_allowed():
    allowed = bytes(i for i in range(256) if SEQUENCE_TOKENS[i] != 0xFF)
    assert list(encode_sequence(allowed, name="x")) == encode(allowed.decode("ascii"))
    for refused in set(range(256)) - set(allowed):
        with pytest.raises(UserError, match="x contains b"):
            encode_sequence(b"AC" + bytes([refused]), name="x")


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_folders_are_what_the_generator_writes(tmp_path, vocab_size):
    tokenizer_files.main([str(tmp_path)])
    shipped = tokenizer_dir(vocab_size)
    generated = tmp_path / shipped.name

    assert {path.name for path in generated.iterdir()} == {path.name for path in shipped.iterdir()}
    for path in generated.iterdir():
        assert path.read_bytes() == (shipped / path.name).read_bytes()
    assert read_vocab_size(shipped) == vocab_size


def test_read_vocab_size_refuses_other_tokenizers(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_vocab_size(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="does not define a tokenizer"):
        read_vocab_size(tmp_path)
    other = json.loads((tokenizer_dir(256) / "tokenizer.json").read_text())
    other["model"]["vocab"]["A"] = 66
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="not one token per character"):
        read_vocab_size(tmp_path)


def test_no_tokenizer_of_another_size():
    with pytest.raises(UserError, match="300"):
        tokenizer_dir(300)
