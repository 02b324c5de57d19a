"""Every mixer, block and model of `triform.arch` as a Linen module, under the same name.

    mixer = linen.Retention(num_heads=4)
    variables = mixer.init(key, x)
    y, state = mixer.apply(variables, x, state, reset=reset, form="chunkwise")

The arguments are those of the NNX class, and so are the methods and the variables: `"params"` has
the names and shapes that `nnx.Param` has there, `"batch_stats"` those of `nnx.BatchStat`. They are
the module's own, so it may be a part of other Linen modules, and be lifted by `nn.scan`, `nn.vmap`
and `nn.remat`. What differs, because Linen has it differently:

- `train=True` takes the place of `rngs`; dropout then draws from the `"dropout"` key of `apply`,
  and `"batch_stats"` are updated, so they must be mutable where there are any.
- `d_model` may be left out of a mixer: it is the width of its input.
- An argument that is a module is given as what makes it, called with `rngs`:
  `mixer=functools.partial(triform.arch.Retention, 64, num_heads=4)`.
- An argument with the name of something that every Linen module has gets an underscore: `init_`.

`to_variables` and the method `to_nnx` turn one kind into the other. `linen_class` makes a Linen
module of a `SequenceModule` from elsewhere.
"""

import collections.abc
import dataclasses
import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from triform import arch

from .interface import SequenceModule, State

COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def to_variables(model: nnx.Module) -> dict[str, dict[str, Any]]:
  """The variables of an NNX module, as its Linen module has them: `{"params": ..., ...}`.

  Names are strings, those of the layers of an unrolled stack too: `stack/layers/0/...`.
  """
  _, trees = _split(model)
  return {name: _with_string_keys(tree) for name, tree in trees.items() if tree}


class SequenceFacade(nn.Module):
  """What the Linen modules here have in common; see the docstring of `triform.arch.linen`."""

  nnx_class: typing.ClassVar[type[SequenceModule]]

  @nn.nowrap
  def init_state(self, batch_size: int, *, max_len: int | None = None) -> State:
    """The state before the first token, for which no variables are needed."""
    return self._abstract().init_state(batch_size, max_len=max_len)

  @nn.nowrap
  def to_nnx(self, variables: Mapping[str, Any]) -> SequenceModule:
    """The NNX module with these variables, which for example `triform.arch.generate` takes.

    Raises `ValueError` for variables that are not those of this module.
    """
    return _merge(self._abstract(), variables)

  @nn.nowrap
  def _make(self, rngs: nnx.Rngs, d_model: int | None) -> SequenceModule:
    options = {name: getattr(self, _field_name(name)) for name in _arguments(self.nnx_class)}
    if "d_model" in options and options["d_model"] is None:
      if d_model is None:
        raise ValueError(f"d_model is None, and {type(self).__name__} has no input to take it from")
      options["d_model"] = d_model
    for name, argument in _arguments(self.nnx_class).items():
      if _is_module(argument.annotation) and options[name] is not None:
        options[name] = _made(name, options[name], rngs)
    if _takes_rngs(self.nnx_class.__init__):
      options["rngs"] = rngs
    return self.nnx_class(**options)

  @nn.nowrap
  def _abstract(self, d_model: int | None = None) -> SequenceModule:
    return nnx.eval_shape(lambda: self._make(nnx.Rngs(0), d_model))

  @nn.nowrap
  def _call(self, method: str, args: tuple, kwargs: dict[str, Any], train: bool) -> Any:
    signature = inspect.signature(getattr(self.nnx_class, method))
    x = jax.tree.leaves(signature.bind(self, *args, **kwargs).arguments.get("x"))
    d_model = x[0].shape[-1] if x and hasattr(x[0], "shape") else None
    if self.is_initializing() and not self.variables.get("params"):
      self._put(to_variables(self._make(nnx.Rngs(self.make_rng("params")), d_model)))
    module = _merge(self._abstract(d_model), self.variables)
    if train:
      kwargs["rngs"] = nnx.Rngs(dropout=self.make_rng("dropout"))
    result = getattr(module, method)(*args, **kwargs)
    if train and not self.is_initializing():
      statistics = to_variables(module).get("batch_stats", {})
      self._put({"batch_stats": statistics})
    return result

  @nn.nowrap
  def _put(self, variables):
    for collection, tree in variables.items():
      for name, value in tree.items():
        self.put_variable(collection, name, value)


def linen_class(nnx_class: type[SequenceModule]) -> type[SequenceFacade]:
  """The Linen module of an NNX class; see the docstring of `triform.arch.linen`."""
  arguments = _arguments(nnx_class)
  positional = [a for a in arguments.values() if a.kind is a.POSITIONAL_OR_KEYWORD]
  if [a.name for a in positional] == ["d_model"]:
    positional = [positional[0].replace(default=None, annotation=int | None)]
  annotations, members = {}, {}
  for argument in (arguments | {a.name: a for a in positional}).values():
    name, default = _field_name(argument.name), argument.default
    annotations[name] = argument.annotation
    members[name] = dataclasses.field(
      default=dataclasses.MISSING if default is argument.empty else default,
      kw_only=argument.kind is argument.KEYWORD_ONLY,
    )
  for base in nnx_class.__mro__:
    if not issubclass(base, SequenceModule):
      break
    for name, value in vars(base).items():
      public = name == "__call__" or not name.startswith("_")
      if public and inspect.isfunction(value) and name not in dir(SequenceFacade):
        members.setdefault(name, _method(nnx_class, name))
    for name in inspect.get_annotations(base):
      members.setdefault(name, property(functools.partial(_attribute, name=name)))
  members |= {
    "__annotations__": annotations,
    "__doc__": f"`{nnx_class.__name__}` as a Linen module.\n\n{inspect.getdoc(nnx_class) or ''}",
    "__module__": __name__,
    "nnx_class": nnx_class,
  }
  return type(nnx_class.__name__, (SequenceFacade,), members)


def _method(nnx_class, name):
  function = getattr(nnx_class, name)
  signature = inspect.signature(function)
  trains = _takes_rngs(function)

  @functools.wraps(function)
  def method(self, *args, **kwargs):
    if "rngs" in kwargs:
      raise TypeError(f"{name}() takes train=True, and its key is among the rngs of apply()")
    train = kwargs.pop("train", False) if trains else False
    return self._call(name, args, kwargs, train)

  train = inspect.Parameter("train", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
  method.__signature__ = signature.replace(
    parameters=[train if p.name == "rngs" else p for p in signature.parameters.values()]
  )
  method.__doc__ = inspect.getdoc(function)
  return method


def _attribute(module, name):
  return getattr(module._abstract(), name)


@functools.cache
def _arguments(nnx_class: type) -> dict[str, inspect.Parameter]:
  """Arguments of the constructor, with those of its bases where it passes on `**options`."""
  arguments: dict[str, inspect.Parameter] = {}
  for base in nnx_class.__mro__:
    parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
    hints = typing.get_type_hints(base.__init__)
    for p in parameters:
      if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "rngs":
        arguments.setdefault(p.name, p.replace(annotation=hints.get(p.name, Any)))
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
      break
  return arguments


def _takes_rngs(function) -> bool:
  return "rngs" in inspect.signature(function).parameters


def _field_name(argument: str) -> str:
  return f"{argument}_" if hasattr(nn.Module, argument) else argument


def _is_module(annotation: Any) -> bool:
  if typing.get_origin(annotation) is collections.abc.Callable:  # makes modules, is none
    return False
  kinds = typing.get_args(annotation) or (annotation,)
  return any(isinstance(kind, type) and issubclass(kind, nnx.Module) for kind in kinds)


def _made(name, make, rngs):
  if isinstance(make, nnx.Module | nn.Module) or not callable(make):
    raise ValueError(
      f"{name} is a {type(make).__name__}, expected what makes an NNX module when it is called "
      f"with rngs, such as functools.partial(triform.arch.Retention, 64, num_heads=4)"
    )
  return make(rngs=rngs)


def _split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, dict]]:
  graphdef, *states, rest = nnx.split(module, *COLLECTIONS.values(), ...)
  if others := {type(v).__name__ for _, v in nnx.to_flat_state(rest)}:
    raise ValueError(
      f"{type(module).__name__} holds {', '.join(sorted(others))}, expected nnx.Param and "
      "nnx.BatchStat alone: take rngs in the call, and keep a state outside"
    )
  return graphdef, dict(zip(COLLECTIONS, map(nnx.to_pure_dict, states), strict=True))


def _merge(abstract: SequenceModule, variables: Mapping[str, Any]) -> SequenceModule:
  graphdef, expected = _split(abstract)
  trees = (_matched(variables.get(name, {}), tree, name) for name, tree in expected.items())
  return nnx.merge(graphdef, *trees)


def _matched(found: Any, expected: Any, path: str) -> Any:
  """`found` with the keys of `expected`, whose layers are numbers."""
  if not isinstance(expected, Mapping):
    if jnp.shape(found) != expected.shape:
      raise ValueError(f"{path} has shape {jnp.shape(found)}, expected {expected.shape}")
    return found
  if not isinstance(found, Mapping):
    raise ValueError(f"{path} is an array, expected {', '.join(map(str, expected))} in it")
  found = {str(key): value for key, value in found.items()}
  names = {str(key) for key in expected}
  for problem, wrong in (("lacks", names - found.keys()), ("has unknown", found.keys() - names)):
    if wrong:
      raise ValueError(f"{path} {problem} {', '.join(sorted(wrong))}")
  return {key: _matched(found[str(key)], value, f"{path}/{key}") for key, value in expected.items()}


def _with_string_keys(tree: Any) -> Any:
  if not isinstance(tree, Mapping):
    return tree
  return {str(key): _with_string_keys(value) for key, value in tree.items()}


_MODULES = {
  name: linen_class(value)
  for name in arch.__all__
  if inspect.isclass(value := getattr(arch, name))
  and issubclass(value, SequenceModule)
  and value is not SequenceModule
}
globals().update(_MODULES)
__all__ = ["SequenceFacade", "linen_class", "to_variables", *_MODULES]
