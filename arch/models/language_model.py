"""The language model that every causal architecture fills with its own blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import SequenceModule, check_call, copy_traits, state_dtype
from ..layers.linear import Linear
from .stack import PatternStack, Stack


class LanguageModel(SequenceModule):
  """Token ids to next-token logits: embedding, a stack of blocks, a final norm, a head.

  `logits, state = model(ids, state, form=...)` with ids `[b, t]` and logits
  `[b, t, vocab_size]` in at least float32. An id outside the vocabulary gives NaN.

  `make_block` makes a block, or is a sequence of such makers whose kinds repeat; `embedding_scale`
  and `output_scale` multiply what is embedded and what is read out; `relative_bias` is a bias by
  distance that all blocks share.
  """

  def __init__(
    self,
    make_block: Callable[[nnx.Rngs], SequenceModule]
    | Sequence[Callable[[nnx.Rngs], SequenceModule]],
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    norm: nnx.Module,
    embedding_scale: float = 1.0,
    embedding_init: Any,
    output_scale: float = 1.0,
    relative_bias: nnx.Module | None = None,
    tie_embeddings: bool = False,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.vocab_size, self.embedding_scale = vocab_size, embedding_scale
    self.output_scale, self.relative_bias = output_scale, relative_bias
    self.embedding = nnx.Embed(
      vocab_size,
      d_model,
      embedding_init=embedding_init,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    if callable(make_block):
      self.stack = Stack(make_block, num_layers, scan=scan_layers, remat=remat, rngs=rngs)
    else:
      self.stack = PatternStack(make_block, num_layers, scan=scan_layers, remat=remat, rngs=rngs)
    copy_traits(self, self.stack)
    if not self.causal:
      raise ValueError(
        f"{type(self).__name__} has a mixer that sees later tokens, expected causal ones in a "
        "language model"
      )
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
    shared = {} if self.relative_bias is None else {"relative_bias": self.relative_bias()}
    x, state = self.stack(x, state, form=form, reset=reset, mask=mask, rngs=rngs, **shared)
    return self.norm(x), state

  @jax.named_scope("logits")
  def read_out(self, features: jax.Array) -> jax.Array:
    features = features * jnp.asarray(self.output_scale, features.dtype)
    logits = self.embedding.attend(features) if self.head is None else self.head(features)
    return logits.astype(state_dtype(logits.dtype))

  def __call__(self, ids, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    features, state = self.encode(ids, state, form=form, reset=reset, mask=mask, rngs=rngs)
    return self.read_out(features), state
