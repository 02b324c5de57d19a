"""The Legendre Memory Unit with every option, against a token at a time in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws_errors import EXACT, error, largest

from triform.arch.interface import FORMS
from triform.arch.mixers.lmu import LMU, LMUState
from triform.kernels.lmu import reference

D, H, N, C, B, T = 3, 5, 4, 2, 2, 9
ACTIVATIONS = {
  "linear": lambda x: x,
  "relu": lambda x: np.maximum(x, 0),
  "tanh": np.tanh,
  "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / 2**0.5)) / 2),
}
CELLS = {
  "simple": nnx.SimpleCell,
  "gru": nnx.GRUCell,
  "lstm": nnx.OptimizedLSTMCell,
}
OPTIONS = {
  "published": {},
  "one_channel": {"channels": 1},
  "activations": {"input_activation": "linear", "hidden_activation": "tanh"},
  "gelu": {"input_activation": "gelu", "hidden_activation": "linear"},
  "no_input": {"input_to_hidden": False},
  "no_biases": {"use_bias": False, "hidden_bias": False},
  "euler": {"discretizer": "euler"},
  "learned": {"learn_theta": True},
  "memory": {"hidden_size": None},
  "memory_alone": {"hidden_size": None, "input_to_hidden": False},
  **{name: {"hidden_cell": name} for name in CELLS},
}
FEEDBACK = {
  "output_fed_back": {"hidden_to_memory": True},
  "memory_fed_back": {"memory_to_memory": True, "learn_theta": True},
  "memory_alone_fed_back": {"hidden_size": None, "memory_to_memory": True},
  "voelker": {
    "hidden_cell": "simple", "hidden_to_memory": True, "memory_to_memory": True, "use_bias": False,
    "input_activation": "linear",
  },
  "gru_fed_back": {"hidden_cell": "gru", "hidden_to_memory": True},
  "lstm_fed_back": {"hidden_cell": "lstm", "hidden_to_memory": True, "input_to_hidden": False},
}  # fmt: skip
RUNS = [(name, form) for name in OPTIONS for form in FORMS]
RUNS += [(name, "recurrent") for name in FEEDBACK]
# Every option in one form, or a few of them.
OPTION_RUNS = {(name, FORMS[i % 3]) for i, name in enumerate(OPTIONS)} | set(RUNS[-len(FEEDBACK) :])
FEW = {("published", "parallel"), ("memory", "chunkwise"), ("gru", "parallel")}
FEW |= {("output_fed_back", "recurrent"), ("voelker", "recurrent")}


def every_run(quick):
  slow = pytest.mark.slow
  runs = [pytest.param(*run, marks=() if run in quick else slow) for run in RUNS]
  return pytest.mark.parametrize(("name", "form"), runs)


def layer(dtype=None, param_dtype=jnp.float32, **options):
  """A layer whose weights are all random."""
  cell = options.pop("hidden_cell", None)
  if cell is not None:
    dtypes = {"dtype": dtype or param_dtype, "param_dtype": param_dtype}
    options["hidden_cell"] = functools.partial(CELLS[cell], hidden_features=H, **dtypes)
  sizes = {"order": N, "theta": 20.0, "channels": C, "chunk_size": 4}
  if cell is None:
    sizes["hidden_size"] = H
  options = {**sizes, **options}
  made = LMU(D, **options, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  params = nnx.state(made, nnx.Param)
  nnx.update(made, jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape), params))
  return made


def wide(name):
  """The layer `name` in float64."""
  return layer(param_dtype=jnp.float64, **{**OPTIONS, **FEEDBACK}[name])


def numbers(b=B, t=T):
  """x, reset and mask."""
  rng = np.random.default_rng(1)
  return rng.normal(size=(b, t, D)), rng.random((b, t)) < 0.3, rng.random((b, t)) < 0.7


def oracle(lmu, x, reset=None, mask=None):
  """One token of one row after another, as the docstring says; a cell is NNX's own."""
  f, g = ACTIVATIONS[lmu.input_activation], ACTIVATIONS[lmu.hidden_activation]
  theta = lmu.theta if lmu.log_theta is None else np.exp(np.float64(lmu.log_theta[...]))
  abar, bbar = reference.discretise(lmu.order, theta, lmu.discretizer)

  def linear(part, x):
    if part is None:
      return 0
    bias = 0 if part.bias is None else np.asarray(part.bias[...])
    return x @ np.asarray(part.kernel[...]) + bias

  outputs, states = [], []
  for row in range(len(x)):
    memory, carry = first = jax.tree.map(np.asarray, tuple(lmu.init_state(1)))
    outputs.append([])
    for n, token in enumerate(x[row]):
      if mask is not None and not mask[row, n]:
        outputs[-1].append(None)
        continue
      if reset is not None and reset[row, n]:
        memory, carry = first
      u = linear(lmu.input, token) + linear(lmu.memory_feedback, memory.reshape(-1))
      if lmu.output_feedback is not None:
        u = u + linear(lmu.output_feedback, np.asarray(jax.tree.leaves(carry)[-1])[0])
      memory = memory @ abar.T + f(u)[:, None] * bbar
      seen = memory.reshape(-1)
      if lmu.input_to_hidden:
        seen = np.concatenate([seen, token])
      if lmu.cell is not None:
        carry, y = lmu.cell(carry, seen[None])
        y = np.asarray(y)[0]
      elif lmu.read is None:
        y = seen
      else:
        y = g(linear(lmu.read, memory.reshape(-1)) + linear(lmu.skip, token))
        carry = y[None] if lmu.hidden_to_memory else ()
      outputs[-1].append(y)
    states.append(LMUState(memory, carry))
  y = np.array([[np.zeros_like(y) if o is None else o for o in row] for row in outputs])
  return y, jax.tree.map(lambda *a: np.concatenate(a), *states)


@every_run(OPTION_RUNS)
def test_every_option_is_what_it_says(name, form):
  x, reset, mask = numbers()
  with jax.enable_x64():
    lmu = wide(name)
    y, state = lmu(x, form=form, reset=reset, mask=mask)
    expected = oracle(lmu, x, reset, mask)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
      lambda a: (a.shape, a.dtype), lmu.init_state(B)
    )
  assert error(y[mask], expected[0][mask]) <= EXACT
  assert error(state, expected[1]) <= EXACT


@every_run(FEW)
def test_pieces_are_the_whole(name, form):
  """Also of one token, and without any flags."""
  x, _, _ = numbers()
  with jax.enable_x64():
    lmu, state, pieces = wide(name), None, []
    for start, stop in ((0, 4), (4, 5), (5, T)):
      y, state = lmu(x[:, start:stop], state, form=form)
      pieces.append(y)
    expected = oracle(lmu, x)
  assert error(np.concatenate(pieces, axis=1), expected[0]) <= EXACT
  assert error(state, expected[1]) <= EXACT


@pytest.mark.parametrize("name", ["output_fed_back", "memory_fed_back"])
@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
def test_feedback_is_recurrent(name, form):
  message = f"form is '{form}', but what the memory is fed depends on .*; expected recurrent, or no"
  with pytest.raises(NotImplementedError, match=message):
    layer(**FEEDBACK[name])(np.zeros((B, T, D), np.float32), form=form)


@every_run(FEW)
def test_tokens_ahead_are_answered_and_forgotten(name, form):
  x, reset, mask = numbers()
  with jax.enable_x64():
    lmu = wide(name)
    whole, _ = lmu(x, form=form, reset=reset, mask=mask)
    for ahead in (2, T):
      kept = T - ahead
      y, state = lmu(x, form=form, reset=reset, mask=mask, ahead=ahead)
      expected = lmu.init_state(B)
      if kept:
        _, expected = lmu(x[:, :kept], form=form, reset=reset[:, :kept], mask=mask[:, :kept])
      assert error(y[mask], whole[mask]) <= EXACT
      assert error(state, expected) <= EXACT


@pytest.mark.parametrize(
  "name", ["published", "no_input", "no_biases", "memory", "memory_fed_back"]
)
def test_the_memory_tells_the_last_output(name):
  x, _, _ = numbers()
  with jax.enable_x64():
    lmu = wide(name)
    y, state = lmu(x, form="recurrent")
    assert error(lmu.read_out(state.memory, x[:, -1]), y[:, -1]) <= EXACT


@every_run(FEW)
def test_the_memory_is_in_float32_at_least(name, form):
  x, reset, mask = numbers()
  options = {**OPTIONS, **FEEDBACK}[name]
  narrow, exact = layer(dtype=jnp.bfloat16, **options), layer(**options)
  y, state = narrow(x, form=form, reset=reset, mask=mask)
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32)}
  expected, _ = exact(x, form=form, reset=reset, mask=mask)
  assert error(y[mask], expected[mask]) <= 0.03  # a dozen roundings to 8 bits, and feedback
  again, state = narrow(x, state, form=form)
  assert again.dtype == y.dtype and state.memory.dtype == jnp.float32


@every_run(FEW)
def test_padding_may_be_nan(name, form):
  x, reset, mask = numbers()
  lmu = layer(**{**OPTIONS, **FEEDBACK}[name])
  expected, _ = lmu(np.float32(x), form=form, reset=reset, mask=mask)
  broken = np.where(mask[..., None], x, np.nan)
  y, state = lmu(np.float32(broken), form=form, reset=reset, mask=mask)
  np.testing.assert_array_equal(y[mask], expected[mask])
  after = lmu(np.float32(broken), state, form=form, reset=reset, mask=np.zeros_like(mask))[1]
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_theta_is_learned():
  """A layer finds the window of another one from what that remembers."""
  x = np.float32(numbers(4, 40)[0])
  options = {"hidden_size": None, "input_to_hidden": False, "input_activation": "linear"}
  target, _ = layer(**options)(x)
  lmu = layer(**options, learn_theta=True)
  lmu.log_theta[...] = jnp.log(12.0)
  graphdef, theta, rest = nnx.split(lmu, lambda path, _: "log_theta" in path, ...)

  @jax.jit
  def step(theta):
    def loss(theta):
      return jnp.mean((nnx.merge(graphdef, theta, rest)(x)[0] - target) ** 2)

    value, gradient = jax.value_and_grad(loss)(theta)
    return value, jax.tree.map(lambda a, g: a - 0.05 * g / jnp.abs(g), theta, gradient)

  losses = []
  for _ in range(10):
    value, theta = step(theta)
    losses.append(float(value))
  assert losses[-1] < 0.05 * losses[0]
  assert float(jnp.exp(jax.tree.leaves(theta)[0])) == pytest.approx(20, rel=0.06)


def test_initial_values():
  lmu = LMU(D, order=N, theta=20.0, channels=C, hidden_size=H, learn_theta=True, rngs=nnx.Rngs(0))
  assert float(jnp.exp(lmu.log_theta[...])) == pytest.approx(20.0)
  assert not lmu.input.bias[...].any() and not lmu.read.bias[...].any()
  ones = nnx.initializers.ones
  lmu = LMU(
    D, order=N, theta=20.0, hidden_size=H, hidden_to_memory=True, memory_to_memory=True,
    kernel_init=ones, rngs=nnx.Rngs(0),
  )  # fmt: skip
  for part in (lmu.input, lmu.read, lmu.skip, lmu.output_feedback, lmu.memory_feedback):
    assert (part.kernel[...] == 1).all()


def test_chunks_are_as_long_as_told():
  x = jax.ShapeDtypeStruct((1, 64, D), jnp.float32)

  def size(chunk_size):
    lmu = layer(chunk_size=chunk_size)
    return largest(lambda x: lmu(x, form="chunkwise")[0], x)

  assert size(32) >= 3 * size(4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"order": 0}, "order is 0, expected at least 1"),
    ({"channels": 0}, "channels is 0, expected at least 1"),
    ({"hidden_size": 0}, "hidden_size is 0, expected at least 1"),
    ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
    ({"theta": -1.0}, "theta is -1.0, expected a positive number of tokens"),
    ({"theta": float("nan")}, "theta is nan, expected a positive number of tokens"),
    ({"input_activation": "swish"}, "input_activation is 'swish', expected one of linear, relu,"),
    ({"hidden_activation": "swish"}, "hidden_activation is 'swish', expected one of linear, relu,"),
    ({"discretizer": "tustin"}, "discretizer is 'tustin', expected one of zoh, euler"),
    ({"hidden_size": 3, "hidden_cell": nnx.GRUCell}, "hidden_size and hidden_cell are both given"),
    ({"hidden_to_memory": True}, "hidden_to_memory needs a hidden_size or a hidden_cell"),
    (
      {"hidden_cell": lambda features, rngs: nnx.Linear(features, 3, rngs=rngs)},
      "hidden_cell makes a Linear, expected a recurrent cell",
    ),
  ],
)
def test_bad_options_are_told(options, message):
  with pytest.raises(ValueError, match=message):
    LMU(D, **{"order": N, "theta": 20.0, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m, x: m(x[..., :2]), r"x has shape \[2, 9, 2\], expected \[batch, time, 3\]"),
    (lambda m, x: m(x[0]), r"x has shape \[9, 3\], expected \[batch, time, 3\]"),
    (lambda m, x: m(x, form="serial"), "form is 'serial', expected one of parallel, chunkwise"),
    (lambda m, x: m(x, reset=np.zeros((2, 3), bool)), r"reset is bool\[2, 3\], expected bool"),
  ],
)
def test_bad_arguments_are_told(call, message):
  with pytest.raises(ValueError, match=message):
    call(layer(), np.zeros((B, T, D), np.float32))
