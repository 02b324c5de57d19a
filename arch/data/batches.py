"""Training batches: shuffled rows of one source, or of several mixed by weight."""

import bisect
import math
import sys
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from .packing import Batch, Documents, PackedWindows, check_positive
from .processes import start_worker

_UNITS = 10**6  # to which weights are rounded, so that shares are exact integers


class _Mixture:
  """`mixture[row] -> (source, index)`: which source a row comes from, and the how-manieth of it.

  The first n rows of any n hold each source in proportion to its weight, to within one row for
  every source but one (two for three sources, and so on).
  """

  def __init__(self, weights: Sequence[float]):
    total = sum(weights)
    self._units = [max(1, round(_UNITS * weight / total)) for weight in weights]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, row: int) -> tuple[int, int]:
    before, after = self.counts(row), self.counts(row + 1)
    source = next(i for i, count in enumerate(before) if count != after[i])
    return source, before[source]

  def counts(self, rows: int) -> list[int]:
    """How many of the first `rows` rows come from each source."""
    counts, others = [], sum(self._units)
    for units in self._units:
      rest = rows * (others - units) // others
      counts.append(rows - rest)
      rows, others = rest, others - units
    return counts


class Rows(Protocol):
  """What batches are made of: dictionaries of arrays, of the same shapes in every row."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class ShuffledBatches:
  """Endless shuffled batches of rows.

  `batches[step]` is the batch of a step, or the rows of it that belong to `host`: arrays
  `[batch_size / num_hosts, ...]`, a function of the seed, the step and the host alone, so to
  resume is to go on with the next step. The rows of all hosts together, in their order, are the
  batch of one host.

  Every source is gone through again and again, each time in another order, and every row of it
  comes once each time; none is lost or repeated in between, on any number of hosts. A mixture
  takes its rows from the sources in proportion to their weights at any time. One epoch is the
  number of rows after which every source has been gone through: each row has then come at least
  once, and those of sources with more weight than rows more often. A batch may straddle two epochs.

  Args:
    sources: a sequence of them, to mix if there are several.
    weights: one positive number per source, of any sum; default equal ones.
    batch_size: rows of a step on all hosts together, a multiple of `num_hosts`.
    seed: of the order.
    host, num_hosts: whose rows to give, of how many.
    workers: processes that read ahead in `iterate`; 0 for threads of this process.
  """

  def __init__(
    self,
    sources: Sequence[Rows],
    *,
    weights: Sequence[float] | None = None,
    batch_size: int,
    seed: int,
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
  ):
    weights = [1.0] * len(sources) if weights is None else list(weights)
    check_positive(batch_size=batch_size, num_hosts=num_hosts)
    if not sources or len(weights) != len(sources):
      raise ValueError(f"expected a weight for every source, got {len(sources)} and {weights}")
    if not all(0 < weight < math.inf for weight in weights):
      raise ValueError(f"expected positive weights, got {weights}")
    if seed < 0:
      raise ValueError(f"expected seed >= 0, got {seed}")
    if not 0 <= host < num_hosts:
      raise ValueError(f"expected a host in [0, {num_hosts}), got {host}")
    if batch_size % num_hosts:
      raise ValueError(f"batch_size is {batch_size}, expected a multiple of the {num_hosts} hosts")
    if workers < 0:
      raise ValueError(f"expected workers >= 0, got {workers}")

    self._batch_size, self._workers = batch_size, workers
    self._rows_per_epoch = _rows_per_epoch(_Mixture(weights), [len(s) for s in sources])

    shuffled = [
      grain.MapDataset.source(s).seed((seed + i) % 2**32).shuffle().repeat()
      for i, s in enumerate(sources)
    ]
    rows = shuffled[0]
    if len(sources) > 1:
      rows = grain.MapDataset.select_from_datasets(shuffled, _Mixture(weights))
    # Without `drop_remainder` the length of an endless dataset overflows for a batch of one.
    batches = rows.batch(batch_size // num_hosts, drop_remainder=True)
    self._batches = batches[host::num_hosts]

  def __getitem__(self, step: int) -> Batch:
    return self._batches[step]

  def iterate(self, step: int = 0) -> Generator[Batch, None, None]:
    """An endless iterator over the batches from `step` on, read ahead.

    `close()` ends its threads or processes; so does the end of this process, however it comes.
    """
    # Three threads and as many batches ahead: a row costs little beside a training step.
    reading = grain.ReadOptions(num_threads=3, prefetch_buffer_size=3)
    dataset = self._batches[step:].to_iter_dataset(reading)
    if self._workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags of its own, also in a notebook
      options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=3)
      dataset = dataset.mp_prefetch(options, worker_init_fn=start_worker)
    iterator = iter(dataset)
    try:
      for batch in iterator:
        # Copied, for the memory of a worker's array goes when its process is stopped.
        yield {name: np.array(array) for name, array in batch.items()}
    finally:
      iterator.close()

  def steps(self, epochs: float = 1) -> int:
    """The number of steps by which `epochs` epochs are over."""
    if not 0 < epochs < math.inf:
      raise ValueError(f"expected a positive number of epochs, got {epochs}")
    return math.ceil(epochs * self._rows_per_epoch / self._batch_size)


class TrainBatches(ShuffledBatches):
  """Shuffled batches of packed windows, arrays `[batch_size / num_hosts, seq_len]`.

  Args:
    sources: the documents, or a sequence of them to mix.
    bos_id, eos_id: see `packing`.
    seq_len: tokens in a window. A source with fewer than that is a ValueError.
    options: the other arguments of `ShuffledBatches`.
  """

  def __init__(
    self,
    sources: Documents | Sequence[Documents],
    *,
    bos_id: int,
    eos_id: int,
    seq_len: int,
    **options: Any,
  ):
    sources = [sources] if isinstance(sources, Documents) else list(sources)
    windows = [
      PackedWindows(documents, bos_id=bos_id, eos_id=eos_id, seq_len=seq_len)
      for documents in sources
    ]
    for documents in sources:
      length = len(documents.tokens) + len(documents)
      if length < seq_len:
        raise ValueError(
          f"the text to train on has {length} tokens, expected at least one sequence: "
          f"seq_len is {seq_len}"
        )
    super().__init__(windows, **options)


def _rows_per_epoch(mixture: _Mixture, lengths: Sequence[int]) -> int:
  def complete(rows: int) -> bool:
    return all(a >= b for a, b in zip(mixture.counts(rows), lengths, strict=True))

  return bisect.bisect_left(range(2 * _UNITS * sum(lengths)), True, key=complete)
