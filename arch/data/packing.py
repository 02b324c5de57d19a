"""From tokenised documents to batches of packed windows.

A document t1 .. tn takes n + 1 positions of the token stream: it is told that it begins, and must
say that it ends.

    inputs   bos t1 .. tn        reset      true at bos, false elsewhere
    targets  t1 .. tn eos        mask       true; false in the padding after the stream's end
                                 loss_mask  mask, but false where the target is a token that is
                                            read and not trained on, such as one of a prompt

The documents follow one another in order. `PackedWindows` and `train_batches` cut the stream into
windows that are shuffled; `carried_batches` reads it in order, each batch continuing the last one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Documents:
  """Tokenised documents, one after another, without special tokens."""

  tokens: np.ndarray  # int32[n]
  ends: np.ndarray  # int64[docs], where each document ends in `tokens`
  trained: np.ndarray | None = None  # bool[n], false for tokens only to be read; None: all true

  def __post_init__(self):
    steps = np.diff(self.ends, prepend=0, append=len(self.tokens))
    if steps.min() < 0 or steps[-1] != 0:
      raise ValueError(
        f"expected ends that ascend to the {len(self.tokens)} tokens, got {self.ends}"
      )
    if self.trained is not None and len(self.trained) != len(self.tokens):
      raise ValueError(f"expected {len(self.tokens)} flags in trained, got {len(self.trained)}")

  @classmethod
  def from_arrays(cls, arrays: Sequence[np.ndarray]) -> "Documents":
    """Joins one int array per document."""
    lengths = [len(array) for array in arrays]
    tokens = np.concatenate([np.zeros(0, np.int32), *arrays], dtype=np.int32)
    return cls(tokens, np.cumsum(lengths, dtype=np.int64))

  def __len__(self) -> int:
    """Number of documents."""
    return len(self.ends)


class _Stream:
  """Random access to the stream of inputs and targets, without holding it in memory."""

  def __init__(self, documents: Documents, bos_id: int, eos_id: int):
    self._tokens, self._trained = documents.tokens, documents.trained
    self._bos_id, self._eos_id = bos_id, eos_id
    # Every earlier document shifts a token by its one extra position.
    index = np.arange(len(documents))
    self._firsts = np.concatenate([[0], documents.ends])[:-1] + index
    self._lasts = documents.ends + index

  def __len__(self) -> int:
    return len(self._tokens) + len(self._lasts)

  def read(
    self,
    positions: np.ndarray,  # int64[...]
    mask: np.ndarray,  # bool[...], false where there is nothing to read
  ) -> Batch:
    """The arrays of a batch at the given positions, each of their shape."""
    document = np.searchsorted(self._lasts, positions)
    document = np.minimum(document, len(self._lasts) - 1)
    first = positions == self._firsts[document]
    last = positions == self._lasts[document]
    token = positions - document  # where the target lies; the input lies one before it

    inputs = np.where(mask, self._bos_id, 0).astype(np.int32)
    inner = mask & ~first
    inputs[inner] = self._tokens[token[inner] - 1]
    targets = np.where(mask, self._eos_id, 0).astype(np.int32)
    inner = mask & ~last
    targets[inner] = self._tokens[token[inner]]
    loss_mask = mask.copy()
    if self._trained is not None:
      loss_mask[inner] = self._trained[token[inner]]
    return {
      "inputs": inputs,
      "targets": targets,
      "reset": first & mask,
      "mask": mask,
      "loss_mask": loss_mask,
    }


class PackedWindows:
  """The stream cut into windows of `seq_len`, the last one padded on the right.

  `windows[i]` is a dict of `inputs int32[t]`, `targets int32[t]`, and `reset`, `mask`, `loss_mask`
  of bool[t]. A document that crosses a boundary goes on in the next window without a reset, and
  there without its beginning; no token is lost.
  """

  def __init__(self, documents: Documents, *, bos_id: int, eos_id: int, seq_len: int):
    _check_positive(seq_len=seq_len)
    self._stream = _Stream(documents, bos_id, eos_id)
    self._seq_len = seq_len

  def __len__(self) -> int:
    return -(-len(self._stream) // self._seq_len)

  def __getitem__(self, index: int) -> Batch:
    if not 0 <= index < len(self):
      raise IndexError(f"expected a window in [0, {len(self)}), got {index}")
    positions = index * self._seq_len + np.arange(self._seq_len)
    return self._stream.read(positions, positions < len(self._stream))


def train_batches(
  documents: Documents, *, bos_id: int, eos_id: int, seq_len: int, batch_size: int, seed: int
) -> grain.MapDataset:
  """Endless shuffled batches of packed windows, arrays `[batch_size, seq_len]`.

  `batches[step]` depends on the seed and the step alone, so to resume is to go on with the next
  step. Every epoch has its own order and sees every window once; a batch may straddle two epochs.
  """
  _check_positive(batch_size=batch_size)
  if seed < 0:
    raise ValueError(f"expected seed >= 0, got {seed}")
  windows = PackedWindows(documents, bos_id=bos_id, eos_id=eos_id, seq_len=seq_len)
  if not len(windows):
    raise ValueError("expected at least one document to train on, got none")
  dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
  # Without `drop_remainder` the length of an endless dataset overflows for a batch of one.
  return dataset.batch(batch_size, drop_remainder=True)


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
  _check_positive(seq_len=seq_len, batch_size=batch_size)
  stream = _Stream(documents, bos_id, eos_id)
  total = len(stream)
  if max_tokens is not None:
    _check_positive(max_tokens=max_tokens)
    total = min(total, max_tokens)
  row_len = -(-total // batch_size)
  row_start = row_len * np.arange(batch_size)[:, None]

  def read(start: int) -> Batch:
    column = start + np.arange(seq_len)
    positions = row_start + column
    return stream.read(positions, (column < row_len) & (positions < total))

  return (read(start) for start in range(0, row_len, seq_len))


def _check_positive(**sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"expected {name} >= 1, got {size}")
