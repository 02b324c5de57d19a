"""Legendre Memory Units as a language model of our own, and as a classifier of sequences."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import SequenceModule, check_call
from ..layers.feed_forward import GatedFeedForward
from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..mixers.lmu import LMU, LMUState
from .language_model import LanguageModel
from .registry import register
from .stack import Block

SMALL = {
  "vocab_size": 32, "d_model": 8, "num_layers": 2, "order": 4, "theta": 6.0, "channels": 2,
  "ffn_dim": 12, "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@register("lmu", small=SMALL)
class LMULanguageModel(LanguageModel):
  """Pre-norm blocks of a Legendre Memory Unit and a gated feed-forward.

  Every block is `x += lmu(RMSNorm(x))`, `x += feed_forward(RMSNorm(x))`, with the parallelisable
  unit (Chilkuri and Eliasmith, ICML 2021) of several memory channels and without rectifiers, which
  the feed-forwards have; the blocks are ours. See `LMU` for `order`, `theta`, `channels`,
  `hidden_activation` and `learn_theta`; `activation` is the feed-forward's.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    order: int,
    theta: float,
    channels: int,
    hidden_activation: str = "linear",
    learn_theta: bool = False,
    ffn_dim: int,
    activation: str = "silu",
    tie_embeddings: bool = False,
    dropout: float = 0.0,
    eps: float = 1e-6,
    chunk_size: int = 32,
    scan_layers: bool | None = None,
    remat: str = "none",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}
    norm = functools.partial(RMSNorm, d_model, epsilon=eps, **dtypes)

    def make_block(rngs: nnx.Rngs) -> Block:
      return Block(
        mixer_norm=norm(rngs=rngs),
        mixer=LMU(
          d_model,
          order=order,
          theta=theta,
          channels=channels,
          hidden_size=d_model,
          input_activation="linear",
          hidden_activation=hidden_activation,
          learn_theta=learn_theta,
          chunk_size=chunk_size,
          **dtypes,
          rngs=rngs,
        ),
        feed_forward_norm=norm(rngs=rngs),
        feed_forward=GatedFeedForward(d_model, ffn_dim, activation=activation, **dtypes, rngs=rngs),
        dropout=dropout,
      )

    super().__init__(
      make_block,
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=norm(rngs=rngs),
      embedding_init=nnx.initializers.normal(d_model**-0.5),
      embedding_scale=d_model**0.5,
      tie_embeddings=tie_embeddings,
      scan_layers=scan_layers,
      remat=remat,
      **dtypes,
      rngs=rngs,
    )


class LastState(NamedTuple):
  """The unit's state, and the last input of the document."""

  lmu: LMUState
  last: jax.Array  # [b, i]


CLASSIFIER = {"in_features": 1, "num_classes": 3, "order": 4, "theta": 6.0, "hidden_size": 8}


@register(
  "lmu_classifier",
  small=CLASSIFIER,
  task="classification",
  sharding_rules=((r"", ()),),  # too small to divide
)
class LMUClassifier(SequenceModule):
  """A Legendre Memory Unit, and classes from its last output.

      logits = W y_T + b          y_T = relu(W_h [m_T; x_T] + b_h)

  (The sequence classifier of Chilkuri and Eliasmith, ICML 2021, in the size of Voelker et al.,
  NeurIPS 2019, for permuted sequential MNIST.) Inputs are `[b, t, in_features]`, logits
  `[b, num_classes]` in at least float32, of all that was heard of the current document; one answer
  to a call. Only the last memory is used, and in the parallel form nothing else is computed.

  Args:
    order, theta, channels, input_activation, learn_theta, chunk_size: see `LMU`.
    hidden_size: of y.
    dropout: of y.
  """

  def __init__(
    self,
    *,
    in_features: int = 1,
    num_classes: int = 10,
    order: int = 256,
    theta: float = 784.0,
    channels: int = 1,
    hidden_size: int = 212,
    input_activation: str = "relu",
    learn_theta: bool = False,
    dropout: float = 0.0,
    chunk_size: int = 32,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": jnp.dtype(param_dtype)}
    self.lmu = LMU(
      in_features,
      order=order,
      theta=theta,
      channels=channels,
      hidden_size=hidden_size,
      input_activation=input_activation,
      learn_theta=learn_theta,
      chunk_size=chunk_size,
      **dtypes,
      rngs=rngs,
    )
    self.dropout = nnx.Dropout(dropout)
    self.head = Linear(hidden_size, num_classes, use_bias=True, **dtypes, rngs=rngs)

  def init_state(self, batch_size, *, max_len=None):
    last = jnp.zeros((batch_size, self.lmu.d_model), self.lmu.dtype)
    return LastState(self.lmu.init_state(batch_size), last)

  def encode(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    """Inputs to the outputs of the unit `[b, t, hidden_size]`, and the state."""
    check_call(x, form, reset, mask)
    b, t = x.shape[:2]
    last = self.init_state(b).last if state is None else state.last
    y, unit = self.lmu(x, None if state is None else state.lmu, form=form, reset=reset, mask=mask)
    x = jnp.asarray(x, last.dtype)
    if mask is None:
      return y, LastState(unit, x[:, -1])
    index = jnp.max(jnp.where(mask, jnp.arange(t)[None], -1), axis=1)
    newest = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, None, None], axis=1)[:, 0]
    return y, LastState(unit, jnp.where((index < 0)[:, None], last, newest))

  def read_out(self, state: LastState, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Logits `[b, num_classes]` of all that was heard."""
    y = self.lmu.read_out(state.lmu.memory, state.last)
    y = self.dropout(y, rngs=rngs, deterministic=rngs is None)
    with jax.named_scope("logits"):
      logits = self.head(y)
    return logits.astype(state.lmu.memory.dtype)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    _, state = self.encode(x, state, form=form, reset=reset, mask=mask)
    return self.read_out(state, rngs), state
