"""From tokenised documents to windows of the token stream.

A document t1 .. tn takes n + 1 positions of the token stream: it is told that it begins, and must
say that it ends.

    inputs   bos t1 .. tn        reset      true at bos, false elsewhere
    targets  t1 .. tn eos        mask       true; false in the padding after the stream's end
                                 loss_mask  mask, but false where the target is a token that is
                                            read and not trained on, such as one of a prompt

The documents follow one another in order. `PackedWindows` cuts the stream into windows, which
`batches.TrainBatches` shuffles; `carried_batches` reads it in order, each batch continuing the last
one. The arrays may be mapped from files of any size: memory use does not grow with them.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Batch = dict[str, np.ndarray]

FILES = {"tokens": "tokens.npy", "ends": "ends.npy", "trained": "trained.npy"}


@dataclass(frozen=True)
class Documents:
  """Tokenised documents, one after another, without special tokens."""

  tokens: np.ndarray  # integers[n]
  ends: np.ndarray  # int64[docs], where each document ends in `tokens`
  trained: np.ndarray | None = None  # bool[n], false for tokens only to be read; None: all true
  folder: Path | None = None  # that the arrays are mapped from

  def __post_init__(self):
    total = len(self.tokens)
    # Files are written by this program, and perhaps too large to be looked at as a whole.
    ends = self.ends if self.folder is None else self.ends[-1:]
    steps = np.diff(ends, prepend=0, append=total)
    if steps.min() < 0 or steps[-1] != 0:
      raise ValueError(f"expected ends that ascend to the {total} tokens, got {self.ends}")
    if self.trained is not None and len(self.trained) != total:
      raise ValueError(f"expected {total} flags in trained, got {len(self.trained)}")

  @classmethod
  def from_arrays(cls, arrays: Sequence[np.ndarray]) -> "Documents":
    """Joins one int array per document."""
    lengths = [len(array) for array in arrays]
    tokens = np.concatenate([np.zeros(0, np.int32), *arrays], dtype=np.int32)
    return cls(tokens, np.cumsum(lengths, dtype=np.int64))

  @classmethod
  def load(cls, folder: Path) -> "Documents":
    """Maps `tokens.npy`, `ends.npy` and, if it is there, `trained.npy` into memory."""
    try:
      arrays = {
        # A plain view: indexing a `np.memmap` costs more than reading what it gives.
        field: np.load(folder / file, mmap_mode="r").view(np.ndarray)
        for field, file in FILES.items()
        if (folder / file).exists()
      }
      return cls(**arrays, folder=folder)
    except (ValueError, TypeError, EOFError) as error:
      raise ValueError(
        f"{folder} is damaged, remove it to have it prepared again: {error}"
      ) from error

  def __reduce__(self):
    # A worker process maps the files itself.
    if self.folder is not None:
      return Documents.load, (self.folder,)
    return Documents, (self.tokens, self.ends, self.trained)

  def __len__(self) -> int:
    """Number of documents."""
    return len(self.ends)


class TokenStream:
  """Random access to the stream of inputs and targets, without holding it in memory."""

  def __init__(self, documents: Documents, bos_id: int, eos_id: int):
    self._documents = documents
    self._bos_id, self._eos_id = bos_id, eos_id

  def __len__(self) -> int:
    return len(self._documents.tokens) + len(self._documents)

  def read(self, start: int, length: int, real: int) -> Batch:
    """Arrays [length] of the stream from `start` on; past the first `real`, padding."""
    ends, count = self._documents.ends, len(self._documents)
    real = max(0, min(real, length, len(self) - start))
    # Every earlier document shifts a token by its one extra position, so document i has its last
    # position at `ends[i] + i`; the window meets at most one document per position.
    first = bisect.bisect_left(range(count), start, key=lambda i: ends[i] + i)
    lasts = ends[first : first + real + 1] + np.arange(first, min(first + real + 1, count))
    before = ends[first - 1] + first - 1 if first else -1

    positions = start + np.arange(real)
    index = np.searchsorted(lasts, positions)
    begins = positions == np.concatenate([[before], lasts])[index] + 1
    ending = positions == lasts[index]
    # Where the target lies; the input lies one before it.
    token = positions - (first + index)
    inner = token[~ending]

    inputs = np.full(real, self._bos_id, np.int32)
    inputs[~begins] = self._documents.tokens[token[~begins] - 1]
    targets = np.full(real, self._eos_id, np.int32)
    targets[~ending] = self._documents.tokens[inner]
    trained = np.ones(real, bool)
    if self._documents.trained is not None:
      trained[~ending] = self._documents.trained[inner]
    arrays = {
      "inputs": inputs,
      "targets": targets,
      "reset": begins,
      "mask": np.ones(real, bool),
      "loss_mask": trained,
    }
    if real < length:
      arrays = {name: np.pad(array, (0, length - real)) for name, array in arrays.items()}
    return arrays


class PackedWindows:
  """The stream cut into windows of `seq_len`, the last one padded on the right.

  `windows[i]` is a dict of `inputs int32[t]`, `targets int32[t]`, and `reset`, `mask`, `loss_mask`
  of bool[t]. A document that crosses a boundary goes on in the next window without a reset, and
  there without its beginning; no token is lost.
  """

  def __init__(self, documents: Documents, *, bos_id: int, eos_id: int, seq_len: int):
    check_positive(seq_len=seq_len)
    self._stream = TokenStream(documents, bos_id, eos_id)
    self._seq_len = seq_len

  def __len__(self) -> int:
    return -(-len(self._stream) // self._seq_len)

  def __getitem__(self, index: int) -> Batch:
    if not 0 <= index < len(self):
      raise IndexError(f"expected a window in [0, {len(self)}), got {index}")
    return self._stream.read(index * self._seq_len, self._seq_len, self._seq_len)


def carried_batches(
  documents: Documents,
  *,
  bos_id: int,
  eos_id: int,
  seq_len: int,
  batch_size: int,
  max_tokens: int | None = None,
) -> Iterator[Batch]:
  """Batches for evaluation with a carried state, arrays `[batch_size, seq_len]`, in order.

  The first `max_tokens` positions of the stream are cut into `batch_size` contiguous rows of equal
  length, and row r of a batch goes on where row r of the batch before ended. Every position comes
  exactly once; rows that run out are masked. A row other than the first may begin inside a
  document, without a reset: the state it starts from is the caller's initial one.
  """
  check_positive(seq_len=seq_len, batch_size=batch_size)
  stream = TokenStream(documents, bos_id, eos_id)
  total = len(stream)
  if max_tokens is not None:
    check_positive(max_tokens=max_tokens)
    total = min(total, max_tokens)
  row_len = -(-total // batch_size)

  def read(column: int) -> Batch:
    rows = []
    for row in range(batch_size):
      start = row * row_len + column
      rows.append(stream.read(start, seq_len, min(row_len - column, total - start)))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  return (read(column) for column in range(0, row_len, seq_len))


def check_positive(**sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"expected {name} >= 1, got {size}")
