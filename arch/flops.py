"""Floating-point operations of a model in closed form: the primary count behind MFU.

A multiply-add is two operations. Only matrix products and convolutions are counted, causal ones by
what causality leaves: (t + 1) / 2 keys a query. A training step is three forward passes;
recomputation is not model work.
"""

import itertools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .interface import Form
from .models.hybrid import parse_pattern

# Dense bfloat16 peaks from the makers' data sheets, FLOP/s per JAX device. The first name that a
# device's kind begins with counts; TPU v5p and v6e call themselves "TPU v5" and "TPU v6 lite".
KNOWN_PEAKS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def retnet(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """Forward operations per token of `RetNet(**config)` in a call of `length` tokens.

  `projections` are the products with weights, `mixing` retention itself, `logits` the head.
  """
  return _model(config, [retention(config, length, form)] * config["num_layers"], gated=True)


def transformer(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """As `retnet`, of `Transformer`."""
  layers = [attention(config, length, form)] * config["num_layers"]
  return _model(config, layers, gated=config.get("gated", False))


def transformer_plus_plus(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """As `retnet`, of `TransformerPlusPlus`."""
  return transformer({**config, "gated": True}, length, form)


def primer(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """As `retnet`, of `Primer`, and its `convolutions`."""
  layer = conv_attention({"num_taps": 3, "shared_qk": True, **config}, length, form)
  return _model(config, [layer] * config["num_layers"], gated=False)


def hybrid(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """As `retnet`, of `Hybrid`."""
  mixers = {"attention": attention, "mdha": conv_attention, "retention": retention}
  shared = {name: config[name] for name in ("d_model", "num_heads", "chunk_size") if name in config}
  pattern = parse_pattern(config.get("pattern", "retention, retention, attention"))
  layers = [mixers[name]({**shared, **options}, length, form) for name, options in pattern]
  repeated = itertools.islice(itertools.cycle(layers), config["num_layers"])
  return _model(config, list(repeated), gated=True)


def _model(
  config: Mapping[str, Any], layers: list[dict[str, float]], *, gated: bool
) -> dict[str, float]:
  """Adds feed-forward layers and the head to the mixers of all layers."""
  totals = {name: sum(layer.get(name, 0.0) for layer in layers) for name in _names(layers)}
  d = config["d_model"]
  totals["projections"] += 2.0 * len(layers) * (3 if gated else 2) * d * config["ffn_dim"]
  return {**totals, "logits": 2.0 * d * config["vocab_size"]}


def _names(layers: list[dict[str, float]]) -> list[str]:
  return list(dict.fromkeys(name for layer in layers for name in layer))


def attention(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """Forward operations per token of an `Attention` layer, the same in every form."""
  del form
  d, heads = config["d_model"], config["num_heads"]
  size = config.get("key_size") or d // heads
  kv_heads = config.get("num_kv_heads") or heads
  seen = min(config.get("window") or length, length)
  pairs = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
  return {
    "projections": 2.0 * d * size * (2 * heads + 2 * kv_heads),
    "mixing": 2.0 * heads * pairs * 2 * size,
  }


def conv_attention(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """As `attention`, of a `MultiDConvHeadAttention` layer (plain attention if it has no taps)."""
  counts = attention(config, length, form)
  taps, shared = config.get("num_taps", 3), config.get("shared_qk", False)
  if not taps:
    return counts
  d, heads = config["d_model"], config["num_heads"]
  size = config.get("key_size") or d // heads
  width, kv_width = heads * size, (config.get("num_kv_heads") or heads) * size
  if shared:
    counts["projections"] += 2.0 * width * (kv_width - d)
  convolved = 2 * kv_width + (0 if shared else width)
  return {**counts, "convolutions": float((2 * taps - 1) * convolved)}


def retention(config: Mapping[str, Any], length: int, form: Form) -> dict[str, float]:
  """Forward operations per token of a `Retention` layer."""
  d, heads = config["d_model"], config["num_heads"]
  key_dim, value_dim = config.get("key_dim") or d, config.get("value_dim") or 2 * d
  key_size, value_size = key_dim // heads, value_dim // heads
  kv_heads = config.get("num_kv_heads") or heads
  retained = kv_heads * (key_size + value_size)
  gate = heads if config.get("decay") == "gated" else 0
  projections = d * (key_dim + retained + 2 * value_dim + gate)
  run = {
    "parallel": length,
    "chunkwise": min(length, config.get("chunk_size", 128)),
    "recurrent": 0,
  }
  pairs = (run[form] + 1) / 2 if run[form] else 0
  through_state = 0 if form == "parallel" else 2 * key_size * value_size
  mixing = heads * (pairs * (key_size + value_size) + through_state)
  return {"projections": 2.0 * projections, "mixing": 2.0 * mixing}


CLOSED_FORMS = {
  "hybrid": hybrid,
  "primer": primer,
  "retnet": retnet,
  "transformer": transformer,
  "transformer++": transformer_plus_plus,
}


def train_flops_per_token(config: Mapping[str, Any], length: int, form: Form) -> float:
  """Operations of a training step per token, forward and backward."""
  options = dict(config)
  return 3 * sum(CLOSED_FORMS[options["architecture"]](options, length, form).values())


def peak_flops(device: jax.Device) -> float:
  """Peak FLOP/s of a device: from the data sheet, or the best of a few products of matrices.

  The products are those that models are trained with: bfloat16 on an accelerator, and large enough
  to fill it, float32 on a CPU.
  """
  for kind, peak in KNOWN_PEAKS.items():
    if device.device_kind.startswith(kind):
      return peak
  n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
  return _measured_flops(device, n, dtype)


def _measured_flops(device: jax.Device, n: int, dtype: Any) -> float:
  a = jax.device_put(jnp.ones((n, n), dtype), device)
  product = jax.jit(jnp.dot)
  product(a, a).block_until_ready()
  seconds = []
  for _ in range(8):
    start = time.perf_counter()
    product(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * n**3 / min(seconds)
