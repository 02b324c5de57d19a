"""The layer of spiking neurons: its options, its state, the time constant it learns, its rate."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from triform import kernels
from triform.arch.layers.spiking import LIF
from triform.kernels.lif import reference

B, T, D = 2, 7, 3
KEPT = 0.9  # of the rate, by a call in training


def currents(seed=0):
  return np.float32(1 + 2 * np.random.default_rng(seed).normal(size=(B, T, D)))


def flags(seed=0):
  rng = np.random.default_rng(seed)
  return {"reset": rng.random((B, T)) < 0.3, "mask": rng.random((B, T)) < 0.7}


def test_is_the_kernel_with_every_option():
  options = {
    "tau": 3.0,
    "threshold": 0.5,
    "reset_value": None,
    "surrogate": "triangle",
    "slope": 2.0,
    "decay_input": False,
    "detach_reset": False,
  }
  calls = inspect.signature(kernels.lif).parameters.keys() - {"x", "state", "reset", "mask"}
  assert calls == options.keys()
  layer, x, v = LIF(D, **options), currents(), currents(1)[:, 0]

  def outcome(f):
    return f(x, v), jax.grad(lambda *a: sum(jnp.sum(jnp.cos(y)) for y in f(*a)), (0, 1))(x, v)

  got = outcome(functools.partial(layer, **flags()))
  expected = outcome(lambda x, v: kernels.lif(x, state=v, **options, **flags()))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("reset_value", [0.0, -0.25, None])
def test_begins_at_rest(reset_value):
  layer = LIF(D, reset_value=reset_value)
  v = layer.init_state(B)
  assert v.shape == (B, D) and v.dtype == np.float32 and (v == (reset_value or 0)).all()
  jax.tree.map(np.testing.assert_array_equal, layer(currents()), layer(currents(), v))


def test_dtypes():
  narrow = LIF(D, learn_tau=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  narrow.measuring = True
  spikes, v = narrow(currents())
  assert spikes.dtype == jnp.bfloat16 and v.dtype == narrow.init_state(B).dtype == np.float32
  assert narrow.tau_logit.dtype == jnp.bfloat16 and narrow.rate.dtype == np.float32
  with jax.enable_x64():
    wide = LIF(D, learn_tau=True, param_dtype=jnp.float64)
    spikes, v = wide(currents())
    assert {a.dtype for a in (spikes, v, wide.init_state(B), wide.rate[...])} == {np.dtype("f8")}


@pytest.mark.parametrize("ahead", [1, 5, T])
def test_tokens_ahead_are_answered_and_not_kept(ahead):
  layer, x, now = LIF(D), currents(), flags()
  whole, _ = layer(x, **now)
  spikes, v = layer(x, ahead=ahead, **now)
  np.testing.assert_array_equal(spikes, whole)
  start = {name: flag[:, : T - ahead] for name, flag in now.items()}
  np.testing.assert_array_equal(v, layer(x[:, : T - ahead], **start)[1])
  np.testing.assert_array_equal(layer(x, ahead=ahead)[0], layer(x)[0])


def test_learns_one_time_constant():
  with jax.enable_x64():
    layer, x = LIF(D, tau=3.5, learn_tau=True, param_dtype=jnp.float64), np.float64(currents())
    assert layer.tau_logit[...].shape == ()
    np.testing.assert_allclose(jax.nn.sigmoid(layer.tau_logit[...]), 1 / 3.5, rtol=1e-14)
    spikes, _, _ = reference.lif(x, tau=3.5)
    np.testing.assert_array_equal(layer(x)[0], spikes)

    def loss(tau):
      return jnp.sum(jnp.sin(kernels.lif(x, tau=tau)[1]))

    gradient = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x)[1])))(layer)
    # d tau / d w = -exp(-w) = 1 - tau
    expected = jax.grad(loss)(jnp.asarray(3.5)) * (1 - 3.5)
    np.testing.assert_allclose(gradient["tau_logit"][...], expected, rtol=1e-12)
  assert not nnx.state(LIF(D), nnx.Param)


@pytest.mark.parametrize("masked", [True, False])
def test_rate_is_of_real_tokens(masked):
  x, mask = currents(), flags()["mask"]
  layer, given = LIF(D), {"mask": mask} if masked else {}
  real = np.asarray(layer(x, **given)[0])[mask if masked else np.ones((B, T), bool)]
  np.testing.assert_array_equal(layer.rate[...], 0)  # evaluation
  layer(x, rngs=nnx.Rngs(0), **given)
  layer(x, rngs=nnx.Rngs(0), ahead=2, **given)
  new = real.mean(axis=0)
  np.testing.assert_allclose(layer.rate[...], (1 - KEPT**2) * new, rtol=1e-6)
  layer.measuring = True
  layer(x, **given)
  np.testing.assert_allclose(layer.rate[...], new, rtol=1e-6)
  assert new.min() > 0 and new.std() > 0


@pytest.mark.parametrize("measuring", [True, False])
def test_a_call_without_real_tokens_leaves_the_rate(measuring):
  layer = LIF(D)
  layer.rate[...] = jnp.asarray([0.1, 0.2, 0.3])
  layer.measuring = measuring
  layer(np.full((B, T, D), np.nan, np.float32), mask=np.zeros((B, T), bool), rngs=nnx.Rngs(0))
  layer(currents()[:, :0], rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(layer.rate[...], np.float32([0.1, 0.2, 0.3]))


def test_the_rate_is_kept_by_a_compiled_training_step_and_has_no_gradient():
  layer, x = LIF(D), currents()

  @nnx.jit
  def step(layer, x):
    def loss(x, layer):
      layer(x, rngs=nnx.Rngs(0))
      return layer.rate[...].sum()

    return nnx.grad(loss)(x, layer)

  assert not np.asarray(step(layer, x)).any()
  np.testing.assert_allclose(layer.rate[...], (1 - KEPT) * layer(x)[0].mean((0, 1)), rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"tau": 0.9}, "tau is 0.9, expected at least 1"),
    ({"tau": 1.0, "learn_tau": True}, "tau is 1.0, expected above 1 where it is learnt"),
    ({"surrogate": "step"}, "surrogate is 'step', expected one of atan, sigmoid, triangle"),
    ({"slope": -1.0}, "slope is -1.0, expected above 0"),
  ],
)
def test_bad_options_are_told(options, message):
  with pytest.raises(ValueError, match=message):
    LIF(D, **options)


@pytest.mark.parametrize("ahead", [-1, T + 1])
def test_tokens_ahead_are_among_those_given(ahead):
  with pytest.raises(ValueError, match=f"ahead is {ahead}, expected 0 to 7"):
    LIF(D)(currents(), ahead=ahead)


def test_features_are_its_own():
  with pytest.raises(ValueError, match=r"state has shape \[2, 4\], expected \[2, 3\]"):
    LIF(D + 1)(currents())
