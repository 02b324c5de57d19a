"""What importers and exporters share: reading published parameters strictly, and naming ours."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..interface import Scanned, SequenceModule
from ..layout import by_stacked_name, split_model
from ..mixers.retention import RetentionState
from ..models.retnet import RetNet
from ..tensors import Tensor

NAMES_SHOWN = 12


class Weight(NamedTuple):
  """Where one parameter of a published checkpoint goes, and how it gets there and back."""

  target: str  # path in our model, see `arch.layout`
  shape: tuple[int, ...]  # in the checkpoint
  convert: Callable[[np.ndarray], np.ndarray] | None = None
  revert: Callable[[np.ndarray], np.ndarray] | None = None


def transposed(target: str, *shape: int) -> Weight:
  """A linear layer."""
  return Weight(f"{target}/kernel", shape, np.transpose, np.transpose)


class Table(NamedTuple):
  """All parameters of a published model."""

  source: str  # the library
  weights: Mapping[str, Weight]
  layer_weights: Mapping[str, Weight]  # of every layer
  num_layers: int
  layer_prefix: str  # of names in a layer, with braces for its number

  def layer_name(self, name: str, layer: int) -> str:
    return self.layer_prefix.format(layer) + name


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


def require(config: Mapping[str, Any], *names: str) -> None:
  """Raises `ValueError` naming all options that `config` lacks."""
  if missing := [name for name in names if name not in config]:
    raise ValueError(f"the config lacks {', '.join(missing)}")


def expect(name: str, value: Any, *expected: Any) -> None:
  """Raises `ValueError` for an option with another value, which the other library cannot have."""
  if value not in expected:
    wanted = " or ".join(map(repr, expected))
    raise ValueError(f"{name} is {value!r}, which cannot be converted; expected {wanted}")


def layers_of(model: SequenceModule) -> SequenceModule:
  """A layer of the model, or all of them stacked: options and the last axes are the same."""
  return model.stack.layers if model.stack.scan else model.stack.layers[0]


def convert(params: Mapping[str, Any], table: Table) -> dict[str, Tensor]:
  """The arrays of a checkpoint by their path in our model, the layers stacked.

  They are read and converted when they are asked for. Raises `ValueError` naming every parameter
  that is missing, unexpected, or of a wrong shape: each must be used exactly once.
  """
  expected = dict(table.weights)
  for i in range(table.num_layers):
    expected |= {table.layer_name(name, i): weight for name, weight in table.layer_weights.items()}
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
    raise ValueError(f"parameters do not fit the {table.source} config; {'; '.join(problems)}")

  leaves = {w.target: _converted(w, params[name]) for name, w in table.weights.items()}
  for name, weight in table.layer_weights.items():
    layers = [
      _converted(weight, params[table.layer_name(name, i)]) for i in range(table.num_layers)
    ]
    leaves[weight.target] = _stacked(layers)
  return leaves


def revert(model: SequenceModule, table: Table) -> dict[str, Tensor]:
  """The inverse of `convert`: the parameters of a model by their names in the checkpoint."""
  _, params, variables = split_model(model)
  leaves = by_stacked_name({"params": params, "variables": variables})
  tensors = {name: _reverted(w, leaves[w.target]) for name, w in table.weights.items()}
  for i in range(table.num_layers):
    for name, weight in table.layer_weights.items():
      tensors[table.layer_name(name, i)] = _reverted(weight, leaves[weight.target], i)
  return tensors


def _converted(weight: Weight, array: Any) -> Tensor:
  if weight.convert is None:
    return Tensor(weight.shape, array.dtype, lambda: np.asarray(array))
  shape = weight.convert(np.broadcast_to(np.zeros((), array.dtype), weight.shape)).shape
  return Tensor(shape, array.dtype, lambda: weight.convert(np.asarray(array)))


def _stacked(layers: list[Tensor]) -> Tensor:
  shape, dtype = (len(layers), *layers[0].shape), layers[0].dtype

  def read() -> np.ndarray:
    whole = np.zeros(shape, dtype)
    for i, layer in enumerate(layers):
      whole[i] = layer
    return whole

  return Tensor(shape, dtype, read)


def _reverted(weight: Weight, leaf: Any, *layer: int) -> Tensor:
  def read() -> np.ndarray:
    array = np.asarray(leaf[layer[0]] if layer else leaf)
    return array if weight.revert is None else weight.revert(array)

  first = leaf[0] if isinstance(leaf, list) else leaf
  return Tensor(weight.shape, first.dtype, read)


def tied(params: Mapping[str, Any], embedding: str, head: str) -> dict[str, Any]:
  """`params` of a model with a tied output, whose checkpoint may hold the shared matrix twice."""
  params = dict(params)
  second = params.pop(head, None)
  if second is not None and not np.array_equal(second, params.get(embedding)):
    raise ValueError(f"the output is tied, but {head} and {embedding} differ")
  return params


def param_dtype(params: Mapping[str, Any]) -> str:
  """Dtype to hold `params` in: at least float32, and float64 only where JAX has it enabled."""
  widest = np.dtype(np.float32)
  for array in params.values():
    widest = jnp.promote_types(widest, array.dtype)
  return jax.dtypes.canonicalize_dtype(widest).name


def describe(model: RetNet, **expected) -> dict[str, Any]:
  """The options of `RetNet` that say which function `model` is.

  Raises `ValueError` naming one that is not as `expected`, which is all that the other library is.
  """
  layer = layers_of(model)
  mixer = layer.mixer
  options = {
    "vocab_size": model.vocab_size,
    "d_model": model.embedding.features,
    "num_layers": model.stack.num_layers,
    "num_heads": mixer.num_heads,
    "num_kv_heads": mixer.num_kv_heads,
    "key_dim": mixer.num_heads * mixer.key_size,
    "value_dim": mixer.num_heads * mixer.value_size,
    "ffn_dim": layer.feed_forward.input.out_features,
    "activation": layer.feed_forward.activation,
    "decay": mixer.decay,
    "decay_schedule": mixer.decay_schedule,
    "dialect": mixer.dialect,
    "embedding_scale": model.embedding_scale,
    "tie_embeddings": model.head is None,
    "eps": mixer.eps,
    "param_dtype": model.embedding.embedding[...].dtype.name,
  }
  for name, value in {"decay": "fixed", **expected}.items():
    expect(name, options[name], value)
  return options


def layer_states(model: RetNet, state: Any, dialect: str) -> tuple[list[np.ndarray], int]:
  """`kv` `[b, h, k, v]` of every layer, and the number of tokens that every row has seen."""
  describe(model, dialect=dialect)
  if model.stack.scan:
    states = [RetentionState(*(a[i] for a in state.layers)) for i in range(model.stack.num_layers)]
  else:
    states = state
  positions = np.asarray(states[0].position)
  if positions.min() != positions.max() or positions[0] == 0:
    raise ValueError(f"positions are {positions}, expected the same in all rows, at least 1")
  return [np.asarray(layer.kv) for layer in states], int(positions[0])


def model_state(model: RetNet, kvs: list[np.ndarray], length: int, dialect: str) -> Any:
  """The inverse of `layer_states`."""
  describe(model, dialect=dialect)
  if len(kvs) != model.stack.num_layers:
    raise ValueError(f"the cache has {len(kvs)} layers, expected {model.stack.num_layers}")
  like = jax.eval_shape(lambda: model.init_state(len(kvs[0])))
  kv_like = like.layers.kv if model.stack.scan else like[0].kv
  shape = kv_like.shape[-4:]
  for i, kv in enumerate(kvs):
    if kv.shape != shape:
      raise ValueError(f"the state of layer {i} is {list(kv.shape)}, expected {list(shape)}")
  position = jnp.full(shape[0], length, jnp.uint32)
  states = [RetentionState(jnp.array(kv, kv_like.dtype), position) for kv in kvs]
  if model.stack.scan:
    return Scanned(jax.tree.map(lambda *layers: jnp.stack(layers), *states))
  return tuple(states)


def _listed(names: list[str]) -> str:
  more = len(names) - NAMES_SHOWN
  return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
