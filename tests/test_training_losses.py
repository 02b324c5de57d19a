"""Cross entropy in pieces against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform.arch.training.losses import MAX_LOGITS, count_pieces, cross_entropy

B, T, D, VOCAB = 2, 12, 5, 11
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(B, T, D))
KERNEL, BIAS = RNG.normal(size=(D, VOCAB)), RNG.normal(size=VOCAB)
TARGETS = RNG.integers(0, VOCAB, (B, T))
MASK = RNG.random((B, T)) < 0.7


def plain(features, kernel, bias, z_loss):
  logits = features @ kernel + bias[None, None]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nats = log_z - jnp.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]
  return jnp.where(MASK, nats + z_loss * log_z**2, 0).sum(), jnp.where(MASK, nats, 0).sum()


def in_pieces(features, kernel, bias, z_loss, pieces):
  def read_out(x):
    return x @ kernel + bias[None, None]

  return cross_entropy(read_out, features, TARGETS, MASK, z_loss=z_loss, pieces=pieces)


@pytest.mark.parametrize("pieces", [1, 3, 12])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_values_and_gradients_are_those_of_the_plain_loss(pieces, z_loss):
  """Also when the loss is a part of another function, whose factor reaches the gradient."""
  with jax.enable_x64(True):
    arguments = [jnp.asarray(a) for a in (FEATURES, KERNEL, BIAS)]
    outputs = [
      jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*arguments)
      for f in (
        lambda *a: (3 * plain(*a, z_loss)[0], plain(*a, z_loss)),
        lambda *a: (3 * in_pieces(*a, z_loss, pieces)[0], in_pieces(*a, z_loss, pieces)),
      )
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *outputs)
    without_gradient = in_pieces(*arguments, z_loss, pieces)
    np.testing.assert_allclose(without_gradient, plain(*arguments, z_loss), rtol=1e-12)


def test_logits_exist_in_pieces_only():
  def largest(pieces):
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: in_pieces(*a, 0.0, pieces)[0], argnums=(0, 1, 2)))
    text = str(jaxpr(FEATURES, KERNEL, BIAS))
    return f"[{B},{T // pieces},{VOCAB}]" in text and f"[{B},{T},{VOCAB}]" not in text

  assert largest(3) and largest(4)


@pytest.mark.parametrize(
  ("batch", "length", "vocab", "devices"),
  [(2, 512, 2048, 1), (32, 2048, 32000, 16), (8, 7, 10**7, 1)],
)
def test_pieces_are_as_large_as_allowed(batch, length, vocab, devices):
  pieces = count_pieces(batch, length, vocab, devices)
  assert length % pieces == 0
  assert batch * length // pieces * vocab <= MAX_LOGITS * devices or pieces == length
  fewer = [n for n in range(1, pieces) if length % n == 0]
  assert all(batch * length // n * vocab > MAX_LOGITS * devices for n in fewer)
