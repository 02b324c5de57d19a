"""Layers with gradients of their own equal what they stand for, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from triform.arch.layers.gate import silu_gate
from triform.arch.layers.linear import Linear
from triform.arch.layers.norm import RMSNorm

DTYPES = (None, "bfloat16", "float32")
SHAPES = ((5,), (2, 3, 5), (5, 5))


def check_same(ours: nnx.Module, theirs: nnx.Module, x: jax.Array, tolerance: float):
  """Outputs, gradients, and their dtypes."""

  def outcome(layer):
    graphdef, params = nnx.split(layer)

    def loss(params, x):
      y = nnx.merge(graphdef, params)(x)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return {"y": y, "params": nnx.to_pure_dict(gradients[0]), "x": gradients[1]}

  got, expected = outcome(ours), outcome(theirs)
  assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    ),
    got,
    expected,
  )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_nnx_linear_without_bias(dtype, shape):
  x = jax.random.normal(jax.random.key(0), shape, "bfloat16")
  ours = Linear(5, 4, dtype=dtype, rngs=nnx.Rngs(0))
  theirs = nnx.Linear(5, 4, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))
  check_same(ours, theirs, x, 2e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_nnx_rms_norm(dtype, shape):
  x = jax.random.normal(jax.random.key(0), shape, dtype or "float32")
  layers = [kind(5, epsilon=0.1, dtype=dtype, rngs=nnx.Rngs(0)) for kind in (RMSNorm, nnx.RMSNorm)]
  for layer in layers:
    layer.scale[...] = 1 + jnp.arange(5, dtype=jnp.float32)
  check_same(*layers, x, 2e-2 if dtype == "bfloat16" else 1e-5)


def test_silu_gate_is_silu_times_the_other():
  a = jnp.asarray([-1e4, -90.0, -5.0, -0.0, 0.3, 5.0, 90.0, 1e4])
  b = jnp.linspace(-2.0, 3.0, a.size)

  def outcome(gate):
    return gate(a, b), jax.grad(lambda *ab: jnp.sum(jnp.sin(gate(*ab))), argnums=(0, 1))(a, b)

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    outcome(silu_gate),
    outcome(lambda a, b: jax.nn.silu(a) * b),
  )


def test_silu_gate_keeps_the_dtype_and_rounds_once():
  a, b = jax.random.normal(jax.random.key(0), (2, 64), "bfloat16")
  exact = np.float64(a) / (1 + np.exp(-np.float64(a))) * np.float64(b)
  got = silu_gate(a, b)
  assert got.dtype == "bfloat16"
  np.testing.assert_allclose(np.float64(got), exact, rtol=2.0**-8)
