"""The classifier of whole sequences that an encoder's blocks fill."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import SequenceModule, check_call, copy_traits, state_dtype
from ..layers.linear import Linear
from .stack import Stack


class Classifier(SequenceModule):
  """Token ids to logits of classes: embedding, a stack of blocks, a norm, the mean, a linear layer.

  `logits, state = model(ids, mask=mask)` with ids `[b, t]` and logits `[b, classes]` in at least
  float32. The mean is of real tokens; a row without any gives the bias of the linear layer.
  """

  def __init__(
    self,
    make_block: Callable[[nnx.Rngs], SequenceModule],
    *,
    vocab_size: int,
    num_classes: int,
    d_model: int,
    num_layers: int,
    norm: nnx.Module,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.embedding_scale = d_model**0.5
    self.embedding = nnx.Embed(
      vocab_size, d_model, embedding_init=nnx.initializers.normal(d_model**-0.5), **dtypes
    )
    scan = jax.default_backend() != "cpu" if scan_layers is None else scan_layers
    self.stack = Stack(make_block, num_layers, scan=scan, remat=remat, rngs=rngs)
    copy_traits(self, self.stack)
    if self.causal:
      raise NotImplementedError(
        "Classifier takes the mean of a whole sequence, which no state carries; expected blocks "
        "that see whole sequences too, such as of HyperMixing"
      )
    self.norm = norm
    self.head = Linear(d_model, num_classes, use_bias=True, **dtypes)

  def init_state(self, batch_size, *, max_len=None):
    return self.stack.init_state(batch_size, max_len=max_len)

  def encode(self, ids, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    """Token ids to the features `[b, t, d]` of every token, and the state."""
    check_call(ids, form, reset, mask)
    x = self.embedding(jnp.asarray(ids))
    x = x * jnp.asarray(self.embedding_scale, x.dtype)
    x, state = self.stack(x, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return self.norm(x), state

  @jax.named_scope("logits")
  def read_out(self, features: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Features `[b, t, d]` to logits `[b, classes]`."""
    dtype = state_dtype(features.dtype)
    if mask is None:
      mean = jnp.mean(features.astype(dtype), axis=1)
    else:
      real = jnp.asarray(mask)
      total = jnp.sum(jnp.where(real[..., None], features.astype(dtype), 0), axis=1)
      mean = total / jnp.maximum(real.sum(axis=1), 1).astype(dtype)[:, None]
    return self.head(mean.astype(features.dtype)).astype(dtype)

  def __call__(self, ids, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    features, state = self.encode(ids, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return self.read_out(features, mask), state
