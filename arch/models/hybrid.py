"""Language models whose layers have different mixers."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..calls import parse_calls
from ..layers.feed_forward import FeedForward, GatedFeedForward
from ..layers.norm import RMSNorm
from ..mixers import MIXERS
from .language_model import LanguageModel
from .registry import register
from .stack import Block

SMALL = {
  "vocab_size": 32, "d_model": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 12,
  "pattern": "attention(window=3), retention", "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("hybrid", small=SMALL)
class Hybrid(LanguageModel):
  """Pre-norm blocks with RMSNorm and a gated feed-forward, their mixers in a repeating pattern.

      Hybrid(pattern="retention, retention(decay='gated'), attention(window=512)", ...)

  Any of `mixers.MIXERS`, each with options of its own. Scanned layers compile one repetition of
  the pattern, and the layers left of an incomplete one.

  Args:
    pattern: names of mixers, with their options as calls in Python whose arguments are constants.
    num_heads: of every mixer that has no number of its own.
    ffn_dim, activation: of the feed-forward.
    eps: of the norms.
    chunk_size: of every mixer that has none of its own; by default what is best for each.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    ffn_dim: int,
    pattern: str = "retention, retention, attention",
    activation: str = "silu",
    tie_embeddings: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}
    super().__init__(
      block_makers(
        pattern,
        d_model,
        num_heads=num_heads,
        ffn_dim=ffn_dim,
        activation=activation,
        dropout=dropout,
        eps=eps,
        chunk_size=chunk_size,
        **dtypes,
      ),
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=RMSNorm(d_model, epsilon=eps, **dtypes, rngs=rngs),
      embedding_scale=d_model**0.5,
      embedding_init=nnx.initializers.normal(d_model**-0.5),
      tie_embeddings=tie_embeddings,
      scan_layers=scan_layers,
      remat=remat,
      **dtypes,
      rngs=rngs,
    )


def block_makers(
  pattern: str,
  d_model: int,
  *,
  num_heads: int,
  ffn_dim: int,
  activation: str,
  gated: bool = True,
  dropout: float,
  eps: float,
  chunk_size: int | None,
  **dtypes: Any,
) -> list[Callable[[nnx.Rngs], Block]]:
  """What makes the blocks of a pattern; see `Hybrid` and, for `gated`, `Encoder`."""
  norm = functools.partial(RMSNorm, d_model, epsilon=eps, **dtypes)
  feed_forward = GatedFeedForward if gated else FeedForward

  def make_block(name: str, options: dict[str, Any], rngs: nnx.Rngs) -> Block:
    options = {"num_heads": num_heads, **options}
    if chunk_size is not None:
      options = {"chunk_size": chunk_size, **options}
    try:
      mixer = MIXERS[name](d_model, **options, **dtypes, rngs=rngs)
    except TypeError as error:  # an option that the mixer does not have
      raise ValueError(f"pattern {pattern!r}: {error}") from error
    return Block(
      mixer_norm=norm(rngs=rngs),
      mixer=mixer,
      feed_forward_norm=norm(rngs=rngs),
      feed_forward=feed_forward(d_model, ffn_dim, activation=activation, **dtypes, rngs=rngs),
      dropout=dropout,
    )

  calls = parse_calls(
    pattern, MIXERS, option="pattern", kind="mixer", example="retention, attention(window=8)"
  )
  return [functools.partial(make_block, *call) for call in calls]
