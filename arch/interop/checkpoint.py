"""What the importers share: reading published parameters strictly, and filling a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..interface import SequenceModule
from ..layout import from_stacked, split_model

NAMES_SHOWN = 12


class Weight(NamedTuple):
  """Where one parameter of a published checkpoint goes."""

  target: str  # path in our model, see `arch.layout`
  shape: tuple[int, ...]  # in the checkpoint
  convert: Callable[[np.ndarray], np.ndarray] = lambda array: array


def transposed(target: str, *shape: int) -> Weight:
  """A linear layer: PyTorch keeps `(out, in)`, Flax `(in, out)`."""
  return Weight(f"{target}/kernel", shape, np.transpose)


def read_config(
  config: Mapping[str, Any], defaults: Mapping[str, Any], supported: Mapping[str, tuple]
) -> dict[str, Any]:
  """`config` completed with the source's defaults.

  `supported` lists, for options that change the function, the values that we compute; the first
  is the source's default. Any other value is an error, because its weights would load and then
  answer something else. Options that matter only to training or speed are left alone.
  """
  settings = {**defaults, **{name: values[0] for name, values in supported.items()}, **config}
  for name, values in supported.items():
    if settings[name] not in values:
      expected = " or ".join(map(repr, values))
      raise ValueError(f"{name} is {settings[name]!r}, which is not supported; expected {expected}")
  return settings


def convert(
  source: str,
  params: Mapping[str, Any],
  weights: Mapping[str, Weight],
  layer_weights: Mapping[str, Weight],
  num_layers: int,
  layer_prefix: str,
) -> dict[str, Any]:
  """The arrays of a checkpoint by their path in our model, a list for one that every layer has.

  Raises `ValueError` naming every parameter that is missing, unexpected, or of a wrong shape:
  each must be used exactly once.
  """
  expected = dict(weights)
  for i in range(num_layers):
    expected |= {f"{layer_prefix}{i}.{name}": weight for name, weight in layer_weights.items()}
  problems = []
  for what, names in (
    ("missing", expected.keys() - params.keys()),
    ("not expected", params.keys() - expected.keys()),
  ):
    if names:
      problems.append(f"{what}: {_listed(sorted(names))}")
  for name in expected.keys() & params.keys():
    shape = np.shape(params[name])
    if shape != expected[name].shape:
      problems.append(f"{name} has shape {list(shape)}, expected {list(expected[name].shape)}")
  if problems:
    raise ValueError(f"parameters do not fit the {source} config; {'; '.join(problems)}")

  leaves: dict[str, Any] = {
    weight.target: weight.convert(np.asarray(params[name])) for name, weight in weights.items()
  }
  for name, weight in layer_weights.items():
    leaves[weight.target] = [
      weight.convert(np.asarray(params[f"{layer_prefix}{i}.{name}"])) for i in range(num_layers)
    ]
  return leaves


def tied(params: Mapping[str, Any], embedding: str, head: str) -> dict[str, Any]:
  """`params` of a model with a tied output, whose checkpoint may hold the shared matrix twice."""
  params = dict(params)
  second = params.pop(head, None)
  if second is not None and not np.array_equal(second, params.get(embedding)):
    raise ValueError(f"the output is tied, but {head} and {embedding} differ")
  return params


def param_dtype(params: Mapping[str, Any]) -> np.dtype:
  """Dtype to hold `params` in: at least float32, and float64 only where JAX has it enabled."""
  widest = np.dtype(np.float32)
  for array in params.values():
    widest = jnp.promote_types(widest, np.asarray(array).dtype)
  return jax.dtypes.canonicalize_dtype(widest)


def fill(abstract: SequenceModule, leaves: Mapping[str, Any]) -> SequenceModule:
  """`abstract`, a model from `nnx.eval_shape`, with the arrays of `leaves` in it."""
  graphdef, params, variables = split_model(abstract)
  like = {"params": params, "variables": variables}

  def place(leaf, value):  # copies: on CPU an asarray may share the caller's memory
    if isinstance(value, list):
      return jnp.stack([jnp.array(layer, leaf.dtype) for layer in value])
    return jnp.array(value, leaf.dtype)

  filled = jax.tree.map(place, like, from_stacked(dict(leaves), like))
  return nnx.merge(graphdef, filled["params"], filled["variables"])


def _listed(names: list[str]) -> str:
  more = len(names) - NAMES_SHOWN
  return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
