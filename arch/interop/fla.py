"""RetNet checkpoints of flash-linear-attention (fla), as on the Hugging Face hub."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..assembly import fill
from ..models.retnet import RetNet
from ..tensors import Tensor
from .checkpoint import (
  Table,
  Weight,
  convert,
  describe,
  layer_states,
  model_state,
  param_dtype,
  read_config,
  revert,
  tied,
  transposed,
)

DEFAULTS = {
  "hidden_size": 2048,
  "expand_k": 1.0,
  "expand_v": 2.0,
  "hidden_ratio": 2,
  "intermediate_size": None,
  "num_hidden_layers": 24,
  "num_heads": 8,
  "num_kv_heads": None,
  "norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "vocab_size": 32000,
}
SUPPORTED = {
  "hidden_act": ("swish", "silu"),
  "feature_map": (None,),
  "use_short_conv": (False,),
  "use_output_gate": (True,),
  "elementwise_affine": (True,),
  "attn": (None,),
  "attnres_block_size": (None,),
}
EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"
LAYERS = "model.layers."
FUSED_NORM, PLAIN_NORM = "attn.g_norm_swish_gate.weight", "attn.g_norm.weight"


def from_fla(config: Mapping[str, Any], params: Mapping[str, Any], **options) -> RetNet:
  """The language model of an fla RetNet checkpoint in memory; `load_fla` reads one from disk.

      logits, state = from_fla(config, params)(ids, form="chunkwise")

  Args:
    config: `config.json`, or any part of it; what is missing has fla's default. Options of
      training and speed (fused kernels, `attn_mode`, `max_position_embeddings`) are ignored.
    params: the state dict as NumPy arrays, several files merged into one mapping. Both layouts
      of the feed-forward are read: `gate_proj` and `up_proj`, and those of before February
      2025, where `gate_proj` holds both. Held in float32, or in float64 if they are that and
      JAX has it enabled, unless `param_dtype` is given.
    **options: passed to `RetNet`: `scan_layers`, `chunk_size`, `dtype`, `param_dtype`, `dropout`.

  Raises:
    ValueError: for an option that is not supported, or parameters that are missing, left over,
      or of a wrong shape, all by name.
  """
  model, leaves = read(config, params)
  return fill({**model, "param_dtype": param_dtype(params), **options}, leaves)


def to_fla(model: RetNet) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_fla`: `config.json` and the state dict of the same function in fla.

  Raises `ValueError` for a model that fla's RetNet cannot be, naming the option.
  """
  config, params = write(model)
  return config, {name: np.asarray(tensor) for name, tensor in params.items()}


def state_to_fla(model: RetNet, state: Any) -> tuple[dict[int, dict[str, np.ndarray]], int]:
  """The cache with which fla goes on after `state` of `model`, and the tokens seen before it.

  Per layer `recurrent_state` `[b, h, k, v]`, whose keys fla does not scale: it scales the queries.
  All rows must have seen the same number of tokens, at least one.
  """
  kvs, length = layer_states(model, state, "fla")
  scale = math.sqrt(kvs[0].shape[-2])
  return {i: {"recurrent_state": kv * kv.dtype.type(scale)} for i, kv in enumerate(kvs)}, length


def state_from_fla(model: RetNet, cache: Mapping[int, Any], length: int) -> Any:
  """The state of `model` for fla's `cache` after `length` tokens; inverse of `state_to_fla`."""
  kvs = [np.asarray(cache[i]["recurrent_state"]) for i in range(len(cache))]
  scale = math.sqrt(kvs[0].shape[-2])
  return model_state(model, [kv / kv.dtype.type(scale) for kv in kvs], length, "fla")


def read(
  config: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The `model` section, and the leaves by name as in `arch.layout`, of a checkpoint."""
  settings = read_config(config, DEFAULTS, SUPPORTED)
  if settings["tie_word_embeddings"]:
    params = tied(params, EMBEDDING, HEAD)
  model = {
    "architecture": "retnet",
    "vocab_size": settings["vocab_size"],
    "d_model": settings["hidden_size"],
    "num_layers": settings["num_hidden_layers"],
    "num_heads": settings["num_heads"],
    "num_kv_heads": settings["num_kv_heads"] or settings["num_heads"],
    "key_dim": round(settings["hidden_size"] * settings["expand_k"]),
    "value_dim": round(settings["hidden_size"] * settings["expand_v"]),
    "ffn_dim": settings["intermediate_size"] or _default_ffn_dim(settings),
    "activation": "silu",
    "dialect": "fla",
    "embedding_scale": 1.0,
    "tie_embeddings": settings["tie_word_embeddings"],
    "eps": settings["norm_eps"],
  }
  params = _split_fused_gates(params, model["num_layers"], model["ffn_dim"])
  fused = f"{LAYERS}0.{PLAIN_NORM}" not in params
  return model, convert(params, _table(model, fused_norm=fused))


def write(model: RetNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """`config.json` and the parameters, not read yet, of `model` in fla."""
  options = describe(
    model, dialect="fla", activation="silu", embedding_scale=1.0, decay_schedule="geometric"
  )
  d = options["d_model"]
  config = {
    "model_type": "retnet",
    "architectures": ["RetNetForCausalLM"],
    "hidden_size": d,
    "expand_k": _ratio(options["key_dim"], d),
    "expand_v": _ratio(options["value_dim"], d),
    "intermediate_size": options["ffn_dim"],
    "num_hidden_layers": options["num_layers"],
    "num_heads": options["num_heads"],
    "num_kv_heads": options["num_kv_heads"],
    "norm_eps": options["eps"],
    "tie_word_embeddings": options["tie_embeddings"],
    "vocab_size": options["vocab_size"],
    "fuse_norm": True,
    "torch_dtype": options["param_dtype"],
    **{name: values[0] for name, values in SUPPORTED.items()},
  }
  return config, revert(model, _table(options, fused_norm=True))


def _table(model: Mapping[str, Any], *, fused_norm: bool) -> Table:
  d, f = model["d_model"], model["ffn_dim"]
  key_dim, value_dim, heads = model["key_dim"], model["value_dim"], model["num_heads"]
  key_size, value_size = key_dim // heads, value_dim // heads
  kv_heads = model["num_kv_heads"]
  block = "params/stack/layers"
  layer_weights = {
    "attn_norm.weight": Weight(f"{block}/mixer_norm/scale", (d,)),
    "attn.q_proj.weight": transposed(f"{block}/mixer/query", key_dim, d),
    "attn.k_proj.weight": transposed(f"{block}/mixer/key", kv_heads * key_size, d),
    "attn.v_proj.weight": transposed(f"{block}/mixer/value", kv_heads * value_size, d),
    "attn.g_proj.weight": transposed(f"{block}/mixer/gate", value_dim, d),
    "attn.o_proj.weight": transposed(f"{block}/mixer/output", d, value_dim),
    FUSED_NORM if fused_norm else PLAIN_NORM: Weight(f"{block}/mixer/norm_weight", (value_size,)),
    "mlp_norm.weight": Weight(f"{block}/feed_forward_norm/scale", (d,)),
    "mlp.gate_proj.weight": transposed(f"{block}/feed_forward/input", f, d),
    "mlp.up_proj.weight": transposed(f"{block}/feed_forward/gate", f, d),
    "mlp.down_proj.weight": transposed(f"{block}/feed_forward/output", d, f),
  }
  weights = {
    EMBEDDING: Weight("params/embedding/embedding", (model["vocab_size"], d)),
    "model.norm.weight": Weight("params/norm/scale", (d,)),
  }
  if not model["tie_embeddings"]:
    weights[HEAD] = transposed("params/head", model["vocab_size"], d)
  return Table("fla", weights, layer_weights, model["num_layers"], LAYERS + "{}.")


def _split_fused_gates(params: Mapping[str, Any], num_layers: int, ffn_dim: int) -> dict[str, Any]:
  """`params` with every `gate_proj` of the layout of before February 2025 cut in its halves."""
  params = dict(params)

  def half(both: Any, start: int) -> np.ndarray:
    return np.asarray(both)[start : start + ffn_dim]

  for i in range(num_layers):
    gate, up = (f"{LAYERS}{i}.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
    both = params.get(gate)
    if both is not None and up not in params and both.shape[0] == 2 * ffn_dim:
      shape = (ffn_dim, *both.shape[1:])
      params[gate] = Tensor(shape, both.dtype, functools.partial(half, both, 0))
      params[up] = Tensor(shape, both.dtype, functools.partial(half, both, ffn_dim))
  return params


def _default_ffn_dim(settings: Mapping[str, Any]) -> int:
  """fla's width: 2/3 of `hidden_ratio` times the model's, rounded up to a multiple of 256."""
  wide = int(settings["hidden_size"] * (settings["hidden_ratio"] or 4) * 2 / 3)
  return -(-wide // 256) * 256


def _ratio(width: int, d_model: int) -> float:
  """`width / d_model`, such that fla's `int(d_model * ratio)` is `width` again."""
  ratio = width / d_model
  return ratio if int(d_model * ratio) == width else math.nextafter(ratio, math.inf)
