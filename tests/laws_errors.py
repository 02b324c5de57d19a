"""How far two results are apart, and how far they may be.

Tolerances follow from the dtype. In float64 two algorithms for one function may differ by
`EXACT`. In a narrower dtype the truth is the same module in float64 with the same parameter
values, and a form may be twice as far from it as the simplest form, the recurrent one, in its own
dtype, plus 4 ulp: `2 * err(simplest) + 4 ulp`. Both errors are medians over a few cases that differ
in their numbers alone, because how one of them happens to be rounded moves either by a factor of
two in one case of a hundred. They are relative Frobenius norms. Gradients are
measured per kind (parameters, inputs, incoming state): a head norm makes the gradient of a query
a difference of nearly equal terms, so that a single leaf's rounding is that of the whole.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from laws_bench import Outcome, floats, widen

# Some thousand operations lie between an input and a gradient, each off by 2**-53 at most.
EXACT = 1e-12


def counters(tree: Any) -> list:
  leaves = [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]
  return [np.asarray(a) for a in leaves if not jnp.issubdtype(a.dtype, jnp.floating)]


def error(tree: Any, truth: Any) -> float:
  """Relative Frobenius error over all leaves; absolute where the truth is zero."""
  pairs = list(zip(*(map(widen, floats(t)) for t in (tree, truth)), strict=True))
  difference = sum(np.sum((a - b) ** 2) for a, b in pairs) ** 0.5
  scale = sum(np.sum(b**2) for _, b in pairs) ** 0.5
  return difference / (scale or 1.0)


def kinds(outcome: Outcome, real: np.ndarray) -> dict[str, Any]:
  """The parts of an outcome that are measured separately. Outputs of padding are not among them."""
  parts = {"outputs": widen(outcome.y)[real], "gradient of parameters": outcome.parameters}
  parts |= {f"state {i}": leaf for i, leaf in enumerate(floats(outcome.state))}
  parts |= {"gradient of inputs": outcome.inputs, "gradient of state": outcome.incoming}
  parts["statistics"] = outcome.statistics
  return parts


def assert_close(dtype, samples: list[tuple[dict, dict, dict]]) -> None:
  """`got` is the truth, as far as the dtype allows; see the module's docstring.

  Args:
    dtype: of `got` and `simplest`.
    samples: `got`, `simplest` and `truth` by kind, of cases that are alike.
  """
  for kind in samples[0][0]:
    got, simplest = (
      np.median([error(sample[i][kind], sample[2][kind]) for sample in samples]) for i in (0, 1)
    )
    allowed = EXACT
    if dtype != jnp.float64:
      allowed = 2 * simplest + 4 * float(jnp.finfo(dtype).eps)
    assert got <= allowed, f"{kind} off by {got:.2g}, allowed {allowed:.2g}"


def assert_same_counters(state: Any, expected: Any) -> None:
  chex.assert_trees_all_equal(counters(state), counters(expected))


def equations(f: Callable, *args: Any) -> list[jax.extend.core.JaxprEqn]:
  """Every equation of a traced function, those of loops and kernels included."""

  def is_jaxpr(parameter):
    return hasattr(parameter, "eqns")

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
        if is_jaxpr(inner):
          yield from walk(inner)

  return list(walk(jax.make_jaxpr(f)(*args).jaxpr))


def intermediates(f: Callable, *args: Any) -> list[jax.core.ShapedArray]:
  """Every value that a traced function computes."""
  return [v.aval for equation in equations(f, *args) for v in equation.outvars]


def largest(f: Callable, *args: Any) -> int:
  return max(a.size for a in intermediates(f, *args))
