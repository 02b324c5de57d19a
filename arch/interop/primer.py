"""Primer checkpoints in the names of mesh-TensorFlow, as the paper's own code has them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..assembly import fill
from ..mixers.attention import NUM_BUCKETS, MultiDConvHeadAttention
from ..models.primer import Primer
from ..tensors import Tensor
from .checkpoint import (
  Table,
  Weight,
  convert,
  expect,
  layers_of,
  param_dtype,
  read_config,
  require,
  revert,
)

DEFAULTS = {"norm_placement": "pre"}
SUPPORTED = {"norm_placement": ("pre", "pre_post"), "activation": ("squared_relu",)}
SIZES = ("vocab_size", "d_model", "d_ff", "num_heads", "d_kv", "num_layers")
PREFIX, BLOCK = "transformer/", "transformer/block_{:03d}/"
VOCAB_MULTIPLE = 128  # mesh-TensorFlow pads the embedding to it
NORMS = {  # what a norm is called: EZ's LayerNorm, and the paper's norm, which equals it
  "layer": "true_layer_norm/layer_prepostprocess/layer_norm/layer_norm",
  "primer": "primer_norm/layer_prepostprocess/primer_norm/primer_norm",
}
TRAINING = re.compile(r"(^|/)global_step$|_slot_[a-z]+$")  # of the optimizer
TAP = re.compile(r"(.*_dconv)/conv_(\d+)$")


def from_primer(config: Mapping[str, Any], params: Mapping[str, Any], **options) -> Primer:
  """The language model of a Primer checkpoint (or of the paper's Transformer with squared ReLU).

      logits, state = from_primer(config, params)(ids, form="chunkwise")

  Whether it has convolutions, shared QK and relative positions is read off the names.

  Args:
    config: `vocab_size`, `d_model`, `d_ff`, `num_heads`, `d_kv`, `num_layers`, and
      `norm_placement`: `"pre"` (Primer-EZ, and full Primer as its published settings build it) or
      `"pre_post"` (full Primer as the paper prints it).
    params: the variables as NumPy arrays by their names in the checkpoint, `transformer/...`; what
      belongs to the optimizer is left alone. The vocabulary may be padded to a multiple of 128, and
      the model then has as many logits. Held in float32, or in float64 if they are that and JAX
      has it enabled, unless `param_dtype` is given.
    **options: passed to `Primer`: `scan_layers`, `chunk_size`, `max_len`, `dtype`, `param_dtype`,
      `dropout`.

  Raises:
    ValueError: for an option that is missing or not supported, or parameters that are missing,
      left over, or of a wrong shape, all by name.
  """
  model, leaves = read(config, params)
  return fill({**model, "param_dtype": param_dtype(params), **options}, leaves)


def to_primer(model: Primer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_primer`: sizes and variables of the same function in mesh-TensorFlow.

  Norms are named as LayerNorm where they come first and as the paper's where they do not, since
  that is how the published settings pair them; the two are one function.
  Raises `ValueError` for a model that the published code cannot be, naming the option.
  """
  options = _describe(model)
  norm = NORMS["layer" if options["norm_placement"] == "pre" else "primer"]
  params = {}
  for name, tensor in revert(model, _table(options, norm)).items():
    if name.endswith("_dconv"):
      params |= {f"{name}/conv_{i}": tap for i, tap in enumerate(np.asarray(tensor))}
    else:
      params[name] = np.asarray(tensor)
  params[f"{PREFIX}embedding"] = params[f"{PREFIX}embedding"] * model.embedding_scale
  config = {
    "vocab_size": options["vocab_size"],
    "d_model": options["d_model"],
    "d_ff": options["ffn_dim"],
    "num_heads": options["num_heads"],
    "d_kv": options["key_size"],
    "num_layers": options["num_layers"],
    "norm_placement": options["norm_placement"],
    "activation": options["activation"],
  }
  return config, params


def read(
  config: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The `model` section, and the leaves by name as in `arch.layout`, of a checkpoint."""
  settings = read_config(config, DEFAULTS, SUPPORTED)
  require(settings, *SIZES)
  params = {name: array for name, array in params.items() if not TRAINING.search(name)}
  params, num_taps = _merged_taps(params)
  vocab_size = settings["vocab_size"]
  padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
  if np.shape(params.get(f"{PREFIX}embedding"))[:1] == (padded,):
    vocab_size = padded
  model = {
    "architecture": "primer",
    "vocab_size": vocab_size,
    "d_model": settings["d_model"],
    "num_layers": settings["num_layers"],
    "num_heads": settings["num_heads"],
    "key_size": settings["d_kv"],
    "ffn_dim": settings["d_ff"],
    "activation": settings["activation"],
    "use_bias": any(name.endswith("DenseReluDense/wi/bias") for name in params),
    "num_taps": num_taps,
    "shared_qk": any("/q_solo_project/" in name for name in params),
    "norm_placement": settings["norm_placement"],
    "position": "relative" if any("relative_attention_bias" in name for name in params) else "none",
    "embedding_scale": 1.0,
    "tie_embeddings": True,
  }
  norm = next((n for n in NORMS.values() if f"{PREFIX}{n}_scale" in params), NORMS["layer"])
  return model, convert(params, _table(model, norm))


def _table(model: Mapping[str, Any], norm: str) -> Table:
  d, f = model["d_model"], model["ffn_dim"]
  width = model["num_heads"] * model["key_size"]
  attention = "layer_000/MDHA" if model["num_taps"] else "layer_000/SelfAttention"
  dense = "layer_001/DenseReluDense"
  block = "params/stack/layers"

  def kernel(target: str, rows: int, columns: int) -> Weight:
    return Weight(f"{block}/{target}/kernel", (rows, columns))

  layer_weights = {
    f"{attention}/v": kernel("mixer/value", d, width),
    f"{attention}/o": kernel("mixer/output", width, d),
    f"{dense}/wi/kernel": kernel("feed_forward/input", d, f),
    f"{dense}/wo/kernel": kernel("feed_forward/output", f, d),
  }
  if model["shared_qk"]:
    layer_weights[f"{attention}/q"] = kernel("mixer/key", d, width)
    layer_weights[f"{attention}/q_solo_project/kernel"] = kernel("mixer/query", width, width)
    convs = {"qk": "key", "v": "value"}
  else:
    layer_weights[f"{attention}/q"] = kernel("mixer/query", d, width)
    layer_weights[f"{attention}/k"] = kernel("mixer/key", d, width)
    convs = {"q": "query", "k": "key", "v": "value"}
  for theirs, ours in convs.items() if model["num_taps"] else ():
    taps = Weight(f"{block}/mixer/{ours}_conv/taps", (model["num_taps"], width))
    layer_weights[f"{attention}/{theirs}_dconv"] = taps
  if model["use_bias"]:
    layer_weights[f"{dense}/wi/bias"] = Weight(f"{block}/feed_forward/input/bias", (f,))
    layer_weights[f"{dense}/wo/bias"] = Weight(f"{block}/feed_forward/output/bias", (d,))
  weights = {f"{PREFIX}embedding": Weight("params/embedding/embedding", (model["vocab_size"], d))}
  for part in ("scale", "bias"):
    weights[f"{PREFIX}{norm}_{part}"] = Weight(f"params/norm/{part}", (d,))
    for i, ours in enumerate(("mixer_norm", "feed_forward_norm")):
      layer_weights[f"layer_{i:03d}/{norm}_{part}"] = Weight(f"{block}/{ours}/{part}", (d,))
  if model["position"] == "relative":  # in the first block, for all of them
    weights[f"{BLOCK.format(0)}{attention}/relative_attention_bias"] = Weight(
      "params/relative_bias/relative_bias", (model["num_heads"], NUM_BUCKETS)
    )
  return Table("Primer", weights, layer_weights, model["num_layers"], BLOCK)


def _merged_taps(params: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
  """`params` with the taps of a convolution as one array, and their number: 0 if there are none."""
  merged, taps = {}, {}
  for name, array in params.items():
    match = TAP.match(name)
    if match is None:
      merged[name] = array
    else:
      taps.setdefault(match[1], {})[int(match[2])] = array
  num_taps = 1 + max((i for conv in taps.values() for i in conv), default=-1)
  for name, conv in taps.items():
    absent = [f"{name}/conv_{i}" for i in range(num_taps) if i not in conv]
    if absent:
      raise ValueError(f"parameters do not fit the Primer config; missing: {', '.join(absent)}")
    merged[name] = np.stack([np.asarray(conv[i]) for i in range(num_taps)])
  return merged, num_taps


def _describe(model: Primer) -> dict[str, Any]:
  """The options of `Primer` that say which function `model` is, if the published code has it."""
  layer = layers_of(model)
  mixer, convolved = layer.mixer, isinstance(layer.mixer, MultiDConvHeadAttention)
  feed_forward = layer.feed_forward
  for name, value, expected in (
    ("num_kv_heads", mixer.num_kv_heads, mixer.num_heads),
    ("window", mixer.window, None),
    ("scale", mixer.scale, 1.0),
    ("tanh", mixer.tanh, False),
    ("input_floor", getattr(mixer, "input_floor", None), None),
    ("conv_scale", getattr(mixer, "conv_scale", 1.0), 1.0),
    ("activation", feed_forward.activation, "squared_relu"),
    ("norm", type(model.norm).__name__, "LayerNorm"),
    ("eps", model.norm.epsilon, 1e-6),
    ("output_bias", feed_forward.output.bias is not None, feed_forward.input.bias is not None),
    ("tie_embeddings", model.head is None, True),
  ):
    expect(name, value, expected)
  expect("position", mixer.position, "relative", "none")
  return {
    "vocab_size": model.vocab_size,
    "d_model": model.embedding.features,
    "num_layers": model.stack.num_layers,
    "num_heads": mixer.num_heads,
    "key_size": mixer.key_size,
    "ffn_dim": feed_forward.input.out_features,
    "activation": feed_forward.activation,
    "use_bias": feed_forward.input.bias is not None,
    "num_taps": mixer.num_taps if convolved else 0,
    "shared_qk": convolved and mixer.shared_qk,
    "norm_placement": layer.norm_placement,
    "position": mixer.position,
  }
