"""Several processes as one run: how they find each other, and what they have to agree on.

Where `start` was not called there is one process, and it agrees with itself.
"""

import contextlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(spec: str) -> None:
  """Makes this process one of several; before anything is computed.

  Args:
    spec: `auto` where JAX finds the others by itself (Slurm, Open MPI, Kubernetes, Cloud TPU), else
      `HOST:PORT,COUNT,INDEX`: where process 0 listens, how many there are, which of them this is.

  Raises:
    ValueError: if `spec` cannot be read, or is `auto` where JAX finds nothing.
  """
  if spec == "auto":
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError(
        f"processes is 'auto', but JAX knows no other process here ({error}): expected "
        "HOST:PORT,COUNT,INDEX"
      ) from error
    return
  match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", spec)
  if match is None or int(match[3]) >= int(match[2]):
    raise ValueError(
      f"processes is {spec!r}, expected auto or HOST:PORT,COUNT,INDEX with INDEX below COUNT, such "
      "as 10.0.0.1:1234,2,0"
    )
  jax.distributed.initialize(match[1], int(match[2]), int(match[3]))


def is_first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A mistake of the user's that one process finds in the block ends all, with the same error.

  For blocks in which no process waits for another.
  """
  if jax.process_count() == 1:
    yield
    return
  failure = None
  try:
    yield
  except (ValueError, OSError) as error:
    failure = error
  if message := next(filter(None, _texts("" if failure is None else str(failure))), None):
    raise ValueError(message) from failure


def check_same(what: str, value: str) -> None:
  """Raises a `ValueError` in every process unless `value` is the same in all."""
  values = _texts(value)
  for i, other in enumerate(values):
    if other != values[0]:
      raise ValueError(f"{what} of process {i} differs from that of process 0: expected the same")


def total(count: int) -> int:
  """The sum over all processes."""
  return int(multihost_utils.process_allgather(np.int32(count)).sum())


def wait() -> None:
  """Waits until every process is here."""
  total(0)


def _texts(text: str) -> list[str]:
  """What every process gives, in their order."""
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.pad(data, (0, lengths.max() - len(data)))
  rows = multihost_utils.process_allgather(padded)
  return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]
