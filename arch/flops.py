"""Floating-point operations of a model in closed form: the primary count behind MFU.

A multiply-add is two operations. Only matrix products are counted, causal ones by what causality
leaves: (t + 1) / 2 keys a query. A training step is three forward passes; recomputation is not
model work.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .interface import Form

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
  d, heads = config["d_model"], config["num_heads"]
  key_dim, value_dim = config.get("key_dim") or d, config["value_dim"]
  key_size, value_size = key_dim // heads, value_dim // heads
  kv_heads = config.get("num_kv_heads") or heads
  retained = kv_heads * (key_size + value_size)
  gate = heads if config.get("decay") == "gated" else 0
  projections = d * (key_dim + retained + 2 * value_dim + gate) + 3 * d * config["ffn_dim"]
  run = {
    "parallel": length,
    "chunkwise": min(length, config.get("chunk_size", 128)),
    "recurrent": 0,
  }
  pairs = (run[form] + 1) / 2 if run[form] else 0
  through_state = 0 if form == "parallel" else 2 * key_size * value_size
  mixing = heads * (pairs * (key_size + value_size) + through_state)
  return {
    "projections": 2.0 * config["num_layers"] * projections,
    "mixing": 2.0 * config["num_layers"] * mixing,
    "logits": 2.0 * d * config["vocab_size"],
  }


CLOSED_FORMS = {"retnet": retnet}


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
