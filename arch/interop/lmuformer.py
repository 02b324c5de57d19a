"""LMUFormer's published code (arXiv 2402.04882), its plain and its two spiking models."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..assembly import fill_module
from ..layers.conv_stem import NUM_CONVS, TAPS
from ..layout import split_model, to_stacked
from ..mixers.lmu import LMU
from ..models.lmuformer import LMUFormer
from .checkpoint import (
  Table,
  Weight,
  convert,
  expect,
  layers_of,
  read_config,
  require,
  revert,
)
from .lmu import BUFFERS, CELLS, cell_from_lmuformer, cell_to_lmuformer, read_theta

VARIANTS = {
  "lmu_rnn_conv1d": "plain",
  "slmu_rnn_ms_conv1d": "spiking_ms",
  "slmu_rnn_conv1d": "spiking",
}
DEFAULTS = {"theta": 128}
PREFIX = "block.{}."
OURS = "stack/layers/"
NORM = {
  "weight": ("params", "scale"),
  "bias": ("params", "bias"),
  "running_mean": ("variables", "mean"),
  "running_var": ("variables", "var"),
}
READ = "attn.lmu.W_h.weight"  # its columns are those of the memory, then those of the input
PARTS = {"memory": f"{READ} of the memory", "input": f"{READ} of the input"}


def from_lmuformer(
  config: Mapping[str, Any], params: Mapping[str, Any], **options
) -> LMUFormer | LMU:
  """A model of LMUFormer's published code, or one of its cells.

      logits, state = from_lmuformer(config, params)(frames, state)

  The logits are the published ones of all frames heard so far, however they were cut.

  Args:
    config: `model`: `"lmu_rnn_conv1d"`, `"slmu_rnn_ms_conv1d"` or `"slmu_rnn_conv1d"`, and the
      constructor's `in_channels`, `embed_dims`, `mlp_ratios`, `depths` and `num_classes`; `theta`,
      which the code has as 128. Its other arguments change nothing or only the length it takes.
      For the cells `"LMUFFTCell"` and `"LMUCell"` see `cell_from_lmuformer`.
    params: the state dict as NumPy arrays, with `module.` before all names or without. The order of
      the memories is read off it. A buffer `A` that is there must be that of `theta`. Held in
      float32, or where JAX has it enabled in float64, unless `param_dtype` is given.
    **options: passed to the model: `chunk_size`, `scan_layers`, `dtype`, `param_dtype`, ...

  Raises:
    ValueError: for an option that is missing or not supported, parameters that are missing, left
      over or of a wrong shape, or another `A`, all by name.
  """
  if config.get("model") in CELLS:
    return cell_from_lmuformer(config, params, **options)
  supported = {"model": tuple(VARIANTS), "test_mode": ("normal",)}
  settings = read_config(config, DEFAULTS, supported)
  require(settings, "in_channels", "embed_dims", "mlp_ratios", "depths", "num_classes")
  variant = VARIANTS[settings["model"]]
  if params and all(name.startswith("module.") for name in params):
    params = {name.removeprefix("module."): array for name, array in params.items()}
  d, read = settings["embed_dims"], PREFIX.format(0) + READ
  if read not in params or np.ndim(params[read]) != 2:
    raise ValueError(f"{read} is missing or no matrix; the order of the memories is read off it")
  if (order := params[read].shape[1] - d) < 1:
    shape = list(params[read].shape)
    raise ValueError(f"{read} has shape {shape}, expected more columns than embed_dims {d}")
  kept = {}
  for name, array in params.items():
    last = name.rpartition(".")[2]
    if last == "A":
      read_theta(settings["theta"], order, array)
    if last == "num_batches_tracked" or (last in BUFFERS and ".lmu." in name):
      continue
    kept[name] = array
  if variant == "plain":
    kept = _split(kept, order)
  widest = jax.dtypes.canonicalize_dtype(np.float64).name
  made = {"param_dtype": widest, **options}

  def make():
    return LMUFormer(
      in_features=settings["in_channels"],
      num_classes=settings["num_classes"],
      d_model=d,
      num_layers=settings["depths"],
      mlp_ratio=settings["mlp_ratios"],
      variant=variant,
      padding="same",
      order=order,
      theta=settings["theta"],
      **made,
      rngs=nnx.Rngs(0),
    )

  like = nnx.eval_shape(make)
  _, ours, variables = split_model(like)
  unpublished = {  # spike rates, of which nothing is known
    name: np.zeros(leaf.shape, leaf.dtype)
    for name, leaf in to_stacked({"params": ours, "variables": variables}).items()
    if name.endswith("/rate")
  }
  return fill_module(make, {**convert(kept, _table(like)), **unpublished})


def to_lmuformer(model: LMUFormer | LMU) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_lmuformer`, without the buffers, which the constructors make.

  A cell's theta that is learned becomes a number.
  Raises `ValueError` for a model that the published code cannot be, naming the option.
  """
  if isinstance(model, LMU):
    return cell_to_lmuformer(model)
  if not isinstance(model, LMUFormer):
    raise ValueError(f"model is a {type(model).__name__}, expected LMUFormer or LMU")
  block = layers_of(model)
  memory = block.mixer.lmu if model.variant == "plain" else block.mixer
  expect("padding", "same" if model.lookahead else "causal", "same")
  expect("memory_channels", memory.channels, 1)
  expect("folded", block.feed_forward.input.norm is None, False)
  for neuron in model.stem.neurons[:1]:
    published = {"tau": 2.0, "reset_value": 0.0, "threshold": 1.0, "decay_input": True}
    for name, value in published.items():
      expect(name, getattr(neuron, name), value)
    expect("learn_tau", neuron.tau_logit is not None, False)
  params = {name: np.asarray(tensor) for name, tensor in revert(model, _table(model)).items()}
  for name in [name for name in params if name.endswith(PARTS["memory"])]:
    parts = [params.pop(name.replace(PARTS["memory"], part)) for part in PARTS.values()]
    params[name.replace(PARTS["memory"], READ)] = np.concatenate(parts, axis=1)
  d = model.d_model
  hidden = block.feed_forward.input.linear.out_features
  config = {
    "model": {ours: theirs for theirs, ours in VARIANTS.items()}[model.variant],
    "in_channels": model.stem.in_features,
    "embed_dims": d,
    "mlp_ratios": hidden // d,
    "depths": model.stack.num_layers,
    "num_classes": model.head.out_features,
    "theta": model.theta,
    "test_mode": "normal",
  }
  return config, params


def _split(params, order):
  """`params` with the matrices that read memory and input in two."""
  split = {}
  for name, array in params.items():
    if name.endswith(READ) and np.ndim(array) == 2:
      before = name.removesuffix(READ)
      split[before + PARTS["memory"]] = array[:, :order]
      split[before + PARTS["input"]] = array[:, order:]
    else:
      split[name] = array
  return split


def _table(model: LMUFormer) -> Table:
  stem = _stem(model)
  d, classes = model.d_model, model.head.out_features
  stem |= {
    "head.weight": _linear("head", d, classes),
    "head.bias": Weight("params/head/bias", (classes,)),
  }
  if model.neuron is not None:
    stem |= _norm("head_bn", "neuron/norm", d)
  return Table("LMUFormer", stem, _block(model), model.stack.num_layers, PREFIX)


def _stem(model: LMUFormer) -> dict[str, Weight]:
  d, weights = model.d_model, {}
  for i in range(NUM_CONVS):
    width = d if i else model.stem.in_features
    ours = f"stem/convs/{i}"
    if model.variant == "plain":
      name = f"patch_embed.conv_layers.{i}"
      weights[f"{name}.0.weight"] = _conv(ours, width, d)
      weights |= _norm(f"{name}.3", f"stem/norms/{i}", d)
      continue
    normed = model.variant == "spiking" or i < NUM_CONVS - 1
    number = str(i or "")
    weights[f"patch_embed.proj_conv{number}.weight"] = _conv(
      f"{ours}/linear" if normed else ours, width, d
    )
    place = f"{ours}/norm" if normed else "stem/norms/0"
    weights |= _norm(f"patch_embed.proj_bn{number}", place, d)
  position = "stem/position"
  if model.variant == "spiking":
    weights |= _norm("patch_embed.rpe_bn", f"{position}/norm", d)
    position += "/linear"
  weights["patch_embed.rpe_conv.weight"] = _conv(position, d, d)
  return weights


def _block(model: LMUFormer) -> dict[str, Weight]:
  block = layers_of(model)
  d, hidden = model.d_model, block.feed_forward.input.linear.out_features
  weights = {}

  def add(name, ours, rows, columns, taps=None):
    weights[f"{name}.weight"] = _linear(OURS + ours, rows, columns, taps)
    weights[f"{name}.bias"] = Weight(f"params/{OURS}{ours}/bias", (columns,))

  def norm(name, ours, size):
    weights.update(_norm(name, OURS + ours, size))

  if model.variant == "plain":
    lmu, order = "mixer/lmu", block.mixer.lmu.order
    add("attn.lmu.W_u", f"{lmu}/input", d, 1)
    weights[PARTS["memory"]] = _linear(f"{OURS}{lmu}/read", order, d)
    weights[PARTS["input"]] = _linear(f"{OURS}{lmu}/skip", d, d)
    weights["attn.lmu.W_h.bias"] = Weight(f"params/{OURS}{lmu}/read/bias", (d,))
  else:
    order = block.mixer.order
    add("attn.lmu.W_u", "mixer/input/linear", d, 1)
    add("attn.lmu.W_h", "mixer/hidden/linear", order + d, d)
    norm("attn.lmu.bn_u", "mixer/input/norm", 1)
    norm("attn.lmu.bn_m", "mixer/memory_norm", order)
    norm("attn.lmu.bn_h", "mixer/hidden/norm", d)
  if model.variant == "spiking_ms":
    norm("attn.prev_bn", "mixer/input_norm", d)
  add("attn.proj_conv", "mixer/output/linear", d, d, 1)
  norm("attn.proj_bn", "mixer/output/norm", d)
  add("mlp.fc1_conv", "feed_forward/input/linear", d, hidden, 1)
  if model.variant == "spiking_ms":  # norms come before the layers that they are numbered by
    norm("mlp.fc1_bn", "feed_forward/input_neuron/norm", d)
    norm("mlp.fc2_bn", "feed_forward/input/norm", hidden)
    add("mlp.fc2_conv", "feed_forward/output", hidden, d, 1)
  else:
    norm("mlp.fc1_bn", "feed_forward/input/norm", hidden)
    norm("mlp.fc2_bn", "feed_forward/output/norm", d)
    add("mlp.fc2_conv", "feed_forward/output/linear", hidden, d, 1)
  return weights


def _linear(ours: str, rows: int, columns: int, taps: int | None = None) -> Weight:
  """A linear layer, which may be published as a convolution of one tap."""
  if taps is None:
    return Weight(f"params/{ours}/kernel", (columns, rows), np.transpose, np.transpose)
  return Weight(
    f"params/{ours}/kernel", (columns, rows, 1), lambda a: a[..., 0].T, lambda a: a.T[..., None]
  )


def _conv(ours: str, rows: int, columns: int) -> Weight:
  """A convolution, whose newest tap is published last; ours is a linear layer of a window."""

  def convert(a):  # [o, i, k] to [k i, o]
    return a[:, :, ::-1].transpose(2, 1, 0).reshape(TAPS * rows, columns)

  def revert(a):
    return a.reshape(TAPS, rows, columns).transpose(2, 1, 0)[:, :, ::-1]

  return Weight(f"params/{ours}/kernel", (columns, rows, TAPS), convert, revert)


def _norm(name: str, ours: str, size: int) -> dict[str, Weight]:
  return {
    f"{name}.{theirs}": Weight(f"{kind}/{ours}/{part}", (size,))
    for theirs, (kind, part) in NORM.items()
  }
