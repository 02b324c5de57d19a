"""The language model that every causal architecture fills with its own blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import SequenceModule, check_call, state_dtype
from ..layers.linear import Linear
from .stack import Stack


class LanguageModel(SequenceModule):
  """Token ids to next-token logits: embedding, a stack of blocks, a final norm, a head.

  `logits, state = model(ids, state, form=...)` with ids `[b, t]` and logits
  `[b, t, vocab_size]` in at least float32. An id outside the vocabulary gives NaN.
  """

  def __init__(
    self,
    make_block: Callable[[nnx.Rngs], SequenceModule],
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    norm: nnx.Module,
    embedding_scale: float = 1.0,
    embedding_init: Any,
    tie_embeddings: bool = False,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.vocab_size, self.embedding_scale = vocab_size, embedding_scale
    self.embedding = nnx.Embed(
      vocab_size,
      d_model,
      embedding_init=embedding_init,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    scan = jax.default_backend() != "cpu" if scan_layers is None else scan_layers
    self.stack = Stack(make_block, num_layers, scan=scan, remat=remat, rngs=rngs)
    self.causal, self.state_is_constant = self.stack.causal, self.stack.state_is_constant
    self.norm = norm
    if tie_embeddings:
      self.head = None
    else:
      self.head = Linear(
        d_model,
        vocab_size,
        kernel_init=embedding_init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
      )

  def init_state(self, batch_size, *, max_len=None):
    return self.stack.init_state(batch_size, max_len=max_len)

  def encode(self, ids, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    """Token ids to the features `[b, t, d]` that `read_out` turns into logits, and the state."""
    check_call(ids, form, reset, mask)
    x = self.embedding(jnp.asarray(ids))
    x = x * jnp.asarray(self.embedding_scale, x.dtype)
    x, state = self.stack(x, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return self.norm(x), state

  @jax.named_scope("logits")
  def read_out(self, features: jax.Array) -> jax.Array:
    logits = self.embedding.attend(features) if self.head is None else self.head(features)
    return logits.astype(state_dtype(logits.dtype))

  def __call__(self, ids, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    features, state = self.encode(ids, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return self.read_out(features), state
