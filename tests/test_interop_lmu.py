"""The Legendre Memory Unit importers against numbers of the published layers.

`data/lmu.npz`, float64 with gradients: `fft_*` the LMUFFTCell of LMUFormer 5debadd, `cell_2019` the
LMU of pytorch-lmu 95a0b93, `keras_*` the equations of KerasLMU 0.8.0; `m0/` from another memory.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from triform.arch.interface import FORMS
from triform.arch.interop.lmu import (
  cell_from_lmuformer,
  from_keras_lmu,
  read_theta,
  to_keras_lmu,
)
from triform.arch.interop.lmuformer import to_lmuformer
from triform.arch.layout import split_model, to_stacked
from triform.arch.mixers.lmu import LMU, LMUState
from triform.kernels.lmu.tables import transition

ARRAYS = dict(np.load(Path(__file__).parent / "data/lmu.npz"))
CASES = [name.removesuffix("/cot") for name in ARRAYS if name.endswith("/cot")]
RECURRENT = ("keras_recurrent", "cell_2019")
RUNS = [(case, form) for case in CASES for form in FORMS if case not in RECURRENT]
RUNS += [(case, "recurrent") for case in RECURRENT]
QUICK = {
  ("fft_small", "parallel"), ("fft_ragged", "chunkwise"), ("keras_multi", "chunkwise"),
  ("keras_euler", "parallel"), ("keras_skip", "recurrent"), ("keras_rnn_hidden", "parallel"),
  ("keras_recurrent", "recurrent"), ("cell_2019", "recurrent"),
}  # fmt: skip
every_run = pytest.mark.parametrize(
  ("case", "form"),
  [pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow) for run in RUNS],
)


def group(case, prefix):
  prefix = f"{case}/{prefix}"
  return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


def published(case):
  """The published constructor's arguments, and the parameters."""
  return json.loads(str(ARRAYS[f"{case}/meta"]))["config"], group(case, "param/")


def importer(case):
  return from_keras_lmu if case.startswith("keras") else cell_from_lmuformer


def layer_of(case, **config):
  told, params = published(case)
  return importer(case)({**told, **config}, params, chunk_size=8)


def starts(case):
  """What the names of each run begin with; the second is from another state."""
  return [f"{case}/"] if case == "cell_2019" else [f"{case}/", f"{case}/m0/"]


def load(case, start, dtype):
  """x, and the state before; in the files a channel's memory stands behind another's."""
  x, config = ARRAYS[f"{case}/in/x"].astype(dtype), published(case)[0]
  if f"{start}in/m0" not in ARRAYS:
    return x, None
  order = config.get("order", config.get("memory_size"))
  hidden = ARRAYS.get(f"{start}in/h0")
  memory = ARRAYS[f"{start}in/m0"].reshape(len(x), -1, order).astype(dtype)
  return x, LMUState(memory, () if hidden is None else hidden.astype(dtype))


def error(got, expected):
  got, expected = np.asarray(got), np.asarray(expected)
  return np.abs(got - expected).max() / np.abs(expected).max()


@every_run
def test_published_outputs_and_states(case, form):
  """Eagerly, of NumPy arrays."""
  for dtype, most in ((np.float32, 1e-5), (np.float64, 1e-12)):
    with jax.enable_x64(dtype == np.float64):
      layer = layer_of(case)
      for start in starts(case):
        x, state = load(case, start, dtype)
        y, after = layer(x, state, form=form)
        assert y.dtype == after.memory.dtype == dtype
        assert error(y, ARRAYS[f"{start}out"]) <= most
        final = ARRAYS[f"{start}final_m"]
        assert error(after.memory.reshape(final.shape), final) <= most
        if f"{start}final_h" in ARRAYS:
          assert error(after.hidden, ARRAYS[f"{start}final_h"]) <= most


@every_run
@pytest.mark.parametrize(
  ("dtype", "most"), [(np.float64, 1e-12), pytest.param(np.float32, 1e-4, marks=pytest.mark.slow)]
)
def test_published_gradients(case, form, dtype, most):
  """Of `sum(out * cot) + sum(final_m * cot_m)`, by inputs, states, parameters and theta."""
  learned = {"trainable_theta": True} if case.startswith("keras") else {}
  with jax.enable_x64(dtype == np.float64):
    graphdef, weights, rest = split_model(layer_of(case, **learned))

    def loss(weights, x, state, by_memory):
      y, after = nnx.merge(graphdef, weights, rest)(x, state, form=form)
      total = jnp.sum(y * ARRAYS[f"{case}/cot"].astype(dtype))
      return total if by_memory is None else total + jnp.sum(after.memory * by_memory)

    for start in starts(case):
      if f"{start}grad_in/x" not in ARRAYS:
        continue
      x, state = jax.tree.map(jnp.asarray, load(case, start, dtype))
      by_memory = ARRAYS.get(f"{start}cot_m")
      if by_memory is not None:
        by_memory = by_memory.astype(dtype).reshape(state.memory.shape)
      gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
      by_weights, by_x, by_state = gradient(weights, x, state, by_memory)
      assert error(by_x, ARRAYS[f"{start}grad_in/x"]) <= most
      if state is not None:
        for ours, name in zip(by_state, ("m0", "h0"), strict=True):
          if f"{start}grad_in/{name}" in ARRAYS:
            theirs = ARRAYS[f"{start}grad_in/{name}"]
            assert error(ours.reshape(theirs.shape), theirs) <= most
      if expected := {
        k.split("grad_param/")[1]: ARRAYS[k] for k in ARRAYS if f"{start}grad_p" in k
      }:
        assert_same_gradients(case, to_stacked(by_weights), expected, most)


def assert_same_gradients(case, got, expected, most):
  """The published ones are laid out as the parameters are, and so imported like them."""
  config, params = published(case)
  if "log_theta" in got:
    expected["theta_inv"] = params["theta_inv"]
    by_theta = ARRAYS[f"{case}/grad_theta"]
    assert error(got.pop("log_theta"), by_theta / params["theta_inv"]) <= most
  wanted = to_stacked(split_model(importer(case)(config, expected))[1])
  assert got.keys() == wanted.keys()
  for name, leaf in wanted.items():
    assert error(got[name], leaf) <= most, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("x64", [False, True])
def test_exporters_are_the_inverse(case, x64):
  config, params = published(case)
  convert = to_keras_lmu if case.startswith("keras") else to_lmuformer
  with jax.enable_x64(x64):
    layer = layer_of(case)
    told, back = convert(layer)
    again = split_model(importer(case)(told, back))[1]
    jax.tree.map(np.testing.assert_array_equal, again, split_model(layer)[1])
  config.pop("seq_len", None)  # of the file's inputs
  if config.get("hidden_cell"):
    config["hidden_cell"] = {**told["hidden_cell"], **config["hidden_cell"]}
  assert {**told, **config} == told
  assert back.keys() == params.keys()
  for name, array in params.items():
    np.testing.assert_array_equal(back[name], array if x64 else np.float32(array), err_msg=name)


def test_a_learned_theta_is_exported_as_it_is():
  config, params = published("keras_plain")
  layer = from_keras_lmu({**config, "trainable_theta": True}, params)
  layer.log_theta[...] = jnp.log(30.0)
  told, back = to_keras_lmu(layer)
  assert told["trainable_theta"] and told["theta"] == pytest.approx(30, rel=1e-6)
  assert back["theta_inv"] == pytest.approx(1 / 30, rel=1e-6)
  again = from_keras_lmu(told, back)
  assert float(again.log_theta[...]) == pytest.approx(float(layer.log_theta[...]), rel=1e-6)


def test_the_window_is_that_of_the_weights():
  config, params = published("keras_plain")
  assert from_keras_lmu({**config, "theta": 99.0}, params).theta == 24.0
  del params["theta_inv"]  # which only a trained one has
  assert from_keras_lmu({**config, "theta": 99.0}, params).theta == 99.0


def test_what_keras_serialises_is_taken():
  config, params = published("keras_recurrent")
  cell = config["hidden_cell"]
  nested = {"class_name": "SimpleRNNCell", "config": {"units": 7, "activation": "tanh"}}
  x = np.float32(ARRAYS["keras_recurrent/in/x"])
  y, _ = from_keras_lmu({**config, "hidden_cell": nested}, params)(x, form="recurrent")
  np.testing.assert_array_equal(y, layer_of("keras_recurrent")(x, form="recurrent")[0])
  linear = from_keras_lmu({**config, "hidden_cell": {**cell, "activation": None}}, params)
  assert to_keras_lmu(linear)[0]["hidden_cell"]["activation"] == "linear"


@pytest.mark.parametrize("case", ["keras_multi", "keras_recurrent"])
def test_a_hidden_cell_without_a_bias(case):
  config, params = published(case)
  zeros = {**params, "hidden_cell/bias": np.zeros_like(params.pop("hidden_cell/bias"))}
  expected = from_keras_lmu(config, zeros)
  config["hidden_cell"]["use_bias"] = False
  layer = from_keras_lmu(config, params)
  x = np.float32(ARRAYS[f"{case}/in/x"])
  assert error(layer(x, form="recurrent")[0], expected(x, form="recurrent")[0]) <= 1e-6
  told, back = to_keras_lmu(layer)
  assert not told["hidden_cell"]["use_bias"] and back.keys() == params.keys()


def with_buffers(order, theta):
  """As a state dict has them, in float32."""
  config, params = published("fft_small")
  abar = transition(order, float(theta), "zoh").astype(np.float32)
  spectrum = np.zeros((order, 21), np.complex64)
  return config, params | {"A": abar, "B": abar[:, :1], "H": abar, "fft_H": spectrum}


def test_buffers_tell_theta():
  config, params = with_buffers(6, 32)
  layer = cell_from_lmuformer(config, params)
  assert layer.theta == 32 and layer.input.kernel[...].dtype == jnp.float32
  del config["theta"]
  assert cell_from_lmuformer(config, params).theta == 32
  with pytest.raises(ValueError, match="the config lacks theta"):
    cell_from_lmuformer(config, published("fft_small")[1])
  config, params = with_buffers(6, 33.25)
  with pytest.raises(ValueError, match=r"A is not that of theta 32, but of theta 33\.25$"):
    cell_from_lmuformer(config, params)
  del config["theta"]
  assert cell_from_lmuformer(config, params).theta == pytest.approx(33.25, rel=1e-6)


@pytest.mark.parametrize("theta", [1, 1.3, 7, 16.5, 128, 5000])
@pytest.mark.parametrize("order", [1, 2, 6, 40])
def test_the_window_of_any_system_is_found(order, theta):
  abar = transition(order, float(theta), "zoh")
  assert read_theta(None, order, abar.astype(np.float32)) == pytest.approx(theta, rel=1e-3)
  assert read_theta(None, order, abar) == pytest.approx(theta, rel=1e-3)


@pytest.mark.parametrize(
  ("abar", "message"),
  [
    (np.zeros((5, 5)), r"A has shape \[5, 5\], expected \[6, 6\]"),
    (np.eye(6), "A is not that of any theta at memory_size 6"),
    (np.full((6, 6), 0.5), "A is not that of any theta at memory_size 6"),
    (np.full((6, 6), np.nan), "A is not that of any theta at memory_size 6"),
    (transition(12, 32.0, "zoh")[:6, :6].T, "A is not that of any theta at memory_size 6"),
  ],
)
def test_what_is_no_system_is_refused(abar, message):
  with pytest.raises(ValueError, match=message):
    read_theta(32, 6, abar)


@pytest.mark.parametrize(
  ("case", "change", "message"),
  [
    ("keras_recurrent", lambda c, p: p.pop("kernel"), "the KerasLMU config; missing: kernel"),
    ("keras_recurrent", lambda c, p: p.pop("hidden_cell/bias"), "missing: hidden_cell/bias"),
    ("keras_recurrent", lambda c, p: p.update(extra=np.zeros(2)), "not expected: extra"),
    ("keras_recurrent", lambda c, p: c.update(use_bias=False), "not expected: bias"),
    (
      "keras_recurrent",
      lambda c, p: c.update(memory_d=3),
      r"; kernel has shape \[10, 2\], expected \[10, 3\]|recurrent_kernel has shape \[12, 2\],",
    ),
    (
      "keras_recurrent",
      lambda c, p: p.update(kernel=np.zeros((5, 2))),
      r"kernel has shape \[5, 2\], expected \[8, 2\]",
    ),
    (
      "keras_multi",
      lambda c, p: c.update(input_to_hidden=False),
      r"hidden_cell/kernel has shape \[41, 9\], expected \[36, 9\]",
    ),
    ("keras_multi", lambda c, p: c.pop("order"), "the config lacks order"),
    ("keras_multi", lambda c, p: c["hidden_cell"].pop("units"), "the config lacks units"),
    (
      "keras_multi",
      lambda c, p: c.update(discretizer="tustin"),
      "discretizer is 'tustin', which is not supported; expected 'zoh' or 'euler'",
    ),
    ("keras_multi", lambda c, p: c.update(go_backwards=True), "go_backwards is True, which is not"),
    (
      "keras_multi",
      lambda c, p: c["hidden_cell"].update(class_name="GRUCell"),
      "hidden_cell is a 'GRUCell', which is not supported; expected None, Dense or SimpleRNN",
    ),
    (
      "keras_multi",
      lambda c, p: c["hidden_cell"].update(activation="selu"),
      "activation is 'selu', which is not supported; expected 'linear' or 'relu'",
    ),
    ("keras_plain", lambda c, p: p.update(theta_inv=np.float32(0)), "theta_inv is 0.0, expected a"),
    (
      "keras_plain",
      lambda c, p: (c.update(trainable_theta=True), p.pop("theta_inv")),
      "missing: theta_inv",
    ),
    ("fft_small", lambda c, p: p.pop("W_u.bias"), "the LMUFFTCell config; missing: W_u.bias"),
    (
      "fft_small",
      lambda c, p: c.update(memory_size=7),
      r"W_h.weight has shape \[5, 9\], expected \[5, 10\]",
    ),
    ("fft_small", lambda c, p: c.pop("hidden_size"), "the config lacks hidden_size"),
    (
      "fft_small",
      lambda c, p: c.update(model="LMU"),
      "model is 'LMU', which is not supported; expected 'LMUFFTCell' or 'LMUCell'",
    ),
    ("cell_2019", lambda c, p: p.pop("W_x"), "the LMUCell config; missing: W_x"),
    (
      "cell_2019",
      lambda c, p: c.update(memory_size=9),
      r"W_m has shape \[7, 10\], expected \[7, 9\]|e_m has shape \[1, 10\], expected \[1, 9\]",
    ),
    ("cell_2019", lambda c, p: c.update(learn_a=True), "learn_a is True, which is not supported"),
  ],
)
def test_what_does_not_fit_is_named(case, change, message):
  config, params = published(case)
  change(config, params)
  with pytest.raises(ValueError, match=message):
    importer(case)(config, params)


def make(**options):
  sizes = {"order": 4, "theta": 20.0, "hidden_size": 3}
  if "hidden_cell" in options:
    del sizes["hidden_size"]
  return LMU(3, **{**sizes, **options}, rngs=nnx.Rngs(0))


def simple(features, *, rngs, **options):
  return nnx.SimpleCell(features, 3, **options, rngs=rngs)


def residual(features, *, rngs):
  return simple(features, residual=True, rngs=rngs)


def sine(features, *, rngs):
  return simple(features, activation_fn=jnp.sin, rngs=rngs)


def gru(features, *, rngs):
  return nnx.GRUCell(features, 3, rngs=rngs)


class Cell(nnx.RNNCellBase):
  def initialize_carry(self, shape, rngs):
    return jnp.zeros((*shape[:-1], 3))


def other(features, *, rngs):
  return Cell()


FED = {"input_activation": "linear", "hidden_to_memory": True}


@pytest.mark.parametrize(
  ("convert", "options", "message"),
  [
    (to_keras_lmu, {}, "input_activation is 'relu', which cannot be converted; expected 'linear'"),
    (to_keras_lmu, {"input_activation": "linear", "hidden_cell": gru}, "hidden_cell is a GRUCell"),
    (
      to_keras_lmu,
      {"input_activation": "linear", "hidden_cell": residual},
      "the cell's residual is True",
    ),
    (
      to_keras_lmu,
      {"input_activation": "linear", "hidden_cell": sine},
      "the cell's activation_fn is .* cannot be converted; expected that of linear, relu",
    ),
    (to_lmuformer, {"channels": 2}, "channels is 2, which cannot be converted; expected 1"),
    (to_lmuformer, {"hidden_size": None}, "hidden_size is None, which cannot be converted"),
    (to_lmuformer, {"discretizer": "euler"}, "discretizer is 'euler', which cannot be"),
    (to_lmuformer, {"input_to_hidden": False}, "input_to_hidden is False, which cannot be"),
    (to_lmuformer, {"hidden_activation": "tanh"}, "hidden_activation is 'tanh', which cannot"),
    (to_lmuformer, {"hidden_to_memory": True}, "hidden_to_memory is True, which cannot be"),
    (to_lmuformer, {"memory_to_memory": True}, "memory_to_memory is True, which cannot be"),
    (to_lmuformer, {"use_bias": False}, "use_bias is False, which cannot be converted"),
    (to_lmuformer, {"hidden_bias": False}, "hidden_bias is False, which cannot be converted"),
    (to_lmuformer, {**FED, "hidden_cell": other}, "hidden_cell is a Cell, which cannot be"),
    (
      to_lmuformer,
      {**FED, "hidden_cell": simple},
      "the cell's use_bias is True, which cannot",
    ),
  ],
)
def test_what_the_published_code_has_not_is_refused(convert, options, message):
  with pytest.raises(ValueError, match=message):
    convert(make(**options))
