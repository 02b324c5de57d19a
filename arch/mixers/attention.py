"""Softmax attention (arXiv 1706.03762), and Primer's with convolutions (arXiv 2109.08668)."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform import kernels

from ..interface import SequenceModule, check_call, state_dtype
from ..layers.depthwise_conv import DepthwiseConv
from ..layers.linear import Linear

Position = Literal["rotary", "relative", "none"]
NUM_BUCKETS, MAX_DISTANCE = 32, 128  # of relative positions, as in T5
DEFAULT_MAX_LEN = 2048


class RelativeBias(nnx.Module):
  """T5's relative position bias: what a head adds to the scores of every bucket of distances."""

  def __init__(self, num_heads: int, d_model: int, param_dtype: Any, *, rngs: nnx.Rngs):
    init = nnx.initializers.normal(d_model**-0.5)
    self.relative_bias = nnx.Param(init(rngs.params(), (num_heads, NUM_BUCKETS), param_dtype))

  def __call__(self) -> jax.Array:  # [h, distances]
    buckets = kernels.relative_buckets(NUM_BUCKETS, MAX_DISTANCE)
    return jnp.take(self.relative_bias[...], jnp.asarray(buckets), axis=1)


class Attention(SequenceModule):
  """Multi-head causal attention with grouped key/value heads, optionally within a window.

      y = W_o attention(rotate(W_q x), rotate(W_k x), W_v x)

  Its state is a cache of keys and values in the computation's dtype. Without a window it holds
  `max_len` tokens of a document; a token for which there is no row left gets NaN.

  Args:
    d_model: width of inputs and outputs.
    num_heads, num_kv_heads: query heads and the key/value heads they share.
    key_size: of every head; `d_model / num_heads` by default.
    position: `"rotary"`, in exact phases; `"relative"`, T5's bias by distance; or `"none"`.
    rotary_base: the angles of `"rotary"` are `rotary_base ** (-2 i / key_size)`.
    shared_bias: `"relative"` takes the bias of every distance `[h, n]` from the call, as
      `relative_bias`, instead of having one: one table for all layers of a model.
    window: tokens that a query sees, itself included; all of the document by default.
    max_len: rows of the cache, unless `init_state` is told otherwise.
    scale: of the scores; `key_size ** -0.5` by default.
    tanh: of the softmax.
    query_init, key_init: initialisers of these projections; variance 1 / width by default.
    chunk_size: queries in a chunk of the chunkwise form.
    dtype: of the computation; `None` is `param_dtype`. Scores and softmax are in at least float32.
  """

  def __init__(
    self,
    d_model: int,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    key_size: int | None = None,
    position: Position = "rotary",
    rotary_base: float = 10000.0,
    shared_bias: bool = False,
    window: int | None = None,
    max_len: int = DEFAULT_MAX_LEN,
    scale: float | None = None,
    tanh: bool = False,
    query_init: Any = None,
    key_init: Any = None,
    chunk_size: int = 128,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    num_kv_heads = num_kv_heads or num_heads
    if key_size is None and d_model % num_heads:
      raise ValueError(f"d_model {d_model} is not divisible by num_heads {num_heads}")
    key_size = key_size or d_model // num_heads
    if num_heads % num_kv_heads:
      raise ValueError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}")
    if position not in ("rotary", "relative", "none"):
      raise ValueError(f"position is {position!r}, expected rotary, relative or none")
    if position == "rotary" and key_size % 2:
      raise ValueError(f"key size {key_size} per head is odd; rotation needs pairs")
    if window is not None and window < 1:
      raise ValueError(f"window is {window}, expected at least 1")
    if max_len < 1:
      raise ValueError(f"max_len is {max_len}, expected at least 1")
    self.num_heads, self.num_kv_heads, self.key_size = num_heads, num_kv_heads, key_size
    self.position, self.rotary_base, self.window = position, rotary_base, window
    self.state_is_constant = window is not None
    self.max_len = max_len if window is None else None
    self.scale, self.tanh = key_size**-0.5 if scale is None else scale, tanh
    self.chunk_size = chunk_size
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

    init = nnx.initializers.lecun_normal()
    linear = functools.partial(Linear, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
    self._make_query(linear, d_model, query_init or init)
    self.key = linear(d_model, num_kv_heads * key_size, kernel_init=key_init or init)
    self.value = linear(d_model, num_kv_heads * key_size, kernel_init=init)
    self.output = linear(num_heads * key_size, d_model, kernel_init=init)
    own = position == "relative" and not shared_bias
    self.bias = RelativeBias(num_heads, d_model, param_dtype, rngs=rngs) if own else None

  def _make_query(self, linear, d_model, init):
    self.query = linear(d_model, self.num_heads * self.key_size, kernel_init=init)

  def init_state(self, batch_size, *, max_len=None):
    rows = self.window or max_len or self.max_len
    return kernels.new_cache(batch_size, rows, self.num_kv_heads, self.key_size, self.dtype)

  def __call__(
    self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, relative_bias=None
  ):
    check_call(x, form, reset, mask)
    x = self._real(x, mask)
    q, k, v = self.query(x), self.key(x), self.value(x)
    return self._attend(q, k, v, state, form, reset, mask, relative_bias)

  def _real(self, x, mask):
    """Padding may hold anything, NaN included."""
    x = jnp.asarray(x, self.dtype)
    return x if mask is None else jnp.where(jnp.asarray(mask)[..., None], x, 0)

  def _attend(self, q, k, v, cache, form, reset, mask, relative_bias):
    b, t, _ = q.shape
    q, k, v = (a.reshape(b, t, -1, self.key_size) for a in (q, k, v))
    if self.position == "rotary":
      start = jnp.zeros(b, jnp.uint32) if cache is None else cache.position
      position, _ = kernels.token_positions(start, reset, mask, t)
      angles = self.rotary_base ** (-np.arange(self.key_size // 2) / (self.key_size // 2))
      phase = kernels.rotary_phase(position, jnp.asarray(kernels.rotary_steps(angles)))
      q, k = kernels.rotate(q, phase), kernels.rotate(k, phase)
    elif self.bias is not None:
      relative_bias = self.bias()
    elif self.position == "relative" and relative_bias is None:
      raise ValueError("relative_bias is None, expected the shared bias [num_heads, distances]")
    o, cache = kernels.attention(
      q,
      k,
      v,
      cache=cache,
      max_len=self.max_len or 0,
      window=self.window,
      bias=None if relative_bias is None else relative_bias.astype(state_dtype(self.dtype)),
      scale=self.scale,
      tanh=self.tanh,
      reset=reset,
      mask=mask,
      form=form,
      chunk_size=self.chunk_size,
    )
    return self.output(o.reshape(b, t, -1)), cache


class ConvAttentionState(NamedTuple):
  """The cache of convolved keys and values, and the last inputs of every convolution."""

  cache: kernels.KVCache
  tails: dict[str, jax.Array]  # [b, num_taps - 1, heads * key_size] each


class MultiDConvHeadAttention(Attention):
  """Primer's multi-DConv-head attention: causal depthwise convolutions after the projections.

      q, k, v = conv(W_q x), conv(W_k x), conv(W_v x)

  or with `shared_qk`, `k = conv(W_k x)` and `q = W_s k`. Positions, rotary ones too, come after the
  convolutions. `num_taps=1` is no convolution but a learnt scale. The program that was searched
  also has `input_floor=-0.57`, below which no input of a projection is, and `conv_scale=-1.12`,
  which multiplies what is convolved. Other arguments as in `Attention`.
  """

  def __init__(
    self,
    d_model: int,
    *,
    num_taps: int = 3,
    shared_qk: bool = False,
    input_floor: float | None = None,
    conv_scale: float = 1.0,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    self.num_taps, self.shared_qk = num_taps, shared_qk
    self.input_floor, self.conv_scale = input_floor, conv_scale
    super().__init__(d_model, rngs=rngs, **options)
    dtypes = {"dtype": self.dtype, "param_dtype": self.key.param_dtype}
    kv_width = self.num_kv_heads * self.key_size
    if not shared_qk:
      self.query_conv = DepthwiseConv(self.num_heads * self.key_size, num_taps, **dtypes)
    self.key_conv = DepthwiseConv(kv_width, num_taps, **dtypes)
    self.value_conv = DepthwiseConv(kv_width, num_taps, **dtypes)

  def _make_query(self, linear, d_model, init):
    width = self.num_kv_heads * self.key_size if self.shared_qk else d_model
    self.query = linear(width, self.num_heads * self.key_size, kernel_init=init)

  def _convs(self):
    names = ("key", "value") if self.shared_qk else ("query", "key", "value")
    return {name: getattr(self, f"{name}_conv") for name in names}

  def init_state(self, batch_size, *, max_len=None):
    tails = {name: conv.init_tail(batch_size) for name, conv in self._convs().items()}
    return ConvAttentionState(super().init_state(batch_size, max_len=max_len), tails)

  def __call__(
    self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, relative_bias=None
  ):
    check_call(x, form, reset, mask)
    x = self._real(x, mask)
    if self.input_floor is not None:
      x = jnp.maximum(x, self.input_floor)
    convolved, tails = {}, {}
    for name, conv in self._convs().items():
      convolved[name], tails[name] = conv(
        getattr(self, name)(x),
        None if state is None else state.tails[name],
        reset=reset,
        mask=mask,
      )
    if self.conv_scale != 1:
      convolved = {name: a * self.conv_scale for name, a in convolved.items()}
    if self.shared_qk:
      convolved["query"] = self.query(convolved["key"])
    qkv = (convolved[name] for name in ("query", "key", "value"))
    cache = None if state is None else state.cache
    y, cache = self._attend(*qkv, cache, form, reset, mask, relative_bias)
    return y, ConvAttentionState(cache, tails)
