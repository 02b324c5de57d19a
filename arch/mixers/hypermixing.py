"""HyperMixing (arXiv 2203.03691) as published, for whole sequences, and a causal form of it.

Both generate the weights of a token-mixing perceptron from the tokens themselves, one row for each
token and head:

    u = x + P        W1 = hypernetwork_1(u)        W2 = hypernetwork_2(u)
    Y = W2 act(W1^T V)        y = LayerNorm(Y)

where `V` is the input, in heads, and `P` encodes positions.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform import kernels
from triform.kernels.hypermixing import ACTIVATIONS, Activation
from triform.kernels.runs import in_runs, pad_to_runs

from ..interface import SequenceModule, check_call, state_dtype
from ..layers.hypernetwork import Hypernetwork, HypernetworkInit

Position = Literal["standard", "official", "none"]
Normalizer = Literal["none", "mean", "variance", "row_rms", "head_rms"]
Decay = Literal["none", "fixed"]
RMS = {"row_rms": "row", "head_rms": "head"}


class HyperMixingState(NamedTuple):
  """`W1^T V` of the tokens so far, in at least float32, and their number."""

  kv: jax.Array  # [b, h, k, v]
  position: jax.Array  # uint32[b]


def encode_positions(
  kind: Position,
  position: jax.Array,  # uint32[b, t], from 0
  d: int,
  dtype: jnp.dtype,
) -> jax.Array:  # [b, t, d]
  """The `"standard"` or the `"official"` encoding of positions; see `HyperMixing`."""
  pair, odd = np.arange(d) // 2 * 2, np.arange(d) % 2
  if kind == "standard":
    return kernels.sinusoid(position, 10000.0 ** (-pair / d), odd, dtype)
  table = kernels.sinusoid(position + np.uint32(1), 10000.0 ** (-2 * (pair + odd) / d), odd, dtype)
  return table.astype(jnp.float32).astype(dtype)  # the published one is held in float32


class _HyperMixing(SequenceModule):
  """What generates the two matrices, and what is done with the result."""

  def __init__(
    self,
    d_model: int,
    *,
    num_heads: int,
    mixing_dim: int,
    tied: bool = False,
    use_bias: bool = False,
    position: Position = "standard",
    activation: Activation = "gelu",
    layer_norm: bool = True,
    init: HypernetworkInit = "per_head",
    eps: float = 1e-5,
    chunk_size: int = 16,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    sizes = {"d_model": d_model, "mixing_dim": mixing_dim}
    for name, size in {"num_heads": num_heads, "chunk_size": chunk_size, **sizes}.items():
      if size < 1:
        raise ValueError(f"{name} is {size}, expected at least 1")
    for name, width in sizes.items():
      if width % num_heads:
        raise ValueError(f"{name} {width} is not divisible by num_heads {num_heads}")
    for name, value, known in (
      ("position", position, get_args(Position)),
      ("activation", activation, ACTIVATIONS),
    ):
      if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if position != "none" and d_model % 2:
      raise ValueError(f"d_model {d_model} is odd; sines and cosines of positions need pairs")
    self.d_model, self.num_heads = d_model, num_heads
    self.key_size, self.value_size = mixing_dim // num_heads, d_model // num_heads
    self.position, self.activation, self.chunk_size = position, activation, chunk_size
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    dtypes = {"dtype": self.dtype, "param_dtype": param_dtype}
    network = functools.partial(
      Hypernetwork,
      num_heads,
      self.value_size,
      self.key_size,
      use_bias=use_bias,
      init=init,
      **dtypes,
      rngs=rngs,
    )
    self.w1 = network()
    self.w2 = None if tied else network()
    # The fast variance is a difference of nearly equal terms.
    norm = functools.partial(nnx.LayerNorm, epsilon=eps, use_fast_variance=False, **dtypes)
    self.norm = norm(d_model, rngs=rngs) if layer_norm else None

  def _no_tokens(self, batch_size: int) -> HyperMixingState:
    shape = (batch_size, self.num_heads, self.key_size, self.value_size)
    return HyperMixingState(
      jnp.zeros(shape, state_dtype(self.dtype)), jnp.zeros(batch_size, jnp.uint32)
    )

  def _real(self, x, mask):
    """Padding may hold anything, NaN included."""
    if x.shape[2:] != (self.d_model,):
      raise ValueError(f"x has shape {list(x.shape)}, expected [batch, time, {self.d_model}]")
    x = jnp.asarray(x, self.dtype)
    return x if mask is None else jnp.where(jnp.asarray(mask)[..., None], x, 0)

  def _informed(self, x, position):
    """`u`: a token and where it is."""
    if self.position == "none":
      return x
    table = encode_positions(self.position, position, self.d_model, state_dtype(self.dtype))
    if self.position == "official":
      x = x * jnp.asarray(self.d_model**0.5, x.dtype)
    return x + table.astype(x.dtype)

  def _heads(self, x):
    return x.reshape(*x.shape[:2], self.num_heads, -1)

  def _normed(self, y):
    y = y.reshape(*y.shape[:2], -1).astype(self.dtype)
    return y if self.norm is None else self.norm(y)


class HyperMixing(_HyperMixing):
  """HyperMixing of whole sequences, as published: every token with every other.

      S = sum_j w1_j v_j^T        y_i = LayerNorm(act(S)^T w2_i)

  It looks at all that it is given, so there is no state to go on from: `y, () = module(x)`, and a
  `reset` or a state is an error. The forms differ in memory: the chunkwise and recurrent ones pass
  over the tokens twice, with the sum and one chunk or token at a time. `accumulate` and `read_out`
  are the two passes, for sequences that come in pieces.

  The published layer has neither a scale nor a softmax, so that its sum grows with the length.
  With `memory` it is cross mixing: the sum is of other tokens `[b, s, d]`, or of a pair of keys and
  values, of which `memory_mask`, bool `[b, s]`, tells the real ones.

  Args:
    d_model: width of inputs and outputs.
    num_heads: each mixes `d_model / num_heads` channels by a perceptron of
      `mixing_dim / num_heads` hidden units.
    mixing_dim: hidden units of the mixing perceptrons over all heads.
    tied: `W2 = W1`.
    use_bias: of the hypernetworks.
    position: `P`. `"official"` is the published table, `sqrt(d) x + P` with positions from 1 and
      exponents up to 2, without its limit of length; `"standard"` the usual sinusoids from 0, as
      in SpeechBrain's variant; `"none"` is no `P`.
    activation: `"gelu"`, as published, or `"relu"`.
    layer_norm: of the outputs. A token that is padding is 0 before it.
    init: see `Hypernetwork`.
    eps: of the norm.
    chunk_size: tokens in a chunk of the chunkwise form.
    dtype: of the computation; `None` is `param_dtype`. The sum is held in at least float32.
  """

  causal = False

  def init_state(self, batch_size, *, max_len=None):
    return ()

  def __call__(
    self,
    x,
    state=None,
    *,
    form="parallel",
    reset=None,
    mask=None,
    rngs=None,
    memory=None,
    memory_mask=None,
  ):
    check_call(x, form, reset, mask)
    if jax.tree.leaves(state):
      raise NotImplementedError(
        "HyperMixing sees a whole sequence and goes on from no state; CausalHyperMixing does"
      )
    if reset is not None:
      raise NotImplementedError(
        "HyperMixing sees a whole sequence, so a reset is none; give every document a row of its "
        "own, or use CausalHyperMixing"
      )
    keys, memory_mask = self._keys(x, mask, memory, memory_mask)
    total, _ = self._pass(
      lambda total, tokens, mask: (self._accumulate(total, *tokens, mask), ()),
      self._no_tokens(x.shape[0]),
      keys,
      memory_mask,
      form,
    )
    perceptron = kernels.activate(total.kv, self.activation)
    _, y = self._pass(
      lambda seen, tokens, mask: self._read(perceptron, *tokens, seen, mask),
      jnp.zeros(x.shape[0], jnp.uint32),
      (x,),
      mask,
      form,
    )
    return y, ()

  def _keys(self, x, mask, memory, memory_mask):
    """Keys and values that are summed, and which of them are real."""
    if memory is None:
      if memory_mask is not None:
        raise ValueError("memory_mask is given without memory")
      return (x, x), mask
    if self.w2 is None:
      raise ValueError("memory is given to a tied layer, whose queries and keys are the same")
    if isinstance(memory, HyperMixingState):
      raise ValueError("memory is a HyperMixingState, expected tokens; read_out reads a sum")
    pair = memory if isinstance(memory, tuple | list) else (memory, memory)
    shapes = [list(jnp.shape(part)) for part in pair]
    rows, width = x.shape[0], self.d_model
    if len(pair) != 2 or shapes[0] != shapes[1] or shapes[0][::2] != [rows, width]:
      raise ValueError(
        f"memory has shapes {shapes}, expected [{rows}, time, {width}] or two such, of keys and "
        "values"
      )
    if memory_mask is not None and jnp.shape(memory_mask) != pair[0].shape[:2]:
      raise ValueError(
        f"memory_mask has shape {list(jnp.shape(memory_mask))}, expected {shapes[0][:2]}"
      )
    return tuple(pair), memory_mask

  def _pass(self, step, carry, tokens, mask, form):
    """`step` over all tokens at once, or over one chunk or token after another."""
    b, t = tokens[0].shape[:2]
    size = {"parallel": t, "chunkwise": min(self.chunk_size, t), "recurrent": 1}[form]
    if size == t:
      return step(carry, tokens, mask)
    _, mask, *tokens = pad_to_runs(size, None, mask, *map(jnp.asarray, tokens))
    runs = jax.tree.map(functools.partial(in_runs, size), (tokens, mask))
    carry, y = jax.lax.scan(lambda carry, run: step(carry, *run), carry, runs)
    return carry, jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(b, -1, *y.shape[3:])[:, :t], y)

  def accumulate(
    self,
    x: jax.Array,  # [b, t, d]
    mask: jax.Array | None = None,  # bool[b, t]
    *,
    values: jax.Array | None = None,  # [b, t, d], `x` by default
    total: HyperMixingState | None = None,
  ) -> HyperMixingState:
    """Adds the next piece of a sequence to the `total` of those before: the first of two passes."""
    check_call(x, "parallel", None, mask)
    total = self._no_tokens(x.shape[0]) if total is None else total
    return self._accumulate(total, x, x if values is None else values, mask)

  def _accumulate(self, total, x, values, mask):
    x, v = (self._real(a, mask) for a in (x, values))
    position, seen = kernels.token_positions(total.position, None, mask, x.shape[1])
    w1 = self.w1(self._informed(x, position))
    with jax.named_scope("mixing"):
      added = jnp.einsum(
        "bthk,bthv->bhkv", w1, self._heads(v), preferred_element_type=total.kv.dtype
      )
    return HyperMixingState(total.kv + added, seen)

  def read_out(
    self,
    total: HyperMixingState,
    x: jax.Array,  # [b, t, d]
    mask: jax.Array | None = None,  # bool[b, t]
    *,
    start: jax.Array | int = 0,
  ) -> jax.Array:  # [b, t, d]
    """What a piece of a sequence reads from the `total` of all of it: the second pass.

    `start` is the number of real tokens before the piece, of every row or of each, `[b]`.
    """
    check_call(x, "parallel", None, mask)
    start = jnp.broadcast_to(jnp.asarray(start), x.shape[:1])
    return self._read(kernels.activate(total.kv, self.activation), x, start, mask)[1]

  def _read(self, perceptron, x, start, mask):
    x = self._real(x, mask)
    position, seen = kernels.token_positions(start, None, mask, x.shape[1])
    w2 = (self.w2 or self.w1)(self._informed(x, position))
    if mask is not None:  # as published, where padding is what the norm makes of 0
      w2 = jnp.where(jnp.asarray(mask)[..., None, None], w2, 0)
    with jax.named_scope("mixing"):
      y = jnp.einsum("bhkv,bthk->bthv", perceptron, w2.astype(perceptron.dtype))
    return seen, self._normed(y)


def log_decays(num_heads: int) -> np.ndarray:  # [h]
  """Logarithms of decays with half-lives from 11 to 177 tokens; the last head forgets nothing."""
  forgotten = np.exp(np.linspace(np.log(1 / 16), np.log(1 / 256), num_heads - 1))
  return np.append(np.log1p(-forgotten), 0)


class CausalHyperMixing(_HyperMixing):
  """HyperMixing of every token with those up to it. Ours: no causal form is published.

      S_t = decay S_{t-1} + w1_t v_t^T        y_t = LayerNorm(act(gain S_t / n_t)^T w2_t)

  Without decay and normaliser, `y_t` is what `HyperMixing` of the first `t` tokens gives the last.
  But the sum then grows with the length, and what the activation does to it with it: a `normalizer`
  keeps it in scale, and there is a gain for every head that is learned.

  Args:
    decay: `"none"`, or `"fixed"` for every head: see `log_decays`.
    normalizer: `n_t`. `"none"` is 1; `"mean"` the sum of all decayed weights, `"variance"` the root
      of the sum of their squares; `"row_rms"` the root mean square of every row of the sum, and
      `"head_rms"` that of all of a head's, which unlike the former is smooth where a row is small.
    chunk_size: tokens in a chunk, whose states the chunkwise form holds at once.

  Others as in `HyperMixing`. Its state is that sum, in at least float32, and the tokens seen.
  """

  def __init__(
    self,
    d_model: int,
    *,
    decay: Decay = "none",
    normalizer: Normalizer = "none",
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    super().__init__(d_model, param_dtype=param_dtype, rngs=rngs, **options)
    for name, value, known in (("decay", decay, Decay), ("normalizer", normalizer, Normalizer)):
      if value not in get_args(known):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}")
    self.decay, self.normalizer = decay, normalizer
    gain = jnp.ones(self.num_heads, state_dtype(param_dtype))
    self.gain = None if normalizer == "none" else nnx.Param(gain)

  def init_state(self, batch_size, *, max_len=None):
    return self._no_tokens(batch_size)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    check_call(x, form, reset, mask)
    b, t, _ = x.shape
    x = self._real(x, mask)
    start = jnp.zeros(b, jnp.uint32) if state is None else state.position
    position, seen = kernels.token_positions(start, reset, mask, t)
    u = self._informed(x, position)
    w1 = self.w1(u)
    log_decay = None
    if self.decay == "fixed":
      log_decay = jnp.asarray(log_decays(self.num_heads), state_dtype(self.dtype))
    y, kv = kernels.causal_hypermixing(
      w1,
      w1 if self.w2 is None else self.w2(u),
      self._heads(x),
      log_decay,
      scale=self._scale(position, log_decay),
      rms=RMS.get(self.normalizer),
      activation=self.activation,
      state=None if state is None else state.kv,
      reset=reset,
      mask=mask,
      form=form,
      chunk_size=self.chunk_size,
    )
    return self._normed(y), HyperMixingState(kv.astype(state_dtype(self.dtype)), seen)

  def _scale(self, position, log_decay):  # None, [h] or [b, t, h]
    if self.normalizer == "none":
      return None
    gain = self.gain[...]
    if self.normalizer in RMS:
      return gain
    if log_decay is None:
      log_decay = jnp.zeros(self.num_heads, state_dtype(self.dtype))
    if self.normalizer == "mean":
      return gain[None, None] / kernels.decayed_count(position, log_decay)
    return gain[None, None] * jax.lax.rsqrt(kernels.decayed_count(position, 2 * log_decay))
