"""Models by name. Every file here that registers an architecture is found by itself."""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections.config_dict import placeholder

from ..closest import closest
from ..interface import SequenceModule
from .registry import find

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
  importlib.import_module(_module.name)


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
  settings = {**_defaults(model), **options}
  for name in ("dtype", "param_dtype"):
    if settings.get(name) is not None:
      settings[name] = jnp.dtype(settings[name]).name
  return {"architecture": config["architecture"], **settings}


def laid_out(config: Mapping[str, Any], *, scan_layers: bool) -> dict[str, Any]:
  """`config` with its layers scanned or unrolled, where the architecture has that option."""
  model, options = _resolve(config)
  choice = {"scan_layers": scan_layers} if "scan_layers" in _parameters(model) else {}
  return {"architecture": config["architecture"], **options, **choice}


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """As `complete`, where an option without a value is a placeholder that takes its type."""
  model, _ = _resolve(config)
  hints = typing.get_type_hints(model.__init__)
  settings = complete(config)
  for name, value in settings.items():
    if value is None:
      # Names stand for dtypes in a configuration, whatever else the constructor takes.
      kinds = [kind for kind in typing.get_args(hints[name]) if kind is not type(None)] or [str]
      settings[name] = placeholder(kinds[0])
  return settings


def _parameters(model: type[SequenceModule]) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(model.__init__).parameters
  return {name: p for name, p in parameters.items() if name not in ("self", "rngs")}


def _defaults(model: type[SequenceModule]) -> dict[str, Any]:
  return {n: p.default for n, p in _parameters(model).items() if p.default is not p.empty}


def _resolve(config: Mapping[str, Any]) -> tuple[type[SequenceModule], dict[str, Any]]:
  options = dict(config)
  architecture = options.pop("architecture", None)
  model = find(architecture).model
  known = set(_parameters(model))
  for name in sorted(set(options) - known):
    guess = closest(name, sorted(known))
    hint = f"did you mean {guess!r}?" if guess else f"it has {', '.join(sorted(known))}"
    raise ValueError(f"model option {name!r} is unknown to {architecture}; {hint}")
  return model, options
