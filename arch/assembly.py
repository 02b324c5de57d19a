"""A model from values that were read somewhere, checked against what the model expects."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .interface import SequenceModule
from .layout import by_stacked_name, from_stacked, split_model, to_stacked
from .models import build, laid_out

PROBLEMS_SHOWN = 12


def expected_leaves(config: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of all that a file of the model `config` holds, by name as in `arch.layout`."""
  options = laid_out(config, scan_layers=True)
  model = nnx.eval_shape(lambda: build(options, rngs=nnx.Rngs(0)))
  _, params, variables = split_model(model)
  return to_stacked({"params": params, "variables": variables})


def check_leaves(
  source: Any,
  leaves: Mapping[str, Any],
  expected: Mapping[str, jax.ShapeDtypeStruct],
  *,
  dtypes: bool,
) -> None:
  """Raises `ValueError` with every name, shape and (if `dtypes`) dtype that is not as expected."""

  def describe(leaf):
    if leaf is None:
      return "nothing"
    return f"{leaf.dtype if dtypes else ''}{list(leaf.shape)}"

  problems = []
  for name in sorted(leaves.keys() | expected.keys()):
    held, wanted = (describe(side.get(name)) for side in (leaves, expected))
    if held != wanted:
      problems.append(f"  {name}: {held}, expected {wanted}")
  if problems:
    more = len(problems) - PROBLEMS_SHOWN
    if more > 0:
      problems[PROBLEMS_SHOWN:] = [f"  and {more} more"]
    raise ValueError(f"{source} does not fit the model; it has\n" + "\n".join(problems))


def fill(config: Mapping[str, Any], leaves: Mapping[str, Any]) -> SequenceModule:
  """The model of `config` with the values of `leaves`; see `fill_module`."""
  return fill_module(lambda: build(config, rngs=nnx.Rngs(0)), leaves)


def fill_module(make: Callable[[], SequenceModule], leaves: Mapping[str, Any]) -> SequenceModule:
  """What `make()` would give, with the values of `leaves`, by name as in `arch.layout`.

  Each leaf, any array-like, is read once and moved before the next one is, so memory holds the
  model and one leaf.
  """
  graphdef, params, variables = split_model(nnx.eval_shape(make))
  like = {"params": params, "variables": variables}
  filled = {}
  for name, leaf in by_stacked_name(like).items():
    value = np.asarray(leaves[name])
    # Copies: on CPU an asarray may share the memory of what was read.
    if isinstance(leaf, list):
      filled[name] = [jnp.array(a, b.dtype) for a, b in zip(value, leaf, strict=True)]
    else:
      filled[name] = jnp.array(value, leaf.dtype)
  model = from_stacked(filled, like)
  return nnx.merge(graphdef, model["params"], model["variables"])
