"""Transformers (arXiv 1706.03762) as language models: the baselines of every other architecture."""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from ..layers.feed_forward import FeedForward, GatedFeedForward
from ..layers.norm import RMSNorm
from ..mixers.attention import DEFAULT_MAX_LEN, Attention, Position, RelativeBias
from .language_model import LanguageModel
from .registry import register
from .stack import Block

Norm = Literal["layer", "rms"]


def make_norm(kind: Norm, d_model: int, *, eps: float, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module:
  """`"layer"`: LayerNorm; `"rms"`: RMSNorm."""
  if kind == "rms":
    return RMSNorm(d_model, epsilon=eps, **dtypes, rngs=rngs)
  if kind == "layer":  # the fast variance is a difference of nearly equal terms
    return nnx.LayerNorm(d_model, epsilon=eps, use_fast_variance=False, **dtypes, rngs=rngs)
  raise ValueError(f"norm is {kind!r}, expected layer or rms")


SMALL = {
  "vocab_size": 32, "d_model": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 12, "max_len": 32,
  "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("transformer", small=SMALL, free_options={"max_len"})
class Transformer(LanguageModel):
  """Decoder-only Transformer: pre-norm blocks of causal attention and a feed-forward.

  The defaults are T5's (arXiv 1910.10683) as a language model: LayerNorm, ReLU, relative positions
  in one table for all layers. `position="rotary"`, `activation="gelu"` is nearer to GPT-NeoX.

  Args beside those of `Attention`:
    ffn_dim: width of the feed-forward.
    activation: of the feed-forward, `gated` or with biases.
    norm: `"layer"` or `"rms"`.
    max_len: tokens of a document that a state holds unless it is made for more; not used with a
      `window`.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    key_size: int | None = None,
    ffn_dim: int,
    activation: str = "relu",
    gated: bool = False,
    norm: Norm = "layer",
    position: Position = "relative",
    rotary_base: float = 10000.0,
    window: int | None = None,
    max_len: int = DEFAULT_MAX_LEN,
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
    make = functools.partial(make_norm, norm, d_model, eps=eps, **dtypes)
    feed_forward = GatedFeedForward if gated else FeedForward

    def make_block(rngs: nnx.Rngs) -> Block:
      return Block(
        mixer_norm=make(rngs=rngs),
        mixer=Attention(
          d_model,
          num_heads=num_heads,
          num_kv_heads=num_kv_heads,
          key_size=key_size,
          position=position,
          rotary_base=rotary_base,
          shared_bias=True,
          window=window,
          max_len=max_len,
          chunk_size=chunk_size,
          **dtypes,
          rngs=rngs,
        ),
        feed_forward_norm=make(rngs=rngs),
        feed_forward=feed_forward(d_model, ffn_dim, activation=activation, **dtypes, rngs=rngs),
        dropout=dropout,
      )

    super().__init__(
      make_block,
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=make(rngs=rngs),
      relative_bias=make_relative_bias(position, num_heads, d_model, param_dtype, rngs),
      embedding_init=nnx.initializers.normal(d_model**-0.5),
      embedding_scale=d_model**0.5,
      tie_embeddings=tie_embeddings,
      scan_layers=scan_layers,
      remat=remat,
      **dtypes,
      rngs=rngs,
    )


@register("transformer++", small=SMALL, free_options={"max_len"})
class TransformerPlusPlus(Transformer):
  """Transformer++: RMSNorm, SwiGLU without biases, rotary positions, grouped heads, a window.

  The strong baseline, LLaMA's recipe (arXiv 2302.13971); arguments as in `Transformer`.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    key_size: int | None = None,
    ffn_dim: int,
    rotary_base: float = 10000.0,
    window: int | None = None,
    max_len: int = DEFAULT_MAX_LEN,
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
    super().__init__(
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      key_size=key_size,
      ffn_dim=ffn_dim,
      activation="silu",
      gated=True,
      norm="rms",
      position="rotary",
      rotary_base=rotary_base,
      window=window,
      max_len=max_len,
      tie_embeddings=tie_embeddings,
      dropout=dropout,
      eps=eps,
      chunk_size=chunk_size,
      scan_layers=scan_layers,
      remat=remat,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )


def make_relative_bias(
  position: Position, num_heads: int, d_model: int, param_dtype: Any, rngs: nnx.Rngs
) -> RelativeBias | None:
  """The table that all layers of a model share, if its positions are relative."""
  if position != "relative":
    return None
  return RelativeBias(num_heads, d_model, param_dtype, rngs=rngs)
