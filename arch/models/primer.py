"""Primer (arXiv 2109.08668) as a language model."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..layers.feed_forward import FeedForward
from ..mixers.attention import DEFAULT_MAX_LEN, Attention, MultiDConvHeadAttention, Position
from .language_model import LanguageModel
from .registry import register
from .stack import Block, NormPlacement
from .transformer import SMALL, Norm, make_norm, make_relative_bias


@register("primer", small={**SMALL, "tie_embeddings": False}, free_options={"max_len"})
class Primer(LanguageModel):
  """Primer: squared ReLU, multi-DConv-head attention, shared QK, norms before and after.

  The defaults are full Primer as the paper prints it; Primer-EZ is `shared_qk=False,
  norm_placement="pre"`. Each of the paper's ablations is an option: `num_taps=0` leaves out the
  convolutions, another `activation` the squared ReLU. The paper's own norm, with the mean of
  `x (x - mean)` for the variance, is LayerNorm in exact arithmetic and is computed as that.

  Scores are not scaled: queries start smaller instead, as in T5. What is embedded starts with unit
  variance, and the table smaller by `embedding_scale`, `sqrt(d_model)` by default, with which it
  learns as fast as other weights. It is 1 in the published code, whose optimizer takes steps in
  proportion to the parameters.

  Args beside those of `Transformer`:
    num_taps: of the convolutions, the token itself included; 0: plain attention.
    shared_qk: queries are a projection of the (convolved) keys.
    norm_placement: `"pre_post"` normalises what enters attention and what leaves the feed-forward;
      `"pre"` what enters either.
    use_bias, output_bias: of the projections of the feed-forward, the last as the first by default.
    input_floor, conv_scale, tanh: see `MultiDConvHeadAttention`. The program that the search found,
      before the paper reduced it to Primer, has -0.57, -1.12, `True` and `output_bias=False`.
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
    activation: str = "squared_relu",
    use_bias: bool = True,
    output_bias: bool | None = None,
    num_taps: int = 3,
    shared_qk: bool = True,
    input_floor: float | None = None,
    conv_scale: float = 1.0,
    tanh: bool = False,
    norm: Norm = "layer",
    norm_placement: NormPlacement = "pre_post",
    position: Position = "relative",
    rotary_base: float = 10000.0,
    window: int | None = None,
    max_len: int = DEFAULT_MAX_LEN,
    embedding_scale: float | None = None,
    tie_embeddings: bool = True,
    dropout: float = 0.0,
    eps: float = 1e-6,
    chunk_size: int = 128,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if shared_qk and not num_taps:
      raise ValueError("shared_qk needs convolutions, but num_taps is 0")
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}
    make = functools.partial(make_norm, norm, d_model, eps=eps, **dtypes)
    mixer = Attention
    if num_taps:
      mixer = functools.partial(
        MultiDConvHeadAttention,
        num_taps=num_taps,
        shared_qk=shared_qk,
        input_floor=input_floor,
        conv_scale=conv_scale,
      )
    embedding_scale = math.sqrt(d_model) if embedding_scale is None else embedding_scale
    # The width of queries before the convolution, which in shared mode is that of keys.
    size = key_size or d_model // num_heads
    small = nnx.initializers.normal((d_model * size) ** -0.5)

    def make_block(rngs: nnx.Rngs) -> Block:
      return Block(
        mixer_norm=make(rngs=rngs),
        mixer=mixer(
          d_model,
          num_heads=num_heads,
          num_kv_heads=num_kv_heads,
          key_size=key_size,
          position=position,
          rotary_base=rotary_base,
          shared_bias=True,
          window=window,
          max_len=max_len,
          scale=1.0,
          tanh=tanh,
          chunk_size=chunk_size,
          **{"key_init" if shared_qk else "query_init": small},
          **dtypes,
          rngs=rngs,
        ),
        feed_forward_norm=make(rngs=rngs),
        feed_forward=FeedForward(
          d_model,
          ffn_dim,
          activation=activation,
          use_bias=use_bias,
          output_bias=output_bias,
          **dtypes,
          rngs=rngs,
        ),
        norm_placement=norm_placement,
        dropout=dropout,
      )

    super().__init__(
      make_block,
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=make(rngs=rngs),
      relative_bias=make_relative_bias(position, num_heads, d_model, param_dtype, rngs),
      embedding_init=nnx.initializers.normal(1 / embedding_scale),
      embedding_scale=embedding_scale,
      output_scale=embedding_scale * d_model**-0.5,
      tie_embeddings=tie_embeddings,
      scan_layers=scan_layers,
      remat=remat,
      **dtypes,
      rngs=rngs,
    )
