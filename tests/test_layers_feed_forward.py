"""Feed-forward layers: what they compute, and what squared ReLU keeps for its gradient."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx

from triform.arch.layers.feed_forward import (
  ACTIVATIONS,
  FeedForward,
  GatedFeedForward,
  squared_relu,
  squared_relu_product,
)

T, D, HIDDEN = 5, 4, 24


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_two_products_with_an_activation_between(activation, use_bias):
  rng = np.random.default_rng(0)
  layer = FeedForward(D, HIDDEN, activation=activation, use_bias=use_bias, rngs=nnx.Rngs(0))
  x = np.float32(rng.normal(size=(2, T, D)))
  shift = 0
  if use_bias:
    layer.input.bias[...] = jnp.asarray(rng.normal(size=HIDDEN), jnp.float32)
    layer.output.bias[...] = jnp.asarray(rng.normal(size=D), jnp.float32)
    shift = layer.output.bias[...][None, None]
  hidden = x @ layer.input.kernel[...]
  hidden += layer.input.bias[...][None, None] if use_bias else 0
  expected = ACTIVATIONS[activation](hidden) @ layer.output.kernel[...] + shift
  np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_squared_relu_and_its_gradients():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, T, HIDDEN)), rng.normal(size=(HIDDEN, D))
  weights = rng.normal(size=(2, T, D))

  def plain(x, kernel):
    return jnp.tensordot(jnp.where(x > 0, x * x, 0), kernel, axes=1)

  with jax.enable_x64():
    for ours in (squared_relu_product, lambda x, w: jnp.tensordot(squared_relu(x), w, axes=1)):
      got, expected = (
        jax.value_and_grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1))(x, kernel)
        for f in (ours, plain)
      )
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)
    jax.test_util.check_grads(squared_relu, (x,), order=1, modes=["rev"])


def test_only_one_wide_array_is_kept_for_the_gradient():
  layer = FeedForward(D, HIDDEN, activation="squared_relu", rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(layer)

  def kept(call):
    _, gradient = jax.vjp(lambda p, x: call(nnx.merge(graphdef, p), x), params, np.ones((2, T, D)))
    leaves = jax.tree.leaves(gradient)
    return sum(leaf.shape == (2, T, HIDDEN) for leaf in leaves)

  assert kept(lambda layer, x: layer(x)) == 1
  assert kept(lambda layer, x: layer.output(jnp.square(jax.nn.relu(layer.input(x))))) > 1


@pytest.mark.parametrize("layer", [FeedForward, GatedFeedForward])
def test_an_unknown_activation_is_refused(layer):
  with pytest.raises(ValueError, match="activation is 'tanh', expected one of gelu, relu, silu"):
    layer(D, HIDDEN, activation="tanh", rngs=nnx.Rngs(0))
