import inspect
import os
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from triform.arch.data import files, packing, tokenizers
from triform.arch.data.tokenizers import (
  ByteTokenizer,
  SentencePieceTokenizer,
  StreamDecoder,
  load_tokenizer,
  train_sentencepiece,
)

CORPUS = [inspect.getsource(module) for module in (files, packing, tokenizers)]
VOCAB = 400

NASTY = [
  "",
  "\t\tx\t",
  "   a    b  ",
  " ",
  "a\r\nb\rc\n\n",
  "\0",
  "a\0b",
  "\U0001f600\U0001f468\u200d\U0001f469",
  "\u2581",
  " \u2581 \u2581\u2581a\u2581",
  "\u2585",
  "\ufeffx",
  "<s></s><unk><pad>",
  "<0x41><0xE2><0x96><0x81>",
  "\ufffd",
  "e\u0301 \u00e9 \ufb01 \uff21",
  "\U0010ffff",
]

texts = st.lists(st.sampled_from([*NASTY, "def ", "return self"]) | st.text()).map("".join)


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
  return train_sentencepiece(CORPUS, VOCAB, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, sentencepiece_tokenizer):
  return ByteTokenizer() if request.param == "bytes" else sentencepiece_tokenizer


def check_lossless(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("text", NASTY + CORPUS)
def test_named_texts_are_lossless(tokenizer, text):
  check_lossless(tokenizer, text)


@settings(deadline=None, max_examples=100)  # NumPy alone, so quick
@given(text=texts)
def test_any_text_is_lossless(tokenizer, text):
  check_lossless(tokenizer, text)


def test_pieces_are_the_bytes_of_their_ids(tokenizer):
  assert len(tokenizer.pieces) == tokenizer.vocab_size == len(tokenizer.token_bytes)
  assert {bytes([i]) for i in range(256)} <= set(tokenizer.pieces)
  for i, piece in enumerate(tokenizer.pieces):
    assert tokenizer.token_bytes[i] == len(piece)
    assert tokenizer.decode_bytes([i]) == piece


def test_special_ids_decode_to_nothing(tokenizer):
  ids = [tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]
  assert tokenizer.decode(ids) == "a b"


def test_incomplete_utf8_decodes_to_the_replacement_character(tokenizer):
  ids = [tokenizer.pieces.index(bytes([byte])) for byte in b"a\xf0\x9f"]
  assert tokenizer.decode(ids) == "a\ufffd"


def test_lone_surrogate_is_refused(tokenizer):
  with pytest.raises(ValueError, match=r"'\\ud800' in position 1: surrogates not allowed"):
    tokenizer.encode("a\ud800")


@pytest.mark.parametrize("ids", [[-1], [0, 400]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, ids):
  with pytest.raises(ValueError, match=rf"\[0, {tokenizer.vocab_size}\)"):
    tokenizer.decode(ids)


def test_pickled_and_saved_tokenizers_are_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  for copy in (pickle.loads(pickle.dumps(tokenizer)), load_tokenizer(tmp_path)):
    assert type(copy) is type(tokenizer)
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.pieces == tokenizer.pieces
    np.testing.assert_array_equal(copy.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(ValueError, match=str(tmp_path)):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"type": "words"}')
  with pytest.raises(ValueError, match="words"):
    load_tokenizer(tmp_path)


def test_byte_tokenizer_ids():
  tokenizer = ByteTokenizer()
  assert tokenizer.vocab_size == 257
  assert tokenizer.bos_id == tokenizer.eos_id == 256
  assert tokenizer.encode("a\u00e9").tolist() == [0x61, 0xC3, 0xA9]


def test_sentencepiece_has_the_asked_size_and_pieces_of_whitespace(sentencepiece_tokenizer):
  assert sentencepiece_tokenizer.vocab_size == VOCAB
  assert {b"    ", b"\n\n", b")\n"} <= set(sentencepiece_tokenizer.pieces)


def test_training_is_cached_by_content(tmp_path, monkeypatch):
  first = train_sentencepiece(CORPUS, VOCAB, tmp_path)
  train = sentencepiece.SentencePieceTrainer.train
  trained = []

  def counted(**kwargs):
    trained.append(kwargs["vocab_size"])
    train(**kwargs)

  monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", counted)
  assert train_sentencepiece(iter(CORPUS), VOCAB, tmp_path).model_proto == first.model_proto
  assert trained == []
  # Another size, other texts, and the same characters cut into other texts are other models.
  train_sentencepiece(CORPUS, VOCAB + 1, tmp_path)
  train_sentencepiece(CORPUS[1:], VOCAB, tmp_path)
  train_sentencepiece(["".join(CORPUS)], VOCAB, tmp_path)
  assert trained == [VOCAB + 1, VOCAB, VOCAB]
  assert len(os.listdir(tmp_path)) == 4


def test_training_twice_gives_identical_bytes(sentencepiece_tokenizer, tmp_path):
  again = train_sentencepiece(CORPUS, VOCAB, tmp_path)
  assert again.model_proto == sentencepiece_tokenizer.model_proto


@pytest.mark.parametrize("size", [100, 5000])
def test_an_impossible_vocabulary_is_refused(tmp_path, size):
  with pytest.raises(ValueError, match=rf"vocab_size={size} .*[Vv]ocabulary size"):
    train_sentencepiece(["a small text"], size, tmp_path)
  assert os.listdir(tmp_path) == []


@settings(deadline=None, max_examples=100)  # NumPy alone, so quick
@given(text=texts)
def test_stream_decoder_emits_each_character_when_its_last_byte_comes(tokenizer, text):
  decoder = StreamDecoder(tokenizer)
  pushed, emitted = b"", ""
  for i in tokenizer.encode(text):
    pushed += tokenizer.pieces[i]
    emitted += decoder.push(i)
    assert emitted == pushed.decode("utf-8", errors="ignore")
  assert emitted + decoder.flush() == text


def test_stream_decoder_on_an_emoji_in_four_bytes():
  decoder = StreamDecoder(ByteTokenizer())
  assert [decoder.push(byte) for byte in "\U0001f600!".encode()] == ["", "", "", "\U0001f600", "!"]
  assert decoder.flush() == ""
  decoder.push(0xF0)
  assert decoder.flush() == "\ufffd"


def test_atomic_write_shows_a_whole_file_or_none(tmp_path):
  path = tmp_path / "folder" / "file"
  with files.atomic_write(path) as file:
    file.write(b"whole")
    file.flush()
    assert not path.exists()
  assert path.read_bytes() == b"whole"
  with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as file:
    file.write(b"ha")
    raise KeyboardInterrupt
  assert path.read_bytes() == b"whole"
  assert os.listdir(path.parent) == ["file"]


def test_sentencepiece_model_file_is_a_plain_one(sentencepiece_tokenizer, tmp_path):
  sentencepiece_tokenizer.save(tmp_path)
  copy = SentencePieceTokenizer((tmp_path / "tokenizer.model").read_bytes())
  assert copy.pieces == sentencepiece_tokenizer.pieces
