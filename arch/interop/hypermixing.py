"""HyperMixing layers of idiap/hypermixing, the paper's own code, and of SpeechBrain."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..assembly import fill_module
from ..mixers.hypermixing import CausalHyperMixing, HyperMixing, encode_positions
from .checkpoint import (
  Table,
  Weight,
  convert,
  expect,
  param_dtype,
  read_config,
  require,
  revert,
)

DEFAULT_MAX_LENGTH = 3000  # of either library
SHARED = {"tied": False, "num_heads": 1, "max_length": DEFAULT_MAX_LENGTH}
IDIAP = {**SHARED, "hypernetwork_bias": False, "use_layer_norm": True, "causal": False}
IDIAP_POSITION = {"sinusoid": "official", "none": "none"}
SPEECHBRAIN = {**SHARED, "fix_tm_hidden_size": False}
TABLES = {"official": "token_information.pe", "standard": "positional_encoding.pe"}
NETWORKS = ("hyper.w1_gen.", "hyper.w2_gen.")


def from_idiap(
  config: Mapping[str, Any], params: Mapping[str, Any], **options
) -> HyperMixing | CausalHyperMixing:
  """The layer of idiap/hypermixing, in evaluation and training alike.

      y, () = from_idiap(config, params)(x, mask=mask)
      y, () = layer(queries, memory=(keys, values), memory_mask=mask)

  Args:
    config: the arguments of its constructor: `input_output_dim`, `hypernet_size`, and as far as
      they are not the defaults `tied`, `num_heads`, `max_length`, `hypernetwork_bias`,
      `use_layer_norm` and `token_information`: `"sinusoid"` or `"none"`. `causal=True`, ours, makes
      it the `CausalHyperMixing` that equals the layer on every prefix.
    params: its state dict as NumPy arrays. The table of positions is checked, not kept: any length
      is taken. Held in float32, or in float64 if they are that and JAX has it enabled, unless
      `param_dtype` is given.
    **options: passed to the layer: `chunk_size`, `dtype`, `param_dtype`.

  Raises:
    ValueError: for an option that is missing or not supported, or parameters that are missing,
      left over, of a wrong shape or another table of positions, all by name.
  """
  supported = {"token_information": tuple(IDIAP_POSITION)}
  settings = read_config(config, IDIAP, supported)
  require(settings, "input_output_dim", "hypernet_size")
  kind = CausalHyperMixing if settings["causal"] else HyperMixing
  return _layer(
    kind,
    "idiap",
    settings,
    params,
    mixing_dim=settings["hypernet_size"],
    use_bias=settings["hypernetwork_bias"],
    layer_norm=settings["use_layer_norm"],
    position=IDIAP_POSITION[settings["token_information"]],
    **options,
  )


def from_speechbrain(
  config: Mapping[str, Any], params: Mapping[str, Any], **options
) -> HyperMixing:
  """SpeechBrain's `HyperMixing`, which differs in its positions and always has biases.

  `config` holds the arguments of its constructor, `fix_tm_hidden_size` (every head has
  `hypernet_size` hidden units) among them; all else is as in `from_idiap`. Its attention mask and
  its keys and values, which that layer ignores, have no counterpart.
  """
  settings = read_config(config, SPEECHBRAIN, {})
  require(settings, "input_output_dim", "hypernet_size")
  size = settings["hypernet_size"]
  if settings["fix_tm_hidden_size"]:
    size *= settings["num_heads"]
  return _layer(
    HyperMixing,
    "SpeechBrain",
    settings,
    params,
    mixing_dim=size,
    use_bias=True,
    layer_norm=True,
    position="standard",
    **options,
  )


def to_idiap(
  layer: HyperMixing, *, max_length: int = DEFAULT_MAX_LENGTH
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_idiap`: arguments and state dict of the same function.

  Raises `ValueError` for a layer that the published code cannot be, naming the option.
  """
  expect("position", layer.position, *IDIAP_POSITION.values())
  config = {
    **_sizes(layer, max_length),
    "hypernet_size": layer.num_heads * layer.key_size,
    "hypernetwork_bias": layer.w1.input.bias is not None,
    "use_layer_norm": layer.norm is not None,
    "token_information": "none" if layer.position == "none" else "sinusoid",
  }
  return config, _params(layer, max_length)


def to_speechbrain(
  layer: HyperMixing, *, max_length: int = DEFAULT_MAX_LENGTH
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_speechbrain`. Raises `ValueError` as `to_idiap` does."""
  expect("position", layer.position, "standard")
  expect("use_bias", layer.w1.input.bias is not None, True)
  expect("layer_norm", layer.norm is not None, True)
  config = {**_sizes(layer, max_length), "hypernet_size": layer.num_heads * layer.key_size}
  return config, _params(layer, max_length)


def _layer(kind, source, settings, params, **options):
  params = dict(params)
  d, heads = settings["input_output_dim"], settings["num_heads"]
  if settings["tied"]:
    first, second = NETWORKS
    for name in [name for name in params if name.startswith(second)]:
      array = params.pop(name)
      if not np.array_equal(array, params.get(name.replace(second, first))):
        raise ValueError(f"the layer is tied, but {name} is not as in {first}*")
  position = options["position"]
  if position != "none":
    _check_table(position, params.pop(TABLES[position], None), settings["max_length"], d)
  held = {"param_dtype": param_dtype(params), **options}
  made = {"num_heads": heads, "tied": settings["tied"], **held}

  def make():
    return kind(d, **made, rngs=nnx.Rngs(0))

  table = _table(source, nnx.eval_shape(make))
  return fill_module(make, convert(params, table))


def _table(source: str, layer: HyperMixing | CausalHyperMixing) -> Table:
  h, k, e = layer.num_heads, layer.key_size, layer.value_size
  weights = {}
  for name, network in zip(NETWORKS, ("w1", "w2"), strict=True):
    if getattr(layer, network) is None:
      continue
    for part, ours, size in (("fc1", "input", e), ("fc2", "output", k)):
      target = f"params/{network}/{ours}"
      weights[f"{name}{part}_weights"] = Weight(
        f"{target}/kernel", (h, size, e), *[lambda a: a.swapaxes(1, 2)] * 2
      )
      if layer.w1.input.bias is not None:
        weights[f"{name}{part}_biases"] = Weight(f"{target}/bias", (h, size))
  if layer.norm is not None:
    weights["layer_norm.weight"] = Weight("params/norm/scale", (h * e,))
    weights["layer_norm.bias"] = Weight("params/norm/bias", (h * e,))
  return Table(source, weights, {}, 0, "")


def _positions(position: str, length: int, d: int) -> np.ndarray:
  """The published table, [1, length, d]: the official one has a row for position 0 too."""
  index = jnp.arange(length, dtype=jnp.uint32)[None]
  if position == "official":
    index -= 1  # its first token is at 1
  return np.asarray(encode_positions(position, index, d, jnp.dtype(jnp.float32)))


def _check_table(position, table, length, d):
  if table is None:
    raise ValueError(f"missing: {TABLES[position]}")
  if np.shape(table) != (1, length, d):
    raise ValueError(
      f"{TABLES[position]} has shape {list(np.shape(table))}, expected {[1, length, d]}"
    )
  # Phases in float32, as SpeechBrain's, are off by half an ulp of the position.
  furthest = np.abs(np.asarray(table) - _positions(position, length, d)).max()
  if not furthest <= 1e-6 + length * 2.0**-23:
    raise ValueError(f"{TABLES[position]} is off the {position} table by {furthest:.2g}")


def _sizes(layer: HyperMixing, max_length: int) -> dict[str, Any]:
  if not isinstance(layer, HyperMixing):
    raise ValueError(f"layer is a {type(layer).__name__}, expected HyperMixing")
  expect("activation", layer.activation, "gelu")
  if layer.norm is not None:
    expect("eps", layer.norm.epsilon, 1e-5)
  return {
    "input_output_dim": layer.d_model,
    "num_heads": layer.num_heads,
    "tied": layer.w2 is None,
    "max_length": max_length,
  }


def _params(layer: HyperMixing, max_length: int) -> dict[str, np.ndarray]:
  params = {
    name: np.asarray(tensor) for name, tensor in revert(layer, _table("HyperMixing", layer)).items()
  }
  first, second = NETWORKS
  if layer.w2 is None:
    params |= {n.replace(first, second): a for n, a in params.items() if n.startswith(first)}
  if layer.position != "none":
    params[TABLES[layer.position]] = _positions(layer.position, max_length, layer.d_model)
  return params
