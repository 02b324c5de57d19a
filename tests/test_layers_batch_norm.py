"""Batch normalisation: formulas in float64 NumPy, padding, gradients by finite differences."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx

from triform.arch.layers.batch_norm import BatchNorm

B, T, D = 2, 7, 3
MOMENTUM, EPSILON = 0.8, 1e-3


def make(**options):
  """A layer in float64 of which no number is as it starts."""
  options = {"momentum": MOMENTUM, "epsilon": EPSILON, "param_dtype": jnp.float64, **options}
  layer, rng = BatchNorm(D, **options), np.random.default_rng(0)
  for variable in (layer.scale, layer.bias, layer.mean, layer.var):
    variable[...] = jnp.asarray(rng.uniform(0.5, 2, D), variable.dtype)
  return layer


def values(layer):
  return [np.float64(a[...]) for a in (layer.scale, layer.bias, layer.mean, layer.var)]


def inputs(masked):
  """Inputs far from 0, with NaN in padding, and the mask."""
  rng = np.random.default_rng(1)
  mask = rng.random((B, T)) < 0.6 if masked else np.ones((B, T), bool)
  return np.where(mask[..., None], 100 + rng.normal(size=(B, T, D)), np.nan), mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_is_its_formula(training, masked):
  x, mask = inputs(masked)
  with jax.enable_x64():
    layer = make()
    scale, bias, mean, var = values(layer)
    rngs = nnx.Rngs(0) if training else None
    y = layer(x, mask=mask if masked else None, rngs=rngs)
    after = values(layer)[2:]
  real = x[mask]
  kept = mean, var
  if training:
    kept = [
      MOMENTUM * old + (1 - MOMENTUM) * new
      for old, new in ((mean, real.mean(axis=0)), (var, real.var(axis=0, ddof=1)))
    ]
    mean, var = real.mean(axis=0), real.var(axis=0)
  expected = (real - mean) / np.sqrt(var + EPSILON) * scale + bias
  np.testing.assert_allclose(y[mask], expected, rtol=1e-11, atol=1e-11)
  np.testing.assert_allclose(after, kept, rtol=1e-13)
  assert np.isfinite(y).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_narrow_inputs_have_statistics_in_float32(dtype, training):
  """Of numbers near 100, whose squares would lose what their differences are."""
  x = jnp.asarray(inputs(False)[0], dtype)
  layer = make(dtype=dtype, param_dtype=dtype)
  scale, bias, mean, var = values(layer)
  old, wide = (mean, var), np.float64(x)
  y = layer(x, rngs=nnx.Rngs(0) if training else None)
  assert y.dtype == dtype and layer.mean.dtype == layer.var.dtype == np.float32
  if training:
    mean, var, unbiased = (
      wide.mean((0, 1)),
      wide.var((0, 1)),
      wide.var((0, 1)) * B * T / (B * T - 1),
    )
    for got, before, new in zip(values(layer)[2:], old, (mean, unbiased), strict=True):
      np.testing.assert_allclose(got, MOMENTUM * before + (1 - MOMENTUM) * new, rtol=1e-5)
  expected = (wide - mean) / np.sqrt(var + EPSILON) * scale + bias
  rounding = float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else 1e-5
  np.testing.assert_allclose(np.float64(y), expected, rtol=rounding, atol=5e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_few_real_tokens(count):
  x, mask = np.full((B, T, D), np.nan), np.zeros((B, T), bool)
  x[1, 2], mask[1, 2] = 5.0, count
  with jax.enable_x64():
    layer = make()
    _, bias, *before = values(layer)
    y = layer(x, mask=mask, rngs=nnx.Rngs(0))
    after = values(layer)[2:]
    gradient = jax.grad(lambda x: layer_sum(x, mask))(jnp.asarray(x))
  assert np.isfinite(y).all() and np.isfinite(gradient).all()
  if count == 0:
    np.testing.assert_array_equal(after, before)
    return
  np.testing.assert_allclose(y[1, 2], bias)
  mean, var = before
  np.testing.assert_allclose(after, [MOMENTUM * mean + (1 - MOMENTUM) * 5, MOMENTUM * var])


def layer_sum(x, mask):
  y = make()(x, mask=mask, rngs=nnx.Rngs(0))
  return jnp.sum(jnp.where(mask[..., None], jnp.sin(y), 0))


def test_gradients_are_finite_differences():
  _, mask = inputs(True)
  with jax.enable_x64():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, D)))
    graphdef, params, rest = nnx.split(make(), nnx.Param, ...)
    for rngs in (None, 0):

      def outputs(params, x, rngs=rngs):
        layer = nnx.merge(graphdef, params, jax.tree.map(jnp.copy, rest))
        y = layer(x, mask=mask, rngs=None if rngs is None else nnx.Rngs(rngs))
        return jnp.where(mask[..., None], jnp.sin(y), 0)

      jax.test_util.check_grads(outputs, (params, x), order=1, modes=("fwd", "rev"), rtol=1e-6)


def test_no_gradient_flows_through_the_running_statistics():
  """A training call and an evaluation of something else after it, in a compiled step."""
  x, mask = inputs(True)

  @nnx.jit
  @nnx.grad
  def step(x, layer):
    layer(x, mask=mask, rngs=nnx.Rngs(0))
    return jnp.sum(jnp.sin(layer(jnp.ones((1, 1, D)))))

  with jax.enable_x64():
    layer = make()
    before = values(layer)
    gradient = step(jnp.asarray(x), layer)
    after = values(layer)
  assert not np.asarray(gradient).any()
  assert all(np.abs(old - new).min() > 0.01 for old, new in zip(before[2:], after[2:], strict=True))


@pytest.mark.parametrize(
  ("shape", "mask", "message"),
  [
    ((2, 7, 4), (2, 7), r"x has shape \[2, 7, 4\], expected \[batch, time, 3\]"),
    ((2, 3), (2, 7), r"x has shape \[2, 3\], expected \[batch, time, 3\]"),
    ((2, 7, 3), (7,), r"mask has shape \[7\], expected \[2, 7\] for x \[2, 7, 3\]"),
  ],
)
def test_bad_shapes_are_told(shape, mask, message):
  with pytest.raises(ValueError, match=message):
    BatchNorm(3)(np.zeros(shape), mask=np.ones(mask, bool))
