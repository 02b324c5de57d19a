"""What every source of text gives: documents, in pieces of bounded size."""

import abc
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE_BYTES = 2**20  # longer texts come in several pieces
_HELD_OUT = 16  # one document, or part, in so many
_FEW = 32  # documents, of which one in 16 would be too random a choice
_LONGEST = 300  # characters of what another library says
_ENOUGH = 1024  # documents among which a hash certainly holds some out


class Piece(NamedTuple):
  """A run of a document's text; the pieces of a document follow one another."""

  key: str  # of the document
  text: str
  prompt: str = ""  # before the text of the document's first piece, read and not trained on
  last: bool = True  # whether the document ends here
  tail: bool = False  # whether it lies in the last sixteenth of a file that was read with `cut`


class Source(abc.ABC):
  """Documents in a fixed order.

  Attributes:
    name: as the user wrote it, for messages.
    key: names the content, for caches: another content has another key.
    size: of the text in bytes, roughly.
    has_prompts: whether documents may begin with a prompt.
    has_records: whether documents are records of a data set rather than whole files.
  """

  name: str
  key: str
  size: int
  has_prompts: bool
  has_records: bool

  @abc.abstractmethod
  def keys(self) -> Iterator[str]:
    """One key per document: the file's path, or a hash of the record."""

  @abc.abstractmethod
  def pieces(self, *, cut: bool = False) -> Iterator[Piece]:
    """All documents. With `cut`, a whole file is two: the last sixteenth of it, and what is before.

    Text that cannot be read is a ValueError that names the place.
    """

  def sample(self, share: float, *, cut: bool = False) -> Iterator[Piece]:
    """About that share of the pieces, from all over, and always the same ones."""
    index = 0  # of the piece in its document
    for piece in self.pieces(cut=cut):
      digest = hashlib.sha256(f"{index} {piece.key}".encode()).digest()
      if int.from_bytes(digest[:6], "big") < share * 2**48:
        yield piece
      index = 0 if piece.last else index + 1


def holds_out_by_hash(source: Source) -> bool:
  """Whether documents are held out by `is_held_out`, and not the tail of each file."""
  keys = list(itertools.islice(source.keys(), _ENOUGH))
  if len(keys) >= _FEW and any(map(is_held_out, keys)):
    return True
  if source.has_records:
    raise ValueError(
      f"{source.name} has {len(keys)} documents, too few to hold some out for validation: expected "
      f"at least {_FEW}, or config.data.validation to name other text"
    )
  return False


def is_held_out(key: str) -> bool:
  """Holds out one document in 16, the same ones on every machine."""
  return hashlib.sha256(key.encode("utf-8")).digest()[0] % _HELD_OUT == 0


def tail_start(size: int) -> int:
  return size - size // _HELD_OUT


def record_key(prompt: str, text: str) -> str:
  """Names a record by what it says, so that copies of it are held out together."""
  return hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()


def record_pieces(prompt: str, text: str) -> Iterator[Piece]:
  """The pieces of a document that is in memory."""
  key = record_key(prompt, text)
  start = 0
  while start < len(text):
    end = start + PIECE_BYTES
    if end < len(text):  # a whole line at a time, where there are lines
      end = text.rfind("\n", start, end) + 1 or end
    yield Piece(key, text[start:end], prompt, last=end >= len(text))
    start, prompt = end, ""


def choose_fields(
  names: Iterable[str], text_field: str | None, prompt_field: str | None, where: str
) -> tuple[str, str | None]:
  """The fields of a record that hold its text and, if any, its prompt.

  Named ones must be among `names`. Else the text is in `text`; in `completion`, with its prompt in
  `prompt`; in the only field there is; or in the only one with "text" in its name.
  """
  names = sorted(names)
  for field in (text_field, prompt_field):
    if field is not None and field not in names:
      raise ValueError(f"{where} has no text field {field!r}: it has {', '.join(names) or 'none'}")
  if text_field is None:
    texts = [name for name in names if "text" in name]
    if "text" in names:
      text_field = "text"
    elif {"prompt", "completion"} <= set(names):
      text_field, prompt_field = "completion", prompt_field or "prompt"
    elif len(names) == 1 or len(texts) == 1:
      text_field = (names if len(names) == 1 else texts)[0]
    else:
      raise ValueError(
        f"{where} has the text fields {', '.join(names) or '(none)'}: expected one of them in "
        "config.data.text_field"
      )
  return text_field, prompt_field


def one_line(error: BaseException) -> str:
  """What an exception of another library says, short."""
  text = re.sub(r"\s+", " ", str(error)).strip()
  text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
  if isinstance(error, ValueError | RuntimeError) and text:
    return text
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
