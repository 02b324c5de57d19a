"""A model's parameters as plain trees, and the two layouts a stack's can have.

A scanned stack holds one array per parameter with a leading layer axis
(`stack/layers/mixer/query/kernel`), an unrolled one an array per layer
(`stack/layers/0/mixer/query/kernel`). Files hold the first, so that a checkpoint can be read by
a model of either layout; a tree may be any pytree that contains such parameters, an optimizer's
state included.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_LAYER = re.compile(r"(?:^|(?<=/))layers/(\d+)/")


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
  """Graph, parameters and other variables of a model, as pure dictionaries."""
  graphdef, params, variables = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(variables)


def to_stacked(tree: Any) -> dict[str, jax.Array]:
  """Every leaf by its path, the layers of unrolled stacks stacked. Leaves may be abstract."""
  leaves = by_stacked_name(tree)
  return {name: _stack(leaf) if isinstance(leaf, list) else leaf for name, leaf in leaves.items()}


def by_stacked_name(tree: Any) -> dict[str, Any]:
  """The leaves of `to_stacked` before stacking: one, or the list of an unrolled stack's layers."""
  leaves: dict[str, Any] = {}
  for name, leaf in _named_leaves(tree):
    stacked_name, layer = _stacked_name(name)
    if layer is None:
      leaves[stacked_name] = leaf
    else:
      leaves.setdefault(stacked_name, []).append(leaf)
  return leaves


def from_stacked(leaves: dict[str, Any], like: Any) -> Any:
  """The inverse of `to_stacked` (or `by_stacked_name`) for a tree of the structure of `like`."""

  def find(name):
    stacked_name, layer = _stacked_name(name)
    return leaves[stacked_name] if layer is None else leaves[stacked_name][layer]

  return jax.tree.unflatten(
    jax.tree.structure(like), [find(name) for name, _ in _named_leaves(like)]
  )


def stacked_names(tree: Any) -> Any:
  """The name that every leaf of `tree` has in `to_stacked`, in the structure of `tree`."""
  names = [_stacked_name(name)[0] for name, _ in _named_leaves(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), names)


def _named_leaves(tree):
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]


def _stacked_name(name: str) -> tuple[str, int | None]:
  match = _LAYER.search(name)
  if match is None:
    return name, None
  return name[: match.start()] + "layers/" + name[match.end() :], int(match[1])


def _stack(leaves):
  if isinstance(leaves[0], jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
  return jnp.stack(leaves)
