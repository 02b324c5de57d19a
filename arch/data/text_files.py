"""Files and folders of text.

A file is one document of UTF-8 text; in `.jsonl` and `.ndjson` files, and `.json` files that begin
with a line that is a whole object, every line is a record that holds one. Any of them may be
compressed, `.gz`. A folder is read recursively and in the order of the paths; hidden files and
folders are skipped.
"""

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .documents import (
  PIECE_BYTES,
  Piece,
  Source,
  choose_fields,
  one_line,
  record_key,
  record_pieces,
  tail_start,
)
from .files import atomic_write, content_hash


class PathSource(Source):
  """The text of a file, or of every file in a folder.

  Args:
    path: of the file or folder.
    text_field, prompt_field: of the records, see `choose_fields`.
    cache: a folder that remembers what is in files that have not changed, or None.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    text_field: str | None = None,
    prompt_field: str | None = None,
    cache: Path | None = None,
  ):
    self.name = str(path)
    root = Path(path).expanduser()
    self._files = _find_files(root)
    base = root if root.is_dir() else root.parent
    self._paths = [file.relative_to(base).as_posix() for file in self._files]
    self._of_records = [_holds_records(file) for file in self._files]
    self.size = sum(file.stat().st_size for file in self._files)
    if not self.size:
      raise ValueError(f"expected text in {path}, but it is empty")

    self.has_records = any(self._of_records)
    self._fields = ("", None)
    if self.has_records:
      self._fields = self._choose_fields(text_field, prompt_field)
    elif text_field is not None or prompt_field is not None:
      raise ValueError(
        f"{path} has no fields such as {text_field or prompt_field!r}: expected .jsonl files"
      )
    self.has_prompts = self._fields[1] is not None
    digests = [_digest(file, cache) for file in self._files]
    self.key = "path-" + content_hash([repr((self._paths, digests, self._fields))])

  def keys(self) -> Iterator[str]:
    for file, path, of_records in self._each():
      if of_records:
        for prompt, text in self._records(file):
          yield record_key(prompt, text)
      elif file.stat().st_size:
        yield path

  def pieces(self, *, cut: bool = False) -> Iterator[Piece]:
    for file, path, of_records in self._each():
      if of_records:
        for prompt, text in self._records(file):
          yield from record_pieces(prompt, text)
      elif not cut:
        yield from _text_pieces(file, path, 0, None)
      else:
        middle = _cut_position(file)
        yield from _text_pieces(file, path, 0, middle)
        yield from _text_pieces(file, path, middle, None)

  def _each(self):
    return zip(self._files, self._paths, self._of_records, strict=True)

  def _choose_fields(self, text_field, prompt_field) -> tuple[str, str | None]:
    for file, _, of_records in self._each():
      for place, record in _parsed_lines(file) if of_records else ():
        names = [name for name, value in record.items() if isinstance(value, str)]
        return choose_fields(names, text_field, prompt_field, place)
    raise ValueError(f"expected records in {self.name}, found none")

  def _records(self, file: Path) -> Iterator[tuple[str, str]]:
    """Prompt and text of every record that is not empty."""
    text_field, prompt_field = self._fields
    for place, record in _parsed_lines(file):
      text = _string(record, text_field, place)
      prompt = _string(record, prompt_field, place) if prompt_field else ""
      if text:
        yield prompt, text


def _find_files(root: Path) -> list[Path]:
  if not root.exists():
    raise ValueError(f"expected a text file or a folder, but {root} does not exist")
  if not root.is_dir():
    return [root]
  return [
    file
    for file in sorted(root.rglob("*"))
    if file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)
  ]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
  try:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
      yield opened
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"cannot read {file}: {one_line(error)}") from error


def _holds_records(file: Path) -> bool:
  name = file.name.removesuffix(".gz")
  if not name.endswith(".json"):
    return name.endswith((".jsonl", ".ndjson"))
  with _opened(file) as opened:
    try:
      return isinstance(json.loads(opened.readline()), dict)
    except ValueError:
      return False


def _parsed_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Place and record of every line that is not blank."""
  with _opened(file) as opened:
    for number, line in enumerate(opened, 1):
      if not line.strip():
        continue
      place = f"{file}, line {number},"
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
      if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object but {type(record).__name__}")
      yield place, record


def _string(record: dict[str, Any], field: str, place: str) -> str:
  value = record.get(field)
  if not isinstance(value, str):
    raise ValueError(f"{place} has no text in {field!r}: it has {', '.join(record) or 'no fields'}")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{place} has a lone surrogate in {field!r}: {error}") from error
  return value


def _cut_position(file: Path) -> int:
  """Where the last sixteenth of a file begins: with a line, unless lines are very long."""
  with _opened(file) as opened:
    start = tail_start(opened.seek(0, os.SEEK_END))
    opened.seek(start)
    line = opened.readline(PIECE_BYTES)
    if line.endswith(b"\n") and opened.read(1):
      return start + len(line)
    characters = (i for i, byte in enumerate(line) if byte & 0xC0 != 0x80)
    return start + next(characters, len(line))


def _text_pieces(file: Path, key: str, start: int, stop: int | None) -> Iterator[Piece]:
  """The bytes from `start` to `stop` (None: the end) as one document."""
  previous, tail = None, start > 0
  with _opened(file) as opened:
    opened.seek(start)
    position, rest = start, b""
    while True:
      wanted = PIECE_BYTES if stop is None else min(PIECE_BYTES, stop - position - len(rest))
      block = opened.read(wanted)
      data = rest + block
      end = len(data) if len(block) < PIECE_BYTES else _last_boundary(data)
      if end:
        if previous is not None:
          yield Piece(key, previous, last=False, tail=tail)
        previous = _decoded(data[:end], file, position)
      position, rest = position + end, data[end:]
      if len(block) < PIECE_BYTES:
        break
  if previous is not None:
    yield Piece(key, previous, tail=tail)


def _last_boundary(data: bytes) -> int:
  """After the last whole line, or else before the last character."""
  after_line = data.rfind(b"\n") + 1
  if after_line:
    return after_line
  characters = (len(data) - back for back in range(1, 5) if data[-back] & 0xC0 != 0x80)
  return next(characters, len(data))


def _decoded(data: bytes, file: Path, position: int) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"expected UTF-8 text in {file}: byte {data[error.start]:#04x} at position "
      f"{position + error.start} does not belong there"
    ) from error


def _digest(file: Path, cache: Path | None) -> str:
  """A hash of the content, looked up for a file of known name, size and time of change."""
  stat = file.stat()
  identity = content_hash([str(file.resolve()), str(stat.st_size), str(stat.st_mtime_ns)])
  known = None if cache is None else cache / identity
  if known is not None and known.exists():
    return known.read_text()
  with file.open("rb") as opened:
    digest = hashlib.file_digest(opened, "sha256").hexdigest()
  if known is not None:
    with atomic_write(known) as opened:
      opened.write(digest.encode())
  return digest
