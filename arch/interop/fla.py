"""RetNet checkpoints of flash-linear-attention (fla), as on the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from triform import kernels

from ..mixers.retention import log_decays, rotary_angles
from ..models.retnet import RetNet
from .checkpoint import Weight, convert, fill, param_dtype, read_config, tied, transposed

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
  """The language model of an fla RetNet checkpoint.

      config = json.loads(Path("config.json").read_text())
      model = from_fla(config, safetensors.numpy.load_file("model.safetensors"))
      logits, state = model(ids, form="chunkwise")

  Args:
    config: `config.json`, or any part of it; what is missing has fla's default. Options of
      training and speed (fused kernels, `attn_mode`, `max_position_embeddings`) are ignored.
    params: the state dict as NumPy arrays, several files merged into one mapping. Both layouts
      of the feed-forward are read: `gate_proj` and `up_proj`, and those of before February
      2025, where `gate_proj` holds both. Held in float32, or in float64 if they are that and
      JAX has it enabled.
    **options: passed to `RetNet`: `scan_layers`, `chunk_size`, `dtype`, `dropout`.

  Raises:
    ValueError: for an option that is not supported, or parameters that are missing, left over,
      or of a wrong shape, all by name.
  """
  settings = read_config(config, DEFAULTS, SUPPORTED)
  tied_output = settings["tie_word_embeddings"]
  if tied_output:
    params = tied(params, EMBEDDING, HEAD)
  sizes = {
    "vocab_size": settings["vocab_size"],
    "d_model": settings["hidden_size"],
    "num_layers": settings["num_hidden_layers"],
    "num_heads": settings["num_heads"],
    "num_kv_heads": settings["num_kv_heads"] or settings["num_heads"],
    "key_dim": round(settings["hidden_size"] * settings["expand_k"]),
    "value_dim": round(settings["hidden_size"] * settings["expand_v"]),
    "ffn_dim": settings["intermediate_size"] or _default_ffn_dim(settings),
  }

  abstract = nnx.eval_shape(
    lambda: RetNet(
      **sizes,
      activation="silu",
      dialect="fla",
      embedding_scale=1.0,
      tie_embeddings=tied_output,
      eps=settings["norm_eps"],
      param_dtype=param_dtype(params),
      **options,
      rngs=nnx.Rngs(0),
    )
  )
  return fill(abstract, _leaves(params, tied_output, **sizes))


def _leaves(
  params,
  tied_output,
  *,
  vocab_size,
  d_model,
  num_layers,
  num_heads,
  num_kv_heads,
  key_dim,
  value_dim,
  ffn_dim,
):
  """The arrays of an fla checkpoint by their path in `RetNet`."""
  d, f = d_model, ffn_dim
  key_size, value_size = key_dim // num_heads, value_dim // num_heads
  norm = PLAIN_NORM if f"{LAYERS}0.{PLAIN_NORM}" in params else FUSED_NORM
  block = "params/stack/layers"
  layer_weights = {
    "attn_norm.weight": Weight(f"{block}/mixer_norm/scale", (d,)),
    "attn.q_proj.weight": transposed(f"{block}/mixer/query", key_dim, d),
    "attn.k_proj.weight": transposed(f"{block}/mixer/key", num_kv_heads * key_size, d),
    "attn.v_proj.weight": transposed(f"{block}/mixer/value", num_kv_heads * value_size, d),
    "attn.g_proj.weight": transposed(f"{block}/mixer/gate", value_dim, d),
    "attn.o_proj.weight": transposed(f"{block}/mixer/output", d, value_dim),
    norm: Weight(f"{block}/mixer/norm_weight", (value_size,)),
    "mlp_norm.weight": Weight(f"{block}/feed_forward_norm/scale", (d,)),
    "mlp.gate_proj.weight": transposed(f"{block}/feed_forward/input", f, d),
    "mlp.up_proj.weight": transposed(f"{block}/feed_forward/gate", f, d),
    "mlp.down_proj.weight": transposed(f"{block}/feed_forward/output", d, f),
  }
  weights = {
    EMBEDDING: Weight("params/embedding/embedding", (vocab_size, d)),
    "model.norm.weight": Weight("params/norm/scale", (d,)),
  }
  if not tied_output:
    weights[HEAD] = transposed("params/head", vocab_size, d)
  params = _split_fused_gates(params, num_layers, ffn_dim)
  leaves = convert("fla", params, weights, layer_weights, num_layers, LAYERS)
  buffers = {  # fla computes both and saves neither
    "log_decay": log_decays(num_heads, "geometric"),
    "rotary_steps": kernels.rotary_steps(rotary_angles(key_size, "fla")),
  }
  for name, buffer in buffers.items():
    leaves[f"variables/stack/layers/mixer/{name}"] = [buffer] * num_layers
  return leaves


def _split_fused_gates(params, num_layers, ffn_dim):
  """`params` with every `gate_proj` of the layout of before February 2025 cut in its halves."""
  params = dict(params)
  for i in range(num_layers):
    gate, up = (f"{LAYERS}{i}.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
    if gate in params and up not in params and len(params[gate]) == 2 * ffn_dim:
      params[gate], params[up] = np.split(np.asarray(params[gate]), 2)
  return params


def _default_ffn_dim(settings):
  """fla's width: 2/3 of `hidden_ratio` times the model's, rounded up to a multiple of 256."""
  wide = int(settings["hidden_size"] * (settings["hidden_ratio"] or 4) * 2 / 3)
  return -(-wide // 256) * 256
