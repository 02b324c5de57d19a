"""RetNet checkpoints of torchscale (microsoft/torchscale), and its decoding caches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform import kernels

from ..interface import Scanned
from ..mixers.retention import RetentionState, log_decays, rotary_angles
from ..models.retnet import RetNet
from .checkpoint import Weight, convert, fill, param_dtype, read_config, tied, transposed

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
BUFFERS = "variables/stack/layers/mixer"


def from_torchscale(config: Mapping[str, Any], params: Mapping[str, Any], **options) -> RetNet:
  """The language model of a torchscale `RetNetDecoder` checkpoint.

      state_dict = {name: tensor.float().numpy() for name, tensor in decoder.state_dict().items()}
      model = from_torchscale(vars(retnet_config), state_dict)
      logits, state = model(ids, form="chunkwise")

  The logits are those of torchscale's recurrent form. Its parallel and chunkwise forms also
  divide every row by a clamped sum, which the head norm undoes except for `layernorm_eps`.
  Rotary angles and decays are taken from `retnet_rel_pos` where the checkpoint has them, else
  computed.

  Args:
    config: torchscale's own option names. What is missing has the default of `RetNetConfig`,
      whatever the checkpoint came from: fairseq's language model has other defaults
      (`activation_fn="swish"`, `no_scale_embedding=False`), and its arguments hold them.
      Options of training and speed (dropout, chunk size) are ignored.
    params: the state dict as NumPy arrays, names with or without `decoder.` in front. Held in
      float32, or in float64 if they are that and JAX has it enabled.
    **options: passed to `RetNet`: `scan_layers`, `chunk_size`, `dtype`, `dropout`.

  Raises:
    ValueError: for an option that is not supported, the layout torchscale had before October
      2023, or parameters that are missing, left over, or of a wrong shape, all by name.
  """
  settings = read_config(config, DEFAULTS, SUPPORTED)
  activation = settings["activation_fn"]
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation_fn is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
  if params and all(name.startswith("decoder.") for name in params):
    params = {name.removeprefix("decoder."): array for name, array in params.items()}
  _check_layout(params)
  tied_output = settings["share_decoder_input_output_embed"]
  if tied_output:
    params = tied(params, EMBEDDING, HEAD)
  if settings["vocab_size"] <= 0:  # then torchscale leaves it to the embedding it is given
    if EMBEDDING not in params:
      raise ValueError(f"vocab_size is {settings['vocab_size']}, and {EMBEDDING} is missing")
    settings["vocab_size"] = len(params[EMBEDDING])

  sizes = {
    "vocab_size": settings["vocab_size"],
    "d_model": settings["decoder_embed_dim"],
    "num_layers": settings["decoder_layers"],
    "num_heads": settings["decoder_retention_heads"],
    "value_dim": settings["decoder_value_embed_dim"],
    "ffn_dim": settings["decoder_ffn_embed_dim"],
  }
  abstract = nnx.eval_shape(
    lambda: RetNet(
      **sizes,
      activation=ACTIVATIONS[activation],
      dialect="torchscale",
      embedding_scale=1.0 if settings["no_scale_embedding"] else None,
      tie_embeddings=tied_output,
      eps=settings["layernorm_eps"],
      param_dtype=param_dtype(params),
      **options,
      rngs=nnx.Rngs(0),
    )
  )
  return fill(abstract, _leaves(params, tied_output, **sizes))


def _leaves(params, tied_output, *, vocab_size, d_model, num_layers, num_heads, value_dim, ffn_dim):
  """The arrays of a torchscale checkpoint by their path in `RetNet`."""
  d, v, f, k = d_model, value_dim, ffn_dim, d_model // num_heads
  halves = functools.partial(_pairs_to_halves, num_heads=num_heads)
  block = "params/stack/layers"
  layer_weights = {
    "retention_layer_norm.weight": Weight(f"{block}/mixer_norm/scale", (d,)),
    "retention.q_proj.weight": Weight(f"{block}/mixer/query/kernel", (d, d), halves),
    "retention.k_proj.weight": Weight(f"{block}/mixer/key/kernel", (d, d), halves),
    "retention.v_proj.weight": transposed(f"{block}/mixer/value", v, d),
    "retention.g_proj.weight": transposed(f"{block}/mixer/gate", v, d),
    "retention.out_proj.weight": transposed(f"{block}/mixer/output", d, v),
    "final_layer_norm.weight": Weight(f"{block}/feed_forward_norm/scale", (d,)),
    "ffn.fc1.weight": transposed(f"{block}/feed_forward/input", f, d),
    "ffn.gate.weight": transposed(f"{block}/feed_forward/gate", f, d),
    "ffn.fc2.weight": transposed(f"{block}/feed_forward/output", d, f),
  }
  buffers = {
    DECAY: Weight(f"{BUFFERS}/log_decay", (num_heads,)),
    ANGLE: Weight(f"{BUFFERS}/rotary_steps", (k,), _rotary_steps),
  }
  weights = {
    EMBEDDING: Weight("params/embedding/embedding", (vocab_size, d)),
    "layer_norm.weight": Weight("params/norm/scale", (d,)),
    **buffers,
  }
  if not tied_output:
    weights[HEAD] = transposed("params/head", vocab_size, d)
  computed = {
    DECAY: log_decays(num_heads, "geometric"),
    ANGLE: np.repeat(rotary_angles(k, "torchscale"), 2),
  }
  leaves = convert(
    "torchscale", {**computed, **params}, weights, layer_weights, num_layers, "layers."
  )
  for buffer in buffers.values():  # one for all layers there, one in every layer here
    leaves[buffer.target] = [leaves[buffer.target]] * num_layers
  return leaves


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


def _rotary_steps(angle):  # [k] -> [k/2]
  if not np.array_equal(angle[0::2], angle[1::2]):
    raise ValueError(f"{ANGLE} is {angle}, expected every angle twice in a row")
  return kernels.rotary_steps(angle[0::2])


def from_torchscale_state(model: RetNet, cache: Mapping[int, Any], length: int):
  """The state of an imported `model` for a torchscale decoding cache after `length` tokens.

  `cache` is `incremental_state`: per layer `prev_key_value` `[b, h, v, k]`, the transposed state
  over `s_n`, and `scale` `[h]`, `s_n^2`. torchscale keeps `length` only as that of the prefix.
  """
  layers = []
  for i in range(model.stack.num_layers):
    previous, scale = (np.asarray(cache[i][name]) for name in ("prev_key_value", "scale"))
    kv = np.sqrt(scale)[:, None, None] * previous.swapaxes(-1, -2)
    kv = np.concatenate([kv[:, :, 0::2], kv[:, :, 1::2]], axis=2)
    layers.append(RetentionState(jnp.array(kv), jnp.full(len(kv), length, jnp.uint32)))
  if model.stack.scan:
    return Scanned(jax.tree.map(lambda *states: jnp.stack(states), *layers))
  return tuple(layers)


def to_torchscale_state(model: RetNet, state) -> dict[int, dict[str, np.ndarray]]:
  """The torchscale decoding cache, see `from_torchscale_state`, of an imported model's `state`.

  All rows must have seen the same number of tokens, at least one: `scale` has no batch axis.
  """
  cache = {}
  for i in range(model.stack.num_layers):
    if model.stack.scan:
      kv, position = (np.asarray(a[i]) for a in state.layers)
      log_decay = np.asarray(model.stack.layers.mixer.log_decay[...])[i]
    else:
      kv, position = (np.asarray(a) for a in state[i])
      log_decay = np.asarray(model.stack.layers[i].mixer.log_decay[...])
    if position.min() != position.max() or position[0] == 0:
      raise ValueError(f"positions are {position}, expected the same in all rows, at least 1")
    scale = np.exp(np.outer(log_decay, np.arange(position[0]))).sum(axis=1)
    pairs = np.stack(np.split(kv, 2, axis=2), axis=3).reshape(kv.shape)
    previous = pairs.swapaxes(-1, -2) / np.sqrt(scale)[:, None, None]
    cache[i] = {
      "prev_key_value": previous.astype(kv.dtype),
      "scale": scale.astype(kv.dtype),
    }
  return cache
