"""Lossless tokenizers: bytes, and sentencepiece BPE.

Every id stands for an exact run of bytes, its *piece*. Decoding joins the pieces, so

    decode(encode(text)) == text
    token_bytes[encode(text)].sum() == len(text.encode("utf-8"))

hold for every valid string. The second makes bits per byte, the figure by which models with
different tokenizers are compared, an exact quantity.
"""

import abc
import codecs
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from .files import atomic_write, content_hash

_DESCRIPTION = "tokenizer.json"
_MODEL = "tokenizer.model"

# sentencepiece writes a space as U+2581, so a U+2581 of the text would come back as a space.
_SPACE_MARK = "\u2581"

# The settings under which sentencepiece loses nothing. Text is fed with its newlines kept, so that
# pieces such as `):\n` can form: 3.41 bytes per token on source code, against 3.21 line by line.
_TRAINER_SETTINGS = {
  "model_type": "bpe",
  "normalization_rule_name": "identity",
  "remove_extra_whitespaces": False,
  "add_dummy_prefix": False,
  "byte_fallback": True,
  "allow_whitespace_only_pieces": True,
  "max_sentence_length": 20000,  # bytes; longer chunks are dropped
  "num_threads": 2,  # another number gives another model
}
_CHUNK_CHARACTERS = 4000  # of at most 4 bytes each


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    pieces: the bytes each id stands for, empty for special ids.
    bos_id: the id that a document's first input is.
    eos_id: the id that a document's last target is.
  """

  pieces: tuple[bytes, ...]
  bos_id: int
  eos_id: int

  @property
  def vocab_size(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def token_bytes(self) -> np.ndarray:  # int32[vocab]
    """Number of bytes each id stands for."""
    return np.array([len(piece) for piece in self.pieces], np.int32)

  @property
  @abc.abstractmethod
  def fingerprint(self) -> str:
    """A short hash, the same for two tokenizers only if they encode alike."""

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:  # int32[n]
    """Ids of `text`, without special ones. A lone surrogate raises ValueError."""

  @abc.abstractmethod
  def save(self, folder: str | Path) -> None:
    """Writes what `load_tokenizer` needs."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`. Special ids give nothing, incomplete UTF-8 gives U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The exact bytes that `ids` stand for."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
      raise ValueError(f"expected ids in [0, {self.vocab_size}), got {min(ids)} to {max(ids)}")
    return b"".join(self.pieces[i] for i in ids)


class ByteTokenizer(Tokenizer):
  """One id per byte of UTF-8, and id 256 for the boundary between documents."""

  pieces = (*(bytes([i]) for i in range(256)), b"")
  bos_id = eos_id = 256
  fingerprint = "bytes"

  def encode(self, text: str) -> np.ndarray:  # int32[n]
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def save(self, folder: str | Path) -> None:
    _save_description(Path(folder), "bytes")


class SentencePieceTokenizer(Tokenizer):
  """Byte pair encoding with byte fallback, as trained by `train_sentencepiece`.

  Pickling carries the serialised model alone.
  """

  def __init__(self, model_proto: bytes):
    self.model_proto = model_proto
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    self.pieces = tuple(self._piece(i) for i in range(self._processor.vocab_size()))
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    self._space_mark_ids = [
      self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode("utf-8")
    ]

  def __reduce__(self):
    return SentencePieceTokenizer, (self.model_proto,)

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self.model_proto).hexdigest()[:16]

  def encode(self, text: str) -> np.ndarray:  # int32[n]
    first, *rest = text.encode("utf-8").split(_SPACE_MARK.encode("utf-8"))
    ids = self._processor.encode(first)
    for part in rest:
      ids += self._space_mark_ids
      ids += self._processor.encode(part)
    return np.array(ids, np.int32)

  def save(self, folder: str | Path) -> None:
    with atomic_write(Path(folder) / _MODEL) as file:
      file.write(self.model_proto)
    _save_description(Path(folder), "sentencepiece")

  def _piece(self, i: int) -> bytes:
    if self._processor.is_control(i) or self._processor.is_unknown(i):
      return b""
    piece = self._processor.id_to_piece(i)
    if self._processor.is_byte(i):
      return bytes([int(piece[3:5], 16)])  # "<0xE2>"
    return piece.replace(_SPACE_MARK, " ").encode("utf-8")


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, cache_dir: str | Path, key: str | None = None
) -> SentencePieceTokenizer:
  """Trains a BPE model of exactly `vocab_size` ids, or reads it if it was trained before.

  The model is kept in `cache_dir` under a hash of the texts, the size and the settings; where a
  `key` names the texts, it stands for them, and they are read only if the model is not there. The
  size includes 256 bytes and three special ids; a text too small or too uniform for the rest is a
  ValueError.
  """
  texts = list(texts) if key is None else texts
  settings = {**_TRAINER_SETTINGS, "vocab_size": vocab_size}
  recipe = repr((sentencepiece.__version__, sorted(settings.items())))
  named = texts if key is None else [key]
  path = Path(cache_dir) / f"sentencepiece-{content_hash([recipe, *named])}.model"
  if not path.exists():
    model = io.BytesIO()
    chunks = list(_chunks(texts))  # the trainer would hide an error of theirs in one of its own
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(chunks), model_writer=model, minloglevel=2, **settings
      )
    except RuntimeError as error:
      reason = str(error).rpartition("] ")[2]  # after the place in its source and the condition
      raise ValueError(
        f"cannot train a sentencepiece model of vocab_size={vocab_size} on this text: {reason}"
      ) from error
    with atomic_write(path) as file:
      file.write(model.getvalue())
  return SentencePieceTokenizer(path.read_bytes())


def load_tokenizer(folder: str | Path) -> Tokenizer:
  """Reads a tokenizer that was written by `save`."""
  path = Path(folder) / _DESCRIPTION
  if not path.exists():
    raise ValueError(f"expected a saved tokenizer in {folder}, found no {_DESCRIPTION}")
  match json.loads(path.read_text()):
    case {"type": "bytes"}:
      return ByteTokenizer()
    case {"type": "sentencepiece"}:
      return SentencePieceTokenizer((Path(folder) / _MODEL).read_bytes())
    case description:
      raise ValueError(f'{path}: expected type "bytes" or "sentencepiece", got {description}')


class StreamDecoder:
  """Turns a stream of ids into text, each character as soon as its last byte has come."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, id: int) -> str:
    """Text that this id completes; empty in the middle of a character."""
    return self._decoder.decode(self._tokenizer.decode_bytes([id]))

  def flush(self) -> str:
    """Ends the stream: U+FFFD for a character left incomplete."""
    return self._decoder.decode(b"", final=True)


def _save_description(folder: Path, kind: str) -> None:
  with atomic_write(folder / _DESCRIPTION) as file:
    file.write(json.dumps({"type": kind}).encode())


def _chunks(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for start in range(0, len(text), _CHUNK_CHARACTERS):
      yield text[start : start + _CHUNK_CHARACTERS]
