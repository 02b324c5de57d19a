"""How many chunks a grid step of the TPU kernels takes, and what of it fits on chip."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from . import tuned

BLOCK = 4  # chunks at most: enough for their latencies to hide behind each other
MOST = 8  # chunks at most that a measurement may choose: a step's are unrolled
VMEM = 64 * 2**20  # bytes of a core's memory, at most

Pass = Literal["forward", "backward"]  # "backward" with the forward pass that saves states for it


def make_key(of: Pass, dtype, packed: bool, k: int, v: int, n: int) -> dict[str, Any]:
  """What the best number depends on, of rows of `n` chunks.

  Rows that are `packed` have weights of their own in every chunk. Their length matters by what
  divides it: how many steps there are changes nothing in one.
  """
  sizes = {"k": k, "v": v, "divisor": math.gcd(n, MOST)}
  return {"kernel": "tpu", "pass": of, "dtype": str(dtype), "packed": packed, **sizes}


def choose(asked: int | None, n: int, key: dict[str, Any]) -> int:
  """Chunks in a step, of `n`: what is asked for, else was measured, else at most `BLOCK`."""
  if asked is not None:
    return _checked("chunks", asked, n)
  measured = tuned.look_up(key)
  if measured is not None:
    return _checked(f"chunks in {tuned.TABLE}", measured.get("chunks"), key["divisor"])
  return heuristic(n)


def heuristic(n: int) -> int:
  return math.gcd(n, BLOCK)


def divisors(n: int) -> list[int]:
  return [c for c in range(1, MOST + 1) if n % c == 0]


def _checked(name, chunks, n):
  if chunks not in divisors(n):
    expected = ", ".join(map(str, divisors(n)))
    raise ValueError(f"{name} is {chunks!r}, expected a divisor of the row's {n}: {expected}")
  return chunks


def check_memory(chunks: int, blocks: Iterable, scratch: Iterable) -> None:
  """Raises `ValueError` if a step's blocks, each twice, and its scratch do not fit.

  Both are of `(shape, dtype)`; a block is read or written while the next step has its own.
  """

  def size(arrays):
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)

  used = 2 * size(blocks) + size(scratch)
  if used > VMEM:
    raise ValueError(
      f"chunks is {chunks}: a step needs {used} bytes of VMEM, expected at most {VMEM}"
    )
