"""HyperMixer (arXiv 2203.03691): a causal language model of our own, and the published encoder."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx

from triform.kernels.hypermixing import Activation

from ..layers.feed_forward import FeedForward
from ..layers.hypernetwork import HypernetworkInit
from ..mixers.hypermixing import CausalHyperMixing, Decay, HyperMixing, Normalizer, Position
from .classifier import Classifier, TokenEmbedding
from .language_model import LanguageModel
from .registry import register
from .stack import Block, Stack
from .transformer import make_norm

SMALL = {
  "vocab_size": 32, "d_model": 8, "num_layers": 2, "num_heads": 2, "mixing_dim": 12, "ffn_dim": 12,
  "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("hypermixer", small=SMALL)
class HyperMixer(LanguageModel):
  """HyperMixer as a language model: pre-norm blocks of causal HyperMixing and a feed-forward.

  Every block is `x += LayerNorm(mixing(LayerNorm(x)))`, `x += feed_forward(LayerNorm(x))`, one of
  the placements that the paper finds to work (appendix F). The published layer is bidirectional and
  sums without a scale; `decay` and `normalizer` are what makes a causal one serve any length. See
  `CausalHyperMixing` for them and for `mixing_dim`, `tied`, `use_bias` and `position`.
  `mixing_activation` is its activation, `activation` the feed-forward's.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    mixing_dim: int,
    mixing_activation: Activation = "gelu",
    ffn_dim: int,
    activation: str = "gelu",
    tied: bool = False,
    use_bias: bool = False,
    decay: Decay = "fixed",
    normalizer: Normalizer = "head_rms",
    position: Position = "standard",
    tie_embeddings: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-5,
    chunk_size: int = 16,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}

    def make_mixer(rngs: nnx.Rngs) -> CausalHyperMixing:
      return CausalHyperMixing(
        d_model,
        num_heads=num_heads,
        mixing_dim=mixing_dim,
        activation=mixing_activation,
        tied=tied,
        use_bias=use_bias,
        decay=decay,
        normalizer=normalizer,
        position=position,
        eps=eps,
        chunk_size=chunk_size,
        **dtypes,
        rngs=rngs,
      )

    super().__init__(
      functools.partial(
        _make_block, make_mixer, d_model, ffn_dim, activation, eps=eps, dropout=dropout, **dtypes
      ),
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=make_norm("layer", d_model, eps=eps, **dtypes, rngs=rngs),
      embedding_init=nnx.initializers.normal(d_model**-0.5),
      embedding_scale=d_model**0.5,
      tie_embeddings=tie_embeddings,
      scan_layers=scan_layers,
      remat=remat,
      **dtypes,
      rngs=rngs,
    )


class HyperMixerClassifier(Classifier):
  """An encoder with HyperMixing as published, and classes from the mean of its features.

  `logits, _ = model(ids, mask=mask)`, logits `[b, classes]`. The blocks are those of `HyperMixer`
  with `HyperMixing` for the mixer; see there for `mixing_dim`, `tied`, `use_bias` (with
  `position="standard"` it is SpeechBrain's), `position` and `init`. `mixing_activation` is its
  activation, `activation` the feed-forward's.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    num_classes: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    mixing_dim: int,
    mixing_activation: Activation = "gelu",
    ffn_dim: int,
    activation: str = "gelu",
    tied: bool = True,
    use_bias: bool = False,
    position: Position = "official",
    init: HypernetworkInit = "per_head",
    dropout: float = 0.0,
    eps: float = 1e-5,
    chunk_size: int = 128,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}

    def make_mixer(rngs: nnx.Rngs) -> HyperMixing:
      return HyperMixing(
        d_model,
        num_heads=num_heads,
        mixing_dim=mixing_dim,
        activation=mixing_activation,
        tied=tied,
        use_bias=use_bias,
        position=position,
        init=init,
        eps=eps,
        chunk_size=chunk_size,
        **dtypes,
        rngs=rngs,
      )

    make_block = functools.partial(
      _make_block, make_mixer, d_model, ffn_dim, activation, eps=eps, dropout=dropout, **dtypes
    )
    stem = TokenEmbedding(vocab_size, d_model, scale=d_model**0.5, **dtypes, rngs=rngs)
    super().__init__(
      stem,
      Stack(make_block, num_layers, scan=scan_layers, remat=remat, rngs=rngs),
      norm=make_norm("layer", d_model, eps=eps, **dtypes, rngs=rngs),
      d_model=d_model,
      num_classes=num_classes,
      **dtypes,
      rngs=rngs,
    )


def _make_block(make_mixer, d_model, ffn_dim, activation, rngs, *, eps, dropout, **dtypes) -> Block:
  norm = functools.partial(make_norm, "layer", d_model, eps=eps, **dtypes, rngs=rngs)
  return Block(
    mixer_norm=norm(),
    mixer=make_mixer(rngs),
    feed_forward_norm=norm(),
    feed_forward=FeedForward(d_model, ffn_dim, activation=activation, **dtypes, rngs=rngs),
    dropout=dropout,
  )
