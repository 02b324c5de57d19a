"""Leaky integrate-and-fire neurons: the kernel against loops over tokens in float64 NumPy."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from laws_cases import masks, resets
from laws_errors import EXACT, error

from triform import kernels
from triform.kernels.lif import reference

B, T, D = 2, 7, 3
DERIVATIVES = {  # other ways to write them
  "sigmoid": lambda z, a: a / 4 / np.cosh(a * z / 2) ** 2,
  "atan": lambda z, a: 2 * a / (4 + (np.pi * a * z) ** 2),
  "triangle": lambda z, a: np.where(np.abs(z) < 1 / a, a - a**2 * np.abs(z), 0.0),
}
SLOPES = {"sigmoid": 4.0, "atan": 2.0, "triangle": 1.0}
OPTIONS = (
  "threshold",
  "reset_value",
  "surrogate",
  "slope",
  "decay_input",
  "detach_reset",
)
every_reset_value = pytest.mark.parametrize("reset_value", [0.0, -0.25, None])
every_decay = pytest.mark.parametrize("decay_input", [True, False])


@functools.partial(jax.jit, static_argnames=OPTIONS)
def fire(x, tau, state, reset, mask, **options):
  return kernels.lif(x, tau=tau, state=state, reset=reset, mask=mask, **options)


def numbers(seed, t):
  """x, tau by neuron and state; about half of the potentials reach 1."""
  rng = np.random.default_rng(seed)
  return 2 + 3 * rng.normal(size=(B, t, D)), rng.uniform(1, 4, D), rng.normal(size=(B, D))


def dyadic(seed, t):
  """The same in quarters, with a `tau` of 2: no operation rounds, and potentials meet 1 exactly."""
  rng = np.random.default_rng(seed)
  return rng.integers(-4, 12, (B, t, D)) / 4, np.asarray(2.0), rng.integers(-4, 5, (B, D)) / 4


@st.composite
def tokens(draw, *lengths):
  t = draw(st.sampled_from(lengths))
  return draw(st.integers(0, 999)), t, draw(resets(B, t)), draw(masks(B, t))


@every_decay
@every_reset_value
@given(drawn=tokens(1, T))
def test_is_the_loop(decay_input, reset_value, drawn):
  seed, t, reset, mask = drawn
  arrays = numbers(seed, t)
  options = {"threshold": 0.75, "reset_value": reset_value, "decay_input": decay_input}
  x, tau, state = arrays
  flags = {"reset": reset, "mask": mask}
  expected = reference.lif(x, tau=tau, state=state, **flags, **options)
  with jax.enable_x64():
    spikes, after = fire(*arrays, reset, mask, **options)
  assert spikes.dtype == after.dtype == np.float64
  np.testing.assert_array_equal(spikes, expected[0])
  assert error(after, expected[1]) <= EXACT


@every_reset_value
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@given(drawn=tokens(1, T))
def test_narrow_inputs_are_integrated_in_float32_and_equality_spikes(reset_value, dtype, drawn):
  seed, t, reset, mask = drawn
  x, tau, state = dyadic(seed, t)
  flags = {"reset": reset, "mask": mask}
  expected = reference.lif(x, tau=tau, state=state, reset_value=reset_value, **flags)
  arrays = (jnp.asarray(x, dtype), np.float32(tau), np.float32(state))
  spikes, after = fire(*arrays, reset, mask, reset_value=reset_value)
  assert spikes.dtype == dtype and after.dtype == np.float32
  np.testing.assert_array_equal(np.float64(spikes), expected[0])
  np.testing.assert_array_equal(after, expected[1])


def test_equality_counts_as_a_spike():
  currents = np.asarray([[[2.0, np.nextafter(np.float32(2), np.float32(0))]]], np.float32)
  np.testing.assert_array_equal(kernels.lif(currents)[0], [[[1, 0]]])


def test_a_wide_state_stays_wide():
  x, state = np.ones((B, T, D), np.float32), np.full((B, D), 0.1)
  with jax.enable_x64():
    spikes, after = kernels.lif(x, tau=3.0, threshold=9.0, state=state)
  assert spikes.dtype == np.float32 and after.dtype == np.float64
  assert error(after, reference.lif(x, tau=3.0, threshold=9.0, state=state)[1]) <= EXACT


@every_reset_value
@pytest.mark.parametrize("cut", [0, 3, T])
def test_splits_compose_bit_for_bit(reset_value, cut):
  rng, (x, tau, state) = np.random.default_rng(cut), map(np.float32, numbers(cut, T))
  reset, mask = rng.random((B, T)) < 0.3, rng.random((B, T)) < 0.7
  run = functools.partial(fire, reset_value=reset_value)
  whole = run(x, tau, state, reset, mask)
  start, state = run(x[:, :cut], tau, state, reset[:, :cut], mask[:, :cut])
  rest, state = run(x[:, cut:], tau, state, reset[:, cut:], mask[:, cut:])
  np.testing.assert_array_equal(np.concatenate([start, rest], axis=1), whole[0])
  np.testing.assert_array_equal(state, whole[1])


def adjoint(arrays, reset, mask, cotangents, reset_value, decay_input, detach_reset):
  """Gradients of x, tau and state, one token at a time from the last."""
  (x, tau, state), threshold, rest = arrays, 1.0, reset_value or 0.0
  surrogate = functools.partial(DERIVATIVES["sigmoid"], a=SLOPES["sigmoid"])
  flags = {"reset": reset, "mask": mask, "reset_value": reset_value, "decay_input": decay_input}
  spikes, _, h = reference.lif(x, tau=tau, state=state, threshold=threshold, **flags)
  d_spikes, d_state = cotangents[0], cotangents[1].copy()
  d_x, d_tau = np.zeros_like(x), np.zeros_like(tau)
  for row in range(B):
    v = [state[row]]  # before each token
    for n in range(T):
      s = spikes[row, n]
      after = h[row, n] - s * threshold if reset_value is None else np.where(s, rest, h[row, n])
      v.append(after if mask[row, n] else v[-1])
    for n in reversed(range(T)):
      if not mask[row, n]:
        continue
      s, onward, before = spikes[row, n], d_state[row], rest if reset[row, n] else v[n]
      kept, jump = (1, -threshold) if reset_value is None else (1 - s, rest - h[row, n])
      through_spike = d_spikes[row, n] + (0 if detach_reset else jump * onward)
      d_h = through_spike * surrogate(h[row, n] - threshold) + kept * onward
      d_x[row, n] = d_h / tau if decay_input else d_h
      d_tau -= d_h * (decay_input * x[row, n] - (before - rest)) / tau**2
      d_state[row] = 0 if reset[row, n] else d_h * (1 - 1 / tau)
  return d_x, d_tau, d_state


@every_decay
@every_reset_value
@pytest.mark.parametrize("detach_reset", [True, False])
@given(drawn=tokens(T))
def test_gradients_are_the_adjoint_loop(decay_input, reset_value, detach_reset, drawn):
  seed, _, reset, mask = drawn
  arrays, rng = numbers(seed, T), np.random.default_rng(seed)
  cotangents = rng.normal(size=(B, T, D)), rng.normal(size=(B, D))
  options = {
    "reset_value": reset_value,
    "decay_input": decay_input,
    "detach_reset": detach_reset,
  }
  expected = adjoint(arrays, reset, mask, cotangents, **options)
  with jax.enable_x64():
    got = backward(arrays, reset, mask, cotangents, **options)
  for gradient, truth in zip(got, expected, strict=True):
    assert error(gradient, truth) <= EXACT


@functools.partial(jax.jit, static_argnames=OPTIONS)
def backward(arrays, reset, mask, cotangents, **options):
  return jax.vjp(lambda *a: fire(*a, reset, mask, **options), *arrays)[1](cotangents)


@pytest.mark.parametrize("name", kernels.SURROGATES)
def test_surrogates_are_their_formulas(name):
  """With a `tau` of 1 the potential is the current."""
  z = np.linspace(-2, 2, 81)
  with jax.enable_x64():
    for slope in (None, 3.0):

      def spikes(x, slope=slope):
        return kernels.lif(x, tau=1.0, surrogate=name, slope=slope)[0].sum()

      got = jax.grad(spikes)(jnp.asarray(1 + z).reshape(1, 1, -1))[0, 0]
      expected = DERIVATIVES[name](z, SLOPES[name] if slope is None else slope)
      np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@every_reset_value
def test_the_spike_that_resets_has_a_gradient_unless_detached(reset_value):
  x = jnp.asarray(numbers(0, T)[0], jnp.float32)

  def total(x, detach_reset):
    return kernels.lif(x, reset_value=reset_value, detach_reset=detach_reset)[1].sum()

  detached, whole = (jax.grad(total)(x, flag) for flag in (True, False))
  assert np.abs(detached - whole).max() > 0.01


@every_reset_value
def test_masked_tokens_and_a_state_before_a_reset_may_be_nan(reset_value):
  arrays = [np.float32(a) for a in numbers(0, T)]
  reset, mask = np.zeros((B, T), bool), np.ones((B, T), bool)
  reset[:, [1, 4]], mask[:, [0, 4, 6]] = True, False  # the first real token starts afresh
  cotangents = np.ones((B, T, D), np.float32), np.ones((B, D), np.float32)

  def outcome(junk):
    x, tau, _ = arrays
    junky = np.where(mask[..., None], x, junk), tau, np.full((B, D), junk, np.float32)
    options = {"reset_value": reset_value, "detach_reset": False}
    outputs = fire(*junky, reset, mask, **options)
    return *outputs, *backward(junky, reset, mask, cotangents, **options)

  for dirty, clean in zip(outcome(np.float32(np.nan)), outcome(np.float32(0)), strict=True):
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(dirty, clean)
  spikes, *_, d_x, _, d_state = outcome(np.float32(np.nan))
  assert not spikes[:, ~mask[0]].any() and not d_x[:, ~mask[0]].any() and not d_state.any()


def test_a_masked_call_keeps_the_state_bit_for_bit():
  state = np.asarray([[-0.0, np.nan, 1e-42], [np.inf, 3.0, -0.0]], np.float32)
  flags = {"reset": np.ones((B, T), bool), "mask": np.zeros((B, T), bool)}
  spikes, after = kernels.lif(np.full((B, T, D), np.nan, np.float32), state=state, **flags)
  assert np.asarray(after).tobytes() == state.tobytes()
  assert not np.asarray(spikes).any()


@every_reset_value
def test_without_state_it_is_at_rest_and_flags_may_be_left_out(reset_value):
  x = np.float32(numbers(0, T)[0])
  rest = np.full((B, D), reset_value or 0, np.float32)
  flags = {"reset": np.zeros((B, T), bool), "mask": np.ones((B, T), bool)}
  expected = kernels.lif(x, reset_value=reset_value)
  for more in ({"state": rest}, flags, {"reset": flags["reset"]}, {"mask": flags["mask"]}):
    for got, same in zip(kernels.lif(x, reset_value=reset_value, **more), expected, strict=True):
      np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("t", [0, 7, 23])
def test_unrolled_for_accelerators_it_is_the_same(monkeypatch, t):
  x, tau, state = numbers(0, t)
  looped = kernels.lif(x, tau=tau, state=state)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  jax.tree.map(np.testing.assert_array_equal, kernels.lif(x, tau=tau, state=state), looped)


def test_maps_over_an_axis():
  x, tau, state = map(np.float32, numbers(0, T))
  stacked = np.stack([x, x + 1]), np.stack([tau, tau + 1]), np.stack([state, state + 1])
  mapped = jax.vmap(lambda x, tau, state: kernels.lif(x, tau=tau, state=state))(*stacked)
  for i in range(2):
    single = kernels.lif(stacked[0][i], tau=stacked[1][i], state=stacked[2][i])
    for got, expected in zip(mapped, single, strict=True):
      np.testing.assert_allclose(got[i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"x": np.zeros((2, 7))}, r"x has shape \[2, 7\], expected \[batch, time, features\]"),
    ({"tau": 0.5}, "tau is 0.5, expected at least 1"),
    ({"tau": np.array([2.0, np.nan, 2.0])}, r"tau is \[ 2. nan  2.\], expected at least 1"),
    ({"tau": np.full(2, 2.0)}, r"tau has shape \[2\], expected \[\] or \[3\]"),
    ({"surrogate": "step"}, "surrogate is 'step', expected one of atan, sigmoid, triangle"),
    ({"slope": 0.0}, "slope is 0.0, expected above 0"),
    ({"state": np.zeros((2, 4))}, r"state has shape \[2, 4\], expected \[2, 3\]"),
    ({"reset": np.zeros((2, 6), bool)}, r"reset has shape \[2, 6\], expected \[2, 7\]"),
    ({"mask": np.zeros(7, bool)}, r"mask has shape \[7\], expected \[2, 7\]"),
  ],
)
def test_bad_arguments_are_told(change, message):
  with pytest.raises(ValueError, match=message):
    kernels.lif(**({"x": np.zeros((B, T, D))} | change))
