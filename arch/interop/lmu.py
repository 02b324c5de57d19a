"""Legendre Memory Units of KerasLMU, and the cells of LMUFormer and pytorch-lmu."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform.kernels.lmu import DISCRETIZERS
from triform.kernels.lmu.tables import system, transition

from ..assembly import fill_module
from ..layout import split_model, to_stacked
from ..mixers.lmu import ACTIVATIONS, LMU
from .checkpoint import Table, Weight, convert, expect, param_dtype, read_config, require

KERAS = {
  "trainable_theta": False,
  "input_to_hidden": False,
  "hidden_to_memory": False,
  "memory_to_memory": False,
  "use_bias": False,
}
KERAS_SUPPORTED = {"discretizer": DISCRETIZERS, "go_backwards": (False,)}
KERAS_CELLS = {"Dense": "linear", "SimpleRNN": "tanh"}  # and their activations by default
CELLS = ("LMUFFTCell", "LMUCell")
BUFFERS = ("A", "B", "H", "fft_H")
A_TOLERANCE = 1e-6  # a table in float32 is off by 3e-8


class Rows(NamedTuple):
  """Published parameters, one below another, are these of ours, one below another."""

  theirs: Mapping[str, int]  # rows by name
  ours: Sequence[str]  # paths in the layer


def from_keras_lmu(config: Mapping[str, Any], params: Mapping[str, Any], **options) -> LMU:
  """The layer of KerasLMU (`keras_lmu.LMU` or its cell), all outputs of a sequence.

      y, state = from_keras_lmu(config, params)(x)

  Args:
    config: the arguments of its constructor: `memory_d`, `order`, `theta`, `hidden_cell`, and as
      far as they are not the defaults `trainable_theta`, `input_to_hidden`, `hidden_to_memory`,
      `memory_to_memory`, `discretizer` and `use_bias`. `hidden_cell` is `None` or a dictionary of
      `class_name`, `"Dense"` or `"SimpleRNN"`, `units`, `activation` and `use_bias`, or what Keras
      serialises a cell to, with these under `config`.
    params: its weights as NumPy arrays by the last parts of their names: `kernel`, `bias`,
      `recurrent_kernel`, `theta_inv` and `hidden_cell/{kernel,bias,recurrent_kernel}`. The window
      is `1 / theta_inv`, where it is there. Held in float32, or in float64 if they are that and JAX
      has it enabled, unless `param_dtype` is given.
    **options: passed to the layer: `chunk_size`, `dtype`, `param_dtype`.

  Raises:
    ValueError: for an option that is missing or not supported, or parameters that are missing,
      left over or of a wrong shape, all by name.
  """
  settings = read_config(config, KERAS, KERAS_SUPPORTED)
  require(settings, "memory_d", "order", "theta", "hidden_cell")
  params = dict(params)
  theta_inv = params.pop("theta_inv", None)
  if theta_inv is None and settings["trainable_theta"]:
    raise ValueError("parameters do not fit the KerasLMU config; missing: theta_inv")
  if theta_inv is not None and (np.shape(theta_inv) != () or not theta_inv > 0):
    raise ValueError(f"theta_inv is {theta_inv}, expected a positive number")
  made = {"param_dtype": param_dtype(params), **options}
  cell = _read_keras_cell(settings["hidden_cell"])
  hidden, units = {}, 0
  if cell is not None:
    units = cell["units"]
    if cell["class_name"] == "Dense":
      hidden = {"hidden_size": units, "hidden_activation": cell["activation"]}
      hidden["hidden_bias"] = cell["use_bias"]
    else:
      hidden["hidden_cell"] = _simple_cell(units, cell["activation"], cell["use_bias"], made)
  rows = (*np.shape(params.get("kernel")), 1)[0]
  inputs = max(rows - (units if settings["hidden_to_memory"] else 0), 1)

  def make():
    return LMU(
      inputs,
      order=settings["order"],
      theta=settings["theta"] if theta_inv is None else 1 / float(theta_inv),
      channels=settings["memory_d"],
      input_activation="linear",
      input_to_hidden=settings["input_to_hidden"],
      hidden_to_memory=settings["hidden_to_memory"],
      memory_to_memory=settings["memory_to_memory"],
      discretizer=settings["discretizer"],
      learn_theta=settings["trainable_theta"],
      use_bias=settings["use_bias"],
      **{**hidden, **made},
      rngs=nnx.Rngs(0),
    )

  return _filled("KerasLMU", make, params, _keras_rows, np.asarray)


def to_keras_lmu(layer: LMU) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `from_keras_lmu`: arguments and weights of the same function.

  Raises `ValueError` for a layer that KerasLMU cannot be, naming the option.
  """
  expect("input_activation", layer.input_activation, "linear")
  config = {
    "memory_d": layer.channels,
    "order": layer.order,
    "theta": _theta(layer),
    "discretizer": layer.discretizer,
    "trainable_theta": layer.log_theta is not None,
    "input_to_hidden": layer.input_to_hidden,
    "hidden_to_memory": layer.hidden_to_memory,
    "memory_to_memory": layer.memory_feedback is not None,
    "use_bias": layer.input.bias is not None,
    "hidden_cell": None,
  }
  if layer.cell is not None:
    config["hidden_cell"] = {
      "class_name": "SimpleRNN",
      "activation": _cell_activation(layer.cell),
      "units": layer.cell.hidden_features,
      "use_bias": layer.cell.dense_i.bias is not None,
    }
  elif layer.hidden_size is not None:
    config["hidden_cell"] = {
      "class_name": "Dense",
      "units": layer.hidden_size,
      "activation": layer.hidden_activation,
      "use_bias": layer.read.bias is not None,
    }
  params = _published(layer, _keras_rows(layer), np.asarray)
  params["theta_inv"] = np.asarray(1 / config["theta"], params["kernel"].dtype)
  return config, params


def cell_from_lmuformer(config: Mapping[str, Any], params: Mapping[str, Any], **options) -> LMU:
  """The `LMUFFTCell` of LMUFormer, or the `LMUCell` of pytorch-lmu (Voelker et al. 2019).

  Args:
    config: `model`, one of these two, and the constructor's `input_size`, `hidden_size`,
      `memory_size` and `theta`; the length for which a cell was built does not matter.
    params: its state dict as NumPy arrays. The buffers `A`, `B`, `H` and `fft_H` may be among them:
      see `read_theta`. All else is as in `from_keras_lmu`.
    **options: passed to the layer: `chunk_size`, `dtype`, `param_dtype`.

  Raises:
    ValueError: as `from_keras_lmu` does.
  """
  settings = read_config(
    config, {"theta": None}, {"model": CELLS, "learn_a": (False,), "learn_b": (False,)}
  )
  require(settings, "input_size", "hidden_size", "memory_size")
  order, units = settings["memory_size"], settings["hidden_size"]
  theta = read_theta(settings["theta"], order, params.get("A"))
  params = {name: array for name, array in params.items() if name not in BUFFERS}
  made = {"param_dtype": param_dtype(params), **options}
  if settings["model"] == "LMUFFTCell":
    kind, rows = {"hidden_size": units}, _fft_rows
  else:
    rows = _cell_rows
    kind = {
      "hidden_cell": _simple_cell(units, "tanh", False, made),
      "input_activation": "linear",
      "hidden_to_memory": True,
      "memory_to_memory": True,
      "use_bias": False,
    }

  def make():
    return LMU(
      settings["input_size"], order=order, theta=theta, **{**kind, **made}, rngs=nnx.Rngs(0)
    )

  return _filled(settings["model"], make, params, rows, np.transpose)


def cell_to_lmuformer(layer: LMU) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The inverse of `cell_from_lmuformer`, without the buffers, which the constructors make.

  A theta that is learned becomes a number.
  Raises `ValueError` for a layer that neither cell can be, naming the option.
  """
  expected = {"channels": 1, "discretizer": "zoh", "input_to_hidden": True}
  if layer.cell is None:
    model, rows, units = "LMUFFTCell", _fft_rows, layer.hidden_size
    expected |= {"input_activation": "relu", "hidden_activation": "relu", "hidden_to_memory": False}
    if units is None:
      raise ValueError("hidden_size is None, which cannot be converted; expected a number")
  else:
    expect("the cell's activation", _cell_activation(layer.cell), "tanh")
    model, rows, units = "LMUCell", _cell_rows, layer.cell.hidden_features
    expected |= {"input_activation": "linear", "hidden_to_memory": True}
    expect("the cell's use_bias", layer.cell.dense_i.bias is not None, False)
  for name, value in expected.items():
    expect(name, getattr(layer, name), value)
  plain = layer.cell is None
  expect("memory_to_memory", layer.memory_feedback is not None, not plain)
  expect("use_bias", layer.input.bias is not None, plain)
  if plain:
    expect("hidden_bias", layer.read.bias is not None, True)
  config = {
    "model": model,
    "input_size": layer.d_model,
    "hidden_size": units,
    "memory_size": layer.order,
    "theta": _theta(layer),
  }
  return config, _published(layer, rows(layer), np.transpose)


def read_theta(theta: float | None, order: int, abar: Any) -> float:
  """The window of a published cell: what its config tells, or what its buffer `A` is of.

  Raises `ValueError` if there is neither, or if `A` is not that of `theta`, with the window that it
  is of.
  """
  if abar is None:
    if theta is None:
      raise ValueError("the config lacks theta")
    return theta
  if np.shape(abar) != (order, order):
    raise ValueError(f"A has shape {list(np.shape(abar))}, expected {[order, order]}")

  def fits(theta):
    return np.abs(transition(order, float(theta), "zoh") - abar).max() <= A_TOLERANCE

  if theta is not None and fits(theta):
    return theta
  found = _nearest_theta(np.asarray(abar, np.float64))
  if found is not None and fits(whole := max(round(found), 1)):  # as float32 tells a few digits
    found = whole
  if found is None or not fits(found):
    raise ValueError(f"A is not that of any theta at memory_size {order}")
  if theta is not None:
    raise ValueError(f"A is not that of theta {theta}, but of theta {found:.6g}")
  return found


def _nearest_theta(abar):
  """The window whose `Abar` is nearest; `None` if the first entry is none that there is."""
  order = len(abar)
  if not 0 < abar[0, 0] < 1:
    return None
  theta = 1 / (1 - abar[0, 0])  # to half a token
  for _ in range(6):  # Gauss-Newton steps
    found = transition(order, theta, "zoh")
    slope = -system(order)[0] @ found / theta**2
    theta = max(theta + np.vdot(slope, abar - found) / np.vdot(slope, slope), 0.5)
  return float(theta)


def _read_keras_cell(cell):
  """Options of a hidden cell with Keras's defaults; what Keras serialises is nested."""
  if cell is None:
    return None
  cell = {**cell, **cell.get("config", {})}
  name = cell.get("class_name", "").removesuffix("Cell")
  if name not in KERAS_CELLS:
    raise ValueError(
      f"hidden_cell is a {cell.get('class_name')!r}, which is not supported; expected None, "
      f"{' or '.join(KERAS_CELLS)}"
    )
  require(cell, "units")
  if cell.get("activation", "") is None:
    cell["activation"] = "linear"
  default = KERAS_CELLS[name]
  others = tuple(other for other in ACTIVATIONS if other != default)
  return {
    **read_config(cell, {"use_bias": True}, {"activation": (default, *others)}),
    "class_name": name,
  }


def _simple_cell(units, activation, use_bias, dtypes) -> Callable[..., nnx.SimpleCell]:
  """Makes NNX's simple cell, which always has a bias, without one if there is none."""
  held = dtypes["param_dtype"]
  dtypes = {"dtype": dtypes.get("dtype") or held, "param_dtype": held}

  def make(features, *, rngs):
    cell = nnx.SimpleCell(
      features, units, activation_fn=ACTIVATIONS[activation], **dtypes, rngs=rngs
    )
    if not use_bias:
      cell.dense_i = nnx.Linear(features, units, use_bias=False, **dtypes, rngs=rngs)
    return cell

  return make


def _cell_activation(cell):
  if not isinstance(cell, nnx.SimpleCell):
    raise ValueError(
      f"hidden_cell is a {type(cell).__name__}, which cannot be converted; expected SimpleCell"
    )
  expect("the cell's residual", cell.residual, False)
  known = [name for name, f in ACTIVATIONS.items() if f is cell.activation_fn]
  if not known:
    raise ValueError(
      f"the cell's activation_fn is {cell.activation_fn}, which cannot be converted; expected that "
      f"of {', '.join(ACTIVATIONS)}"
    )
  return known[0]


def _keras_rows(layer: LMU) -> list[Rows]:
  c, memory = layer.channels, layer.channels * layer.order
  seen = memory + (layer.d_model if layer.input_to_hidden else 0)
  cell = "hidden_cell"
  if layer.hidden_to_memory:
    units = layer.output_feedback.in_features
    fed = Rows({"kernel": layer.d_model + units}, ("input/kernel", "output_feedback/kernel"))
  else:
    fed = Rows({"kernel": layer.d_model}, ("input/kernel",))
  rows = [fed]
  if layer.input.bias is not None:
    rows.append(Rows({"bias": c}, ("input/bias",)))
  if layer.memory_feedback is not None:
    rows.append(Rows({"recurrent_kernel": memory}, ("memory_feedback/kernel",)))
  if layer.cell is not None:
    units = layer.cell.hidden_features
    rows.append(Rows({f"{cell}/kernel": seen}, ("cell/dense_i/kernel",)))
    rows.append(Rows({f"{cell}/recurrent_kernel": units}, ("cell/dense_h/kernel",)))
    if layer.cell.dense_i.bias is not None:
      rows.append(Rows({f"{cell}/bias": units}, ("cell/dense_i/bias",)))
  elif layer.read is not None:
    ours = ("read/kernel", "skip/kernel") if layer.input_to_hidden else ("read/kernel",)
    rows.append(Rows({f"{cell}/kernel": seen}, ours))
    if layer.read.bias is not None:
      rows.append(Rows({f"{cell}/bias": layer.hidden_size}, ("read/bias",)))
  return rows


def _fft_rows(layer: LMU) -> list[Rows]:
  return [
    Rows({"W_u.weight": layer.d_model}, ("input/kernel",)),
    Rows({"W_u.bias": 1}, ("input/bias",)),
    Rows({"W_h.weight": layer.order + layer.d_model}, ("read/kernel", "skip/kernel")),
    Rows({"W_h.bias": layer.hidden_size}, ("read/bias",)),
  ]


def _cell_rows(layer: LMU) -> list[Rows]:
  units = layer.cell.hidden_features
  return [
    Rows({"e_x": layer.d_model}, ("input/kernel",)),
    Rows({"e_h": units}, ("output_feedback/kernel",)),
    Rows({"e_m": layer.order}, ("memory_feedback/kernel",)),
    Rows({"W_m": layer.order, "W_x": layer.d_model}, ("cell/dense_i/kernel",)),
    Rows({"W_h": units}, ("cell/dense_h/kernel",)),
  ]


def _leaves(layer: LMU) -> dict[str, Any]:
  return to_stacked({"params": split_model(layer)[1]})


def _filled(source, make, params, rows_of, turn):
  """The layer with `params`; `turn` takes an array from their layout to ours and back."""
  like = nnx.eval_shape(make)
  leaves, rows = _leaves(like), rows_of(like)
  shapes = {}
  for theirs, ours in rows:
    columns = leaves[f"params/{ours[0]}"].shape[1:]
    shapes |= {name: turn(np.empty((n, *columns))).shape for name, n in theirs.items()}
  weights = {name: Weight(name, shape) for name, shape in shapes.items()}
  read = convert(params, Table(source, weights, {}, 0, ""))
  filled = {}
  for theirs, ours in rows:
    whole = np.concatenate([turn(np.asarray(read[name])) for name in theirs])
    sizes = [leaves[f"params/{name}"].shape[0] for name in ours]
    parts = np.split(whole, np.cumsum(sizes)[:-1])
    filled |= {f"params/{name}": part for name, part in zip(ours, parts, strict=True)}
  if like.log_theta is not None:
    filled["params/log_theta"] = np.asarray(math.log(like.theta))
  return fill_module(make, filled)


def _published(layer, rows, turn) -> dict[str, np.ndarray]:
  leaves, params = _leaves(layer), {}
  for theirs, ours in rows:
    whole = np.concatenate([np.asarray(leaves[f"params/{name}"]) for name in ours])
    parts = np.split(whole, np.cumsum(list(theirs.values()))[:-1])
    params |= {name: turn(part) for name, part in zip(theirs, parts, strict=True)}
  return params


def _theta(layer: LMU) -> float:
  return layer.theta if layer.log_theta is None else float(jnp.exp(layer.log_theta[...]))
