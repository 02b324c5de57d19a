"""A whole architecture in one file: a mixer, its model, what it costs, and a configuration.

python train.py --config=tests/toy_architecture.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from triform.arch import Block, LanguageModel, SequenceModule
from triform.arch.flops import Call, Count, Work, count
from triform.arch.interface import check_call, state_dtype
from triform.arch.layers.feed_forward import GatedFeedForward
from triform.arch.layers.linear import Linear
from triform.arch.layers.norm import RMSNorm
from triform.arch.models.registry import register
from triform.arch.training.config import default_config

FADE = 0.9


class FadingState(NamedTuple):
  total: jax.Array  # [b, d]


class Fading(SequenceModule):
  """`s_n = 0.9 s_{n-1} + gain W x_n` within a document.

  The forms are one algorithm with pieces of three sizes: all tokens, a chunk, one.
  """

  def __init__(self, d_model, *, chunk_size, dtype, param_dtype, rngs):
    self.input = Linear(d_model, d_model, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.fading_gain = nnx.Param(jnp.ones(d_model, param_dtype))
    self.chunk_size, self.dtype = chunk_size, jnp.dtype(dtype)

  def init_state(self, batch_size, *, max_len=None):
    return FadingState(jnp.zeros((batch_size, self.input.out_features), state_dtype(self.dtype)))

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    check_call(x, form, reset, mask)
    b, t, _ = x.shape
    state = self.init_state(b) if state is None else state
    reset = jnp.zeros((b, t), bool) if reset is None else reset
    mask = jnp.ones((b, t), bool) if mask is None else mask
    v = self.input(jnp.where(mask[..., None], x, 0)).astype(state.total.dtype)
    v = v * self.fading_gain[...].astype(v.dtype)[None, None]
    size = self.piece(t, form)

    def pieces(a):
      a = jnp.pad(a, [(0, 0), (0, -t % size)] + [(0, 0)] * (a.ndim - 2))
      return jnp.swapaxes(a.reshape(b, -1, size, *a.shape[2:]), 0, 1)

    total, y = jax.lax.scan(fade, state.total, (pieces(v), pieces(reset), pieces(mask)))
    y = jnp.swapaxes(y, 0, 1).reshape(b, -1, v.shape[-1])[:, :t]
    return y.astype(self.dtype), FadingState(total)

  def piece(self, t, form):
    return {"parallel": t, "chunkwise": min(self.chunk_size, t), "recurrent": 1}[form]


@jax.named_scope("mixing")
def fade(total, piece):
  """The sums `[b, c, d]` at all tokens of a piece, and the one after it."""
  v, reset, mask = piece
  n = jnp.cumsum(mask, axis=1)
  document = jnp.cumsum(reset & mask, axis=1)
  visible = jnp.tri(n.shape[1], dtype=bool)[None] & mask[:, None]
  visible &= document[:, :, None] == document[:, None]
  exponent = jnp.where(visible, n[:, :, None] - n[:, None], 0)
  weights = jnp.where(visible, jnp.power(FADE, exponent.astype(v.dtype)), 0)
  before = jnp.power(FADE, n.astype(v.dtype))[..., None] * total[:, None]
  y = jnp.einsum("bij,bjd->bid", weights, v) + jnp.where(document[..., None] == 0, before, 0)
  return jnp.where(mask.any(axis=1)[:, None], y[:, -1], total), y


@count.register
def _(layer: Fading, call: Call) -> Count:
  t, d, c = call.length, layer.input.in_features, layer.piece(call.length, call.form)
  pieces = t / c if call.causal else -(-t // c)
  pairs = pieces * c * ((c + 1) / 2 if call.causal else c)
  products, gain = Work(mixing=2 * pairs * d), Work(vector=t * d)
  decays = Work(transcendental=pairs + pieces * c)
  last = pieces if c > 1 else 0  # the last of several sums is given twice
  fading = Count(
    products + decays + Work(vector=2 * pieces * c * d),
    products + Work(vector=d * (3 * pieces * c + pieces + last + 1)),
  )
  return count(layer.input, call) + fading + Count(gain, gain * 3)


@register(
  "fading",
  small={"vocab_size": 32, "d_model": 8, "ffn_dim": 12},
  free_options={"piece_size"},
  sharding_rules=((r"fading_gain$", ()),),
)
class FadingModel(LanguageModel):
  def __init__(
    self,
    *,
    vocab_size: int,
    d_model: int,
    ffn_dim: int,
    num_layers: int = 2,
    piece_size: int = 4,
    scan_layers: bool | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": jnp.dtype(dtype or param_dtype), "param_dtype": param_dtype}

    def make_block(rngs: nnx.Rngs) -> Block:
      return Block(
        mixer_norm=RMSNorm(d_model, **dtypes, rngs=rngs),
        mixer=Fading(d_model, chunk_size=piece_size, **dtypes, rngs=rngs),
        feed_forward_norm=RMSNorm(d_model, **dtypes, rngs=rngs),
        feed_forward=GatedFeedForward(d_model, ffn_dim, **dtypes, rngs=rngs),
      )

    super().__init__(
      make_block,
      vocab_size=vocab_size,
      d_model=d_model,
      num_layers=num_layers,
      norm=RMSNorm(d_model, **dtypes, rngs=rngs),
      embedding_init=nnx.initializers.normal(d_model**-0.5),
      scan_layers=scan_layers,
      **dtypes,
      rngs=rngs,
    )


def get_config():
  config = default_config(architecture="fading", vocab_size=257, d_model=16, ffn_dim=24)
  config.data.tokenizer = "bytes"
  config.seq_len = 32
  config.batch_size = 4
  config.total_steps = 20
  config.optimizer.learning_rate = 1e-2
  return config
