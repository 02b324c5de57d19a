"""RetNet checkpoints of torchscale (microsoft/torchscale), and its decoding caches."""

import functools
from collections.abc import Mapping
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from ..assembly import fill
from ..mixers.retention import DecaySchedule, log_decays, rotary_angles
from ..models.retnet import RetNet
from .checkpoint import (
  Table,
  Weight,
  convert,
  describe,
  layer_states,
  layers_of,
  model_state,
  param_dtype,
  read_config,
  revert,
  tied,
  transposed,
)

DEFAULTS = {
  "decoder_embed_dim": 768,
  "decoder_value_embed_dim": 1280,
  "decoder_retention_heads": 3,
  "decoder_ffn_embed_dim": 1280,
  "decoder_layers": 12,
  "activation_fn": "gelu",
  "no_scale_embedding": True,
  "share_decoder_input_output_embed": False,
  "layernorm_eps": 1e-6,
  "vocab_size": -1,
}
SUPPORTED = {
  "decoder_normalize_before": (True,),
  "deepnorm": (False,),
  "layernorm_embedding": (False,),
  "moe_freq": (0,),
  "multiway": (False,),
  "no_output_layer": (False,),
}
ACTIVATIONS = {"swish": "silu", "gelu": "gelu", "relu": "relu"}
EMBEDDING, HEAD = "embed_tokens.weight", "output_projection.weight"
ANGLE, DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"


def from_torchscale(config: Mapping[str, Any], params: Mapping[str, Any], **options) -> RetNet:
  """The language model of a torchscale `RetNetDecoder` checkpoint.

      state_dict = {name: tensor.float().numpy() for name, tensor in decoder.state_dict().items()}
      model = from_torchscale(vars(retnet_config), state_dict)
      logits, state = model(ids, form="chunkwise")

  The logits are those of torchscale's recurrent form. Its parallel and chunkwise forms also
  divide every row by a clamped sum, which the head norm undoes except for `layernorm_eps`.
  Rotary angles and decays are computed, those in `retnet_rel_pos` must be the same up to rounding.

  Args:
    config: torchscale's own option names. What is missing has the default of `RetNetConfig`,
      whatever the checkpoint came from: fairseq's language model has other defaults
      (`activation_fn="swish"`, `no_scale_embedding=False`), and its arguments hold them.
      Options of training and speed (dropout, chunk size) are ignored.
    params: the state dict as NumPy arrays, names with or without `decoder.` in front. Held in
      float32, or in float64 if they are that and JAX has it enabled, unless `param_dtype` is
      given.
    **options: passed to `RetNet`: `scan_layers`, `chunk_size`, `dtype`, `param_dtype`, `dropout`.

  Raises:
    ValueError: for an option that is not supported, the layout torchscale had before October
      2023, or parameters that are missing, left over, or of a wrong shape, all by name.
  """
  model, leaves = read(config, params)
  return fill({**model, "param_dtype": param_dtype(params), **options}, leaves)


def to_torchscale(model: RetNet) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_torchscale`: options and state dict of the same function in torchscale.

      config, params = to_torchscale(model)
      decoder = RetNetDecoder(RetNetConfig(**config), embed_tokens)
      decoder.load_state_dict({name: torch.tensor(array) for name, array in params.items()})

  Raises `ValueError` for a model that torchscale's RetNet cannot be, naming the option.
  """
  options = describe(model, dialect="torchscale")
  d = options["d_model"]
  for name, expected in (
    ("num_kv_heads", {options["num_heads"]}),
    ("key_dim", {d}),
    ("embedding_scale", {1.0, d**0.5}),
    ("activation", set(ACTIVATIONS.values())),
  ):
    if options[name] not in expected:
      known = " or ".join(map(repr, sorted(expected)))
      raise ValueError(f"{name} is {options[name]!r}, which torchscale has not; expected {known}")
  names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  config = {
    "decoder_embed_dim": d,
    "decoder_value_embed_dim": options["value_dim"],
    "decoder_retention_heads": options["num_heads"],
    "decoder_ffn_embed_dim": options["ffn_dim"],
    "decoder_layers": options["num_layers"],
    "activation_fn": names[options["activation"]],
    "no_scale_embedding": options["embedding_scale"] == 1.0,
    "share_decoder_input_output_embed": options["tie_embeddings"],
    "layernorm_eps": options["eps"],
    "vocab_size": options["vocab_size"],
    **{name: values[0] for name, values in SUPPORTED.items()},
  }
  params = {name: np.asarray(tensor) for name, tensor in revert(model, _table(options)).items()}
  if options["tie_embeddings"]:
    params[HEAD] = params[EMBEDDING]  # torchscale keeps the shared matrix under both names
  angles = rotary_angles(d // options["num_heads"], "torchscale")
  params[ANGLE] = np.repeat(angles, 2).astype(np.float32)
  params[DECAY] = log_decays(options["num_heads"], options["decay_schedule"]).astype(np.float32)
  return config, params


def read(
  config: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The `model` section, and the leaves by name as in `arch.layout`, of a checkpoint."""
  settings = read_config(config, DEFAULTS, SUPPORTED)
  activation = settings["activation_fn"]
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation_fn is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
  if params and all(name.startswith("decoder.") for name in params):
    params = {name.removeprefix("decoder."): array for name, array in params.items()}
  _check_layout(params)
  if settings["share_decoder_input_output_embed"]:
    params = tied(params, EMBEDDING, HEAD)
  if settings["vocab_size"] <= 0:  # then torchscale leaves it to the embedding it is given
    if EMBEDDING not in params:
      raise ValueError(f"vocab_size is {settings['vocab_size']}, and {EMBEDDING} is missing")
    settings["vocab_size"] = params[EMBEDDING].shape[0]
  model = {
    "architecture": "retnet",
    "vocab_size": settings["vocab_size"],
    "d_model": settings["decoder_embed_dim"],
    "num_layers": settings["decoder_layers"],
    "num_heads": settings["decoder_retention_heads"],
    "value_dim": settings["decoder_value_embed_dim"],
    "ffn_dim": settings["decoder_ffn_embed_dim"],
    "activation": ACTIVATIONS[activation],
    "dialect": "torchscale",
    "embedding_scale": 1.0 if settings["no_scale_embedding"] else None,
    "tie_embeddings": settings["share_decoder_input_output_embed"],
    "eps": settings["layernorm_eps"],
  }
  params, heads = dict(params), model["num_heads"]
  model["decay_schedule"] = _schedule(params.pop(DECAY, None), heads)
  _check_angles(params.pop(ANGLE, None), model["d_model"] // heads)
  return model, convert(params, _table(model))


def _table(model: Mapping[str, Any]) -> Table:
  d, v, f = model["d_model"], model["value_dim"], model["ffn_dim"]
  halves = functools.partial(_pairs_to_halves, num_heads=model["num_heads"])
  pairs = functools.partial(_halves_to_pairs, num_heads=model["num_heads"])
  block = "params/stack/layers"
  layer_weights = {
    "retention_layer_norm.weight": Weight(f"{block}/mixer_norm/scale", (d,)),
    "retention.q_proj.weight": Weight(f"{block}/mixer/query/kernel", (d, d), halves, pairs),
    "retention.k_proj.weight": Weight(f"{block}/mixer/key/kernel", (d, d), halves, pairs),
    "retention.v_proj.weight": transposed(f"{block}/mixer/value", v, d),
    "retention.g_proj.weight": transposed(f"{block}/mixer/gate", v, d),
    "retention.out_proj.weight": transposed(f"{block}/mixer/output", d, v),
    "final_layer_norm.weight": Weight(f"{block}/feed_forward_norm/scale", (d,)),
    "ffn.fc1.weight": transposed(f"{block}/feed_forward/input", f, d),
    "ffn.gate.weight": transposed(f"{block}/feed_forward/gate", f, d),
    "ffn.fc2.weight": transposed(f"{block}/feed_forward/output", d, f),
  }
  weights = {
    EMBEDDING: Weight("params/embedding/embedding", (model["vocab_size"], d)),
    "layer_norm.weight": Weight("params/norm/scale", (d,)),
  }
  if not model["tie_embeddings"]:
    weights[HEAD] = transposed("params/head", model["vocab_size"], d)
  return Table("torchscale", weights, layer_weights, model["num_layers"], "layers.{}.")


def _schedule(decay: Any, num_heads: int) -> str:
  """The name of the decays that a checkpoint holds; torchscale's own where it holds none."""
  if decay is None:
    return "geometric"
  for schedule in get_args(DecaySchedule):
    if _equal(decay, log_decays(num_heads, schedule)):
      return schedule
  given, expected = np.asarray(decay).tolist(), log_decays(num_heads, "geometric").tolist()
  raise ValueError(f"{DECAY} is {given}, which is not supported; expected {expected}")


def _check_angles(angle: Any, size: int) -> None:
  expected = np.repeat(rotary_angles(size, "torchscale"), 2)
  if angle is not None and not _equal(angle, expected):
    raise ValueError(f"{ANGLE} is not supported: expected the {size} that torchscale computes")


def _equal(buffer: Any, expected: np.ndarray) -> bool:
  """Up to rounding: torchscale has 1 - decay in float32, and `half()` rounds buffers too."""
  rtol = max(1e-5, 2 * float(jnp.finfo(buffer.dtype).eps))
  buffer = np.asarray(buffer, np.float64)
  return buffer.shape == expected.shape and np.allclose(buffer, expected, rtol=rtol, atol=2**-23)


def _check_layout(params):
  """Raises for the parameters of functions that torchscale had or has, and we do not compute."""
  marks = {
    "moe_layer.": "mixture-of-experts layers",
    "layernorm_embedding.": "a norm after the embedding",
    ".bias": "the layout of before October 2023 (LayerNorm, biases, no gate in the feed-forward)",
  }
  for mark, layout in marks.items():
    for name in params:
      if mark in name:
        raise ValueError(f"{name} belongs to {layout}, which is not supported")


def _pairs_to_halves(weight, *, num_heads):  # [h k, d] -> [d, h k]
  """torchscale rotates neighbours (2i, 2i+1), we rotate (i, i + k/2); scores stay the same."""
  pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
  return pairs.swapaxes(1, 2).reshape(weight.shape).T


def _halves_to_pairs(kernel: np.ndarray, *, num_heads: int) -> np.ndarray:  # [d, h k] -> [h k, d]
  halves = kernel.T.reshape(num_heads, 2, -1, kernel.shape[0])
  return halves.swapaxes(1, 2).reshape(kernel.shape[::-1])


def state_to_torchscale(model: RetNet, state: Any) -> tuple[dict[int, dict[str, np.ndarray]], int]:
  """The decoding cache with which torchscale goes on after `state` of `model`, and its length.

  That is `incremental_state`: per layer `prev_key_value` `[b, h, v, k]`, the transposed state over
  `s_n`, and `scale` `[h]`, `s_n^2`. torchscale keeps the length only as that of the tokens it is
  called with. All rows must have seen the same number of tokens: `scale` has no batch axis.
  """
  kvs, length = layer_states(model, state, "torchscale")
  mixer = layers_of(model).mixer
  decays = log_decays(mixer.num_heads, mixer.decay_schedule)
  scale = np.exp(np.outer(decays, np.arange(length))).sum(axis=1)
  cache = {}
  for i, kv in enumerate(kvs):
    pairs = np.stack(np.split(kv, 2, axis=2), axis=3).reshape(kv.shape)
    previous = pairs.swapaxes(-1, -2) / np.sqrt(scale)[:, None, None]
    cache[i] = {"prev_key_value": previous.astype(kv.dtype), "scale": scale.astype(kv.dtype)}
  return cache, length


def state_from_torchscale(model: RetNet, cache: Mapping[int, Any], length: int) -> Any:
  """The state of `model` for a torchscale `cache` after `length` tokens.

  The inverse of `state_to_torchscale`.
  """
  kvs = []
  for i in range(len(cache)):
    previous, scale = (np.asarray(cache[i][name]) for name in ("prev_key_value", "scale"))
    kv = np.sqrt(scale)[:, None, None] * previous.swapaxes(-1, -2)
    kvs.append(np.concatenate([kv[:, :, 0::2], kv[:, :, 1::2]], axis=2))
  return model_state(model, kvs, length, "torchscale")
