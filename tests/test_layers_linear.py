"""`Linear` is `nnx.Linear` without a bias, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from triform.arch.layers.linear import Linear


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (5, 5)])
def test_equals_nnx_linear(dtype, shape):
  x = jax.random.normal(jax.random.key(0), shape, "bfloat16")
  ours = Linear(5, 4, dtype=dtype, rngs=nnx.Rngs(0))
  theirs = nnx.Linear(5, 4, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))

  def outcome(linear):
    graphdef, params = nnx.split(linear)

    def loss(params, x):
      y = nnx.merge(graphdef, params)(x)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return {"y": y, "params": nnx.to_pure_dict(gradients[0]), "x": gradients[1]}

  got, expected = outcome(ours), outcome(theirs)
  assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)
  tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    ),
    got,
    expected,
  )
