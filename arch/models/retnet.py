"""RetNet (arXiv 2307.08621) as a language model."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..layers.feed_forward import GatedFeedForward
from ..layers.norm import RMSNorm
from ..mixers.retention import Decay, Dialect, Retention
from .language_model import LanguageModel
from .registry import register
from .stack import Block

SMALL = {
  "vocab_size": 32, "d_model": 8, "num_layers": 2, "num_heads": 2, "value_dim": 16, "ffn_dim": 12,
  "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("retnet", small=SMALL)
class RetNet(LanguageModel):
  """RetNet language model: pre-norm blocks of multi-scale retention and a gated feed-forward.

  The defaults are the published code's (torchscale); `dialect="fla"` is flash-linear-attention's
  and `decay="gated"` YOCO's gated retention. See `Retention` for what these choose.
  `embedding_scale=None` is `sqrt(d_model)`, torchscale's language-model default.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int,
    ffn_dim: int,
    activation: str = "silu",
    decay: Decay = "fixed",
    decay_schedule: str = "geometric",
    dialect: Dialect = "torchscale",
    embedding_scale: float | None = None,
    tie_embeddings: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-6,
    chunk_size: int = 128,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}
    fla = dialect == "fla"
    norm = functools.partial(RMSNorm, d_model, epsilon=eps, **dtypes)

    def make_block(rngs: nnx.Rngs) -> Block:
      return Block(
        mixer_norm=norm(rngs=rngs),
        mixer=Retention(
          d_model,
          num_heads=num_heads,
          num_kv_heads=num_kv_heads,
          key_dim=key_dim,
          value_dim=value_dim,
          decay=decay,
          decay_schedule=decay_schedule,
          dialect=dialect,
          eps=eps,
          chunk_size=chunk_size,
          **dtypes,
          rngs=rngs,
        ),
        feed_forward_norm=norm(rngs=rngs),
        feed_forward=GatedFeedForward(
          d_model,
          ffn_dim,
          activation=activation,
          kernel_init=nnx.initializers.normal(0.02) if fla else None,
          **dtypes,
          rngs=rngs,
        ),
        dropout=dropout,
      )

    super().__init__(
      make_block,
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=norm(rngs=rngs),
      embedding_scale=math.sqrt(d_model) if embedding_scale is None else embedding_scale,
      embedding_init=nnx.initializers.normal(0.02 if fla else d_model**-0.5),
      tie_embeddings=tie_embeddings,
      scan_layers=scan_layers,
      remat=remat,
      **dtypes,
      rngs=rngs,
    )
