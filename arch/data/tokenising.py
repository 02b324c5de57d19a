"""From documents to files of tokens, in bounded memory and on every processor."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .documents import PIECE_BYTES, Piece, Source, holds_out_by_hash, is_held_out
from .files import ArrayWriter, prepared_folder
from .packing import FILES, Documents
from .processes import available_processors, ordered_map
from .tokenizers import Tokenizer

_LARGE = 64 * 2**20  # bytes of text from which on worker processes are worth their start
_MOST_PROCESSES = 32  # more would wait for the one that reads the text

# The split of the piece, whether its document ends with it, its prompt, its text.
_Work = tuple[str, bool, str, str]


def is_in_validation(source: Source) -> tuple[Callable[[Piece], bool], bool]:
  """Which pieces of a source are held out, and whether its files are to be cut for that."""
  if holds_out_by_hash(source):
    return lambda piece: is_held_out(piece.key), False
  return lambda piece: piece.tail, True


def tokenised(
  source: Source, tokenizer: Tokenizer, folder: Path, *, hold_out: bool
) -> dict[str, Documents]:
  """Tokenises a source, or maps the files of an earlier run into memory.

  Args:
    source: the documents. They are read once and never held in memory together.
    tokenizer: named in the path of the files by its fingerprint, as is the source by its key.
    folder: for the files. They appear once all is written.
    hold_out: whether to hold some out.

  Returns:
    Documents by split: `train` and `validation`, or without `hold_out` all of them as `all`.
  """
  splits = ("train", "validation") if hold_out else ("all",)

  def prepare(folder: Path) -> None:
    processes = 1
    if source.size >= _LARGE:
      processes = min(available_processors(), _MOST_PROCESSES)
      print(
        f"tokenising {source.name}, {source.size / 2**20:,.0f} MiB, in {processes} processes",
        file=sys.stderr,
        flush=True,
      )
    with contextlib.ExitStack() as stack:
      writers = {
        split: stack.enter_context(DocumentsWriter(folder / split, tokenizer, source.has_prompts))
        for split in splits
      }
      work = _groups(_work(source, hold_out))
      for encoded in ordered_map(_encode, tokenizer, work, processes):
        for split, last, prompt_length, tokens in encoded:
          writers[split].append(tokens, prompt_length)
          if last:
            writers[split].end_document()

  name = "split" if hold_out else "all"
  folder = prepared_folder(folder / source.key / f"{tokenizer.fingerprint}-{name}", prepare)
  return {split: Documents.load(folder / split) for split in splits}


class DocumentsWriter:
  """Writes what `Documents.load` reads, piece by piece."""

  def __init__(self, folder: Path, tokenizer: Tokenizer, has_prompts: bool):
    folder.mkdir()
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    self._tokens = ArrayWriter(folder / FILES["tokens"], dtype)
    self._ends = ArrayWriter(folder / FILES["ends"], np.int64)
    self._trained = ArrayWriter(folder / FILES["trained"], bool) if has_prompts else None
    self._count = 0

  def append(self, tokens: np.ndarray, prompt_length: int = 0) -> None:  # [n]
    """Goes on with the document; the first `prompt_length` tokens are not to be trained on."""
    self._tokens.append(tokens)
    self._count += len(tokens)
    if self._trained is not None:
      self._trained.append(np.arange(len(tokens)) >= prompt_length)

  def end_document(self) -> None:
    self._ends.append(np.array([self._count]))

  def __enter__(self) -> "DocumentsWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    for writer in filter(None, (self._tokens, self._ends, self._trained)):
      writer.close()


def interleaved(parts: Sequence[Documents], tokenizer: Tokenizer, folder: Path) -> Documents:
  """Documents of several sources as one, evenly mixed so that any beginning of it has of all."""

  def prepare(folder: Path) -> None:
    places = [(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in parts]
    which = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    nexts = [0] * len(parts)
    has_prompts = any(part.trained is not None for part in parts)
    with DocumentsWriter(folder / "all", tokenizer, has_prompts) as writer:
      for index in which[np.argsort(np.concatenate(places), kind="stable")]:
        part, i = parts[index], nexts[index]
        start, end = part.ends[i - 1] if i else 0, part.ends[i]
        nexts[index] += 1
        untrained = 0 if part.trained is None else int((~part.trained[start:end]).sum())
        writer.append(part.tokens[start:end], untrained)
        writer.end_document()

  return Documents.load(prepared_folder(folder, prepare) / "all")


def sampled_texts(source: Source, budget: int, *, hold_out: bool) -> Iterator[str]:
  """Texts to train a tokenizer on, of at most `budget` characters from all over the source.

  The sample of a source is always the same. Held-out documents are left out of it.
  """
  held_out, cut = is_in_validation(source) if hold_out else (lambda piece: False, False)
  for piece in source.sample(min(1.0, budget / max(source.size, 1)), cut=cut):
    if held_out(piece):
      continue
    text = (piece.prompt + piece.text)[:budget]
    yield text
    budget -= len(text)
    if not budget:
      return


def _work(source: Source, hold_out: bool) -> Iterator[_Work]:
  if not hold_out:
    for piece in source.pieces():
      yield "all", piece.last, piece.prompt, piece.text
    return
  held_out, cut = is_in_validation(source)
  for piece in source.pieces(cut=cut):
    split = "validation" if held_out(piece) else "train"
    yield split, piece.last, piece.prompt, piece.text


def _groups(work: Iterable[_Work]) -> Iterator[list[_Work]]:
  """Enough pieces at a time to be worth sending."""
  group, size = [], 0
  for piece in work:
    group.append(piece)
    size += len(piece[2]) + len(piece[3])
    if size >= PIECE_BYTES:
      yield group
      group, size = [], 0
  if group:
    yield group


def _encode(
  tokenizer: Tokenizer, group: list[_Work]
) -> list[tuple[str, bool, int, np.ndarray]]:  # split, last, tokens of the prompt, all tokens
  encoded = []
  for split, last, prompt, text in group:
    before = tokenizer.encode(prompt)
    tokens = np.concatenate([before, tokenizer.encode(text)])
    encoded.append((split, last, len(before), tokens))
  return encoded
