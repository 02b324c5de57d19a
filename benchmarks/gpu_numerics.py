"""Errors of the GPU kernel of retention against float64, by the tolerances of the tests."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measure import told

from triform import kernels

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from retention_errors import EPS, B, errors, numbers

Row = dict[str, Any]
RESULTS = ("out", "gradient of q", "gradient of k", "gradient of v")


class Case(NamedTuple):
  """Heads of two rows; `packed` ones have documents and padding."""

  name: str
  t: int
  h: int
  g: int
  k: int
  v: int
  decay: str = "[h]"
  packed: bool = False


CASES = (
  Case("equal heads", 256, 4, 4, 128, 128),
  Case("the paper's heads", 192, 2, 2, 256, 512),
  Case("shared keys, sizes filled up", 70, 4, 2, 100, 200),
  Case("packed and padded", 300, 4, 2, 128, 128, packed=True),
  Case("decays per token", 256, 2, 2, 128, 64, "[b, t, h]"),
  Case("decays per token, packed and padded", 300, 2, 1, 64, 256, "[b, t, h]", packed=True),
  Case("in pieces", 2048, 1, 1, 128, 128),
  Case("in pieces, packed and padded", 2048, 1, 1, 128, 128, "[b, t, h]", packed=True),
)


def kernel(arrays, reset, mask):
  *arrays, state = arrays
  return kernels.retention(*arrays, state=state, reset=reset, mask=mask, implementation="gpu")


def check(dtype: str, retention: Callable = kernel, cases: Iterable[Case] = CASES) -> Iterator[Row]:
  """A row for every result and gradient of `retention(arrays, reset, mask)`; see `errors`.

  What is raised is a row as well, so that the rest is known too.
  """
  for name, t, h, g, k, v, decay, packed in cases:
    rng = np.random.default_rng(2)
    tokens = (rng.random((B, t)) < 0.03, rng.random((B, t)) < 0.8) if packed else (None, None)
    arrays = numbers(0, t, decay, h, g, k, v, dtype)
    try:
      found = errors(retention, arrays, *tokens, by_differences=dtype == "float32")
    except Exception as error:
      yield failed(name, dtype, error)
      continue
    for one in found:
      yield row(name, dtype, *one)


def check_at_size(case: str, results: Callable[..., Any]) -> Iterator[Row]:
  """Of the kernel's outputs and gradients where it fills the chip, too large for float64.

  Twice the error of XLA's chunkwise form in bfloat16 is allowed and four roundings. What is exact
  is that form in float32, its products too.

  Args:
    case: the shape's name.
    results: `results(dtype, implementation=...)`.
  """
  try:
    with jax.default_matmul_precision("highest"):
      exact = results("float32", implementation="xla")
    simple, got = (results("bfloat16", implementation=name) for name in ("xla", "gpu"))
    for name, *of in zip(RESULTS, *map(jax.tree.leaves, (got, simple, exact)), strict=True):
      one, other, true = of
      allowed = 2 * float(_apart(other, true)) + 4 * EPS["bfloat16"]
      yield row(case, "bfloat16", name, float(_apart(one, true)), allowed)
  except Exception as error:
    yield failed(case, "bfloat16", error)


@jax.jit
def _apart(one, true):
  return jnp.linalg.norm(one.astype(jnp.float32) - true) / jnp.linalg.norm(true)


def row(case: str, dtype: str, result: str, error: float, allowed: float) -> Row:
  """Not ok if the error is no number, which JSON has as null."""
  values = {"error": error if math.isfinite(error) else None, "allowed": allowed}
  return {"case": case, "dtype": dtype, "result": result, **values, "ok": bool(error <= allowed)}


def failed(case: str, dtype: str, error: Exception) -> Row:
  return {"case": case, "dtype": dtype, "failed": told(error), "ok": False}


def show(rows: Iterable[Row]) -> list[Row]:
  """Prints rows as they come."""
  kept = []
  for one in rows:
    text = f"{one['case']:36} {one['dtype']:9} "
    if "failed" in one:
      text += one["failed"]
    else:
      error = "no number" if one["error"] is None else f"{one['error']:.2e}"
      text += f"{one['result']:22} {error:>9} {one['allowed']:9.2e}"
      text += "" if one["ok"] else "  TOO LARGE"
    print(text, flush=True)
    kept.append(one)
  return kept
