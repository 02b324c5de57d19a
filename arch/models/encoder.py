"""Classifiers of frames, or audio, with any mixers: the baselines of LMUFormer, and its rivals."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..layers.audio import make_front_end
from ..layers.conv_stem import ConvStem
from ..layers.norm import RMSNorm
from .classifier import Classifier
from .hybrid import block_makers
from .registry import register
from .stack import PatternStack

SMALL = {
  "in_features": 3, "num_classes": 3, "d_model": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 12,
  "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("encoder", small=SMALL, task="classification")
class Encoder(Classifier):
  """Frames `[b, t, in_features]` to logits `[b, num_classes]` of all that was heard.

      x = stem(frames)       x <- x + mixer(norm(x))       x <- x + feed_forward(norm(x))
      logits = mean_t W norm(x_t) + b

  The stem is LMUFormer's, causal (see `ConvStem`), the blocks are those of `Hybrid`. With a mixer
  that sees whole sequences, so does the model: it has no state.

  Args:
    front_end, stem_channels: see `LMUFormer`.
    pattern, num_heads: of the mixers, see `Hybrid`.
    ffn_dim, activation, gated: of the feed-forward; without a gate it has biases.
    dropout: of what blocks add.
    chunk_size: of every mixer that has none of its own.
  """

  def __init__(
    self,
    *,
    front_end: str | None = None,
    in_features: int = 40,
    num_classes: int = 12,
    d_model: int,
    stem_channels: tuple[int, ...] = (),
    num_layers: int,
    num_heads: int,
    ffn_dim: int,
    pattern: str = "retention",
    activation: str = "silu",
    gated: bool = True,
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
    make_blocks = block_makers(
      pattern,
      d_model,
      num_heads=num_heads,
      ffn_dim=ffn_dim,
      activation=activation,
      gated=gated,
      dropout=dropout,
      eps=eps,
      chunk_size=chunk_size,
      **dtypes,
    )
    super().__init__(
      ConvStem(
        in_features,
        d_model,
        variant="plain",
        padding="causal",
        channels=stem_channels,
        make_neuron=None,
        **dtypes,
        rngs=rngs,
      ),
      PatternStack(make_blocks, num_layers, scan=scan_layers, remat=remat, rngs=rngs),
      front_end=make_front_end(front_end, in_features, dtypes["dtype"]),
      norm=RMSNorm(d_model, epsilon=eps, **dtypes, rngs=rngs),
      d_model=d_model,
      num_classes=num_classes,
      **dtypes,
      rngs=rngs,
    )
