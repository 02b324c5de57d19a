"""Models by name."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..interface import SequenceModule
from .retnet import RetNet

ARCHITECTURES = {"retnet": RetNet}
# How a model is computed and trained; any other option says which function it is.
FREE_OPTIONS = frozenset({"chunk_size", "dropout", "dtype", "param_dtype", "scan_layers"})


def build(config: Mapping[str, Any], *, rngs: nnx.Rngs) -> SequenceModule:
  """The model that `config` describes: `architecture` names it, the rest are its arguments.

  `config` is the `model` section of any file in `configs/`, complete by itself.
  Raises `ValueError` for an unknown architecture or option, naming the closest valid one.
  """
  model, options = _resolve(config)
  return model(**options, rngs=rngs)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """`config` with the defaults of the options it leaves out, which a later version may change."""
  model, options = _resolve(config)
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(model.__init__).parameters.items()
    if parameter.default is not parameter.empty
  }
  settings = {**defaults, **options}
  for name in ("dtype", "param_dtype"):
    if settings.get(name) is not None:
      settings[name] = jnp.dtype(settings[name]).name
  return {"architecture": config["architecture"], **settings}


def _resolve(config: Mapping[str, Any]) -> tuple[type[SequenceModule], dict[str, Any]]:
  options = dict(config)
  architecture = options.pop("architecture", None)
  if architecture not in ARCHITECTURES:
    known = ", ".join(ARCHITECTURES)
    raise ValueError(f"architecture is {architecture!r}, expected one of {known}")
  model = ARCHITECTURES[architecture]
  known = set(inspect.signature(model.__init__).parameters) - {"self", "rngs"}
  for name in set(options) - known:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"
    raise ValueError(f"model option {name!r} is unknown to {architecture}{hint}")
  return model, options
