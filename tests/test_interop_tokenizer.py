"""Published tokenizers keep their ids and lose nothing, or are refused."""

import io

import pytest
import sentencepiece

from triform.arch.data.tokenizers import load_tokenizer
from triform.arch.interop.tokenizer import read_tokenizer

TEXT = "".join(f"value{i % 37} = {i * i}\n" for i in range(300))
LOSSLESS = {
  "normalization_rule_name": "identity",
  "remove_extra_whitespaces": False,
  "byte_fallback": True,
  "vocab_size": 300,
}


def write_tokenizer(folder, **settings):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe",
    minloglevel=2, **{**LOSSLESS, **settings},
  )  # fmt: skip
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_published_tokenizer_keeps_its_ids_and_loses_nothing(tmp_path):
  original = write_tokenizer(tmp_path)
  tokenizer = read_tokenizer(tmp_path, 300)
  assert tokenizer.vocab_size == 300 and tokenizer.bos_id == original.bos_id()
  for text in (TEXT, " value1", "", "a  b\n\tc", "été"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  with_space = "value1 = 1"  # which the original puts before every text
  assert list(tokenizer.encode(f" {with_space}")) == original.encode(with_space)
  tokenizer.save(tmp_path / "saved")
  assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"byte_fallback": False, "vocab_size": 40}, "has no byte fallback: expected a tokenizer that"),
    ({"remove_extra_whitespaces": True}, "tokenizer.model drops spaces: expected"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalises: expected"),
    ({"bos_id": -1}, "has no ids for the ends of a text: expected"),
    ({"vocab_size": 310}, "has 310 ids, the model 300: expected"),
  ],
)
def test_tokenizers_that_lose_text_are_refused(tmp_path, settings, message):
  write_tokenizer(tmp_path, **settings)
  with pytest.raises(ValueError, match=message):
    read_tokenizer(tmp_path, 300)


def test_a_damaged_tokenizer_is_refused(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match=r"tokenizer.model is no sentencepiece model"):
    read_tokenizer(tmp_path, 300)
