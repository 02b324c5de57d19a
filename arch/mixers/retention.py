"""Multi-scale retention (RetNet, arXiv 2307.08621) and gated retention (YOCO, arXiv 2405.05254)."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform import kernels

from ..interface import Form, SequenceModule, check_call, state_dtype
from ..layers.linear import Linear

Decay = Literal["fixed", "learned", "gated"]
DecaySchedule = Literal["geometric", "linspace"]
Dialect = Literal["torchscale", "fla"]
GATE_TEMPERATURE = 16  # YOCO, section 3.3: keeps a fresh gate's decay near 1


class RetentionState(NamedTuple):
  """`kv`, the sum of decayed `k v^T` in at least float32, and the tokens seen of the document."""

  kv: jax.Array  # [b, h, k, v]
  position: jax.Array  # uint32[b]


def log_decays(num_heads: int, schedule: DecaySchedule) -> np.ndarray:  # [h]
  """Logarithms of RetNet's decays, one per head.

  `"geometric"`: `1 - 2^(-5-i)`, as printed in section 2.1 and in the published code.
  `"linspace"`: `1 - exp(linspace(ln 1/32, ln 1/512, h))`, what the paper's language models used
  (section 3.1): half-lives from 22 to 354 tokens for any number of heads.
  """
  if schedule == "geometric":
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads))))
  if schedule == "linspace":
    return np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), num_heads)))
  raise ValueError(f"decay_schedule is {schedule!r}, expected geometric or linspace")


def rotary_angles(key_size: int, dialect: Dialect) -> np.ndarray:  # [k/2]
  """Radians per token. torchscale's run from 1 to 1/10000 inclusive, fla's are RoFormer's."""
  pairs = key_size // 2
  last = pairs - 1 if dialect == "torchscale" else pairs
  return 10000.0 ** (-np.arange(pairs) / max(last, 1))


class Retention(SequenceModule):
  """Multi-scale retention: projections, rotary positions, retention, head norm, gate.

      o = retention(rotate(W_q x), rotate(W_k x) / sqrt(k), W_v x)
      y = W_o (silu(W_g x) * head_norm(o))

  Positions are those of the document, counted across calls in the state.

  Args:
    d_model: width of inputs and outputs.
    num_heads, num_kv_heads: query heads and the key/value heads they share; the decay is the
      query head's, so every query head has its own state.
    key_dim, value_dim: widths over all query heads; `d_model` and twice that by default.
    decay: `"fixed"` per head, `"learned"` per head (starting from the same values), or
      `"gated"`: per head and token, `log_sigmoid(W_d x) / 16` as in YOCO.
    decay_schedule: the values of `"fixed"` and the first ones of `"learned"`; see `log_decays`.
    dialect: which published implementation it equals. `"torchscale"`: inclusive rotary
      angles, head norm without weight, row scale folded into `eps` (only for a decay per
      head). `"fla"`: RoFormer's angles, a head norm weight shared by all heads, no row scale.
      torchscale rotates neighbours and we rotate halves: importers permute the weights.
    eps: of the head norm.
    chunk_size: tokens in a chunk of the chunkwise form.
    dtype: of the computation; `None` is `param_dtype`. State, decays, positions and norms are
      held in at least float32.
  """

  def __init__(
    self,
    d_model: int,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    decay: Decay = "fixed",
    decay_schedule: DecaySchedule = "geometric",
    dialect: Dialect = "torchscale",
    eps: float = 1e-6,
    chunk_size: int = 128,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    key_dim = key_dim or d_model
    value_dim = value_dim or 2 * d_model
    num_kv_heads = num_kv_heads or num_heads
    for name, width in (("key_dim", key_dim), ("value_dim", value_dim)):
      if width % num_heads:
        raise ValueError(f"{name} {width} is not divisible by num_heads {num_heads}")
    if num_heads % num_kv_heads:
      raise ValueError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}")
    if key_dim // num_heads % 2:
      raise ValueError(f"key size {key_dim // num_heads} per head is odd; rotation needs pairs")
    if decay not in ("fixed", "learned", "gated"):
      raise ValueError(f"decay is {decay!r}, expected fixed, learned or gated")
    if dialect not in ("torchscale", "fla"):
      raise ValueError(f"dialect is {dialect!r}, expected torchscale or fla")
    self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
    self.key_size, self.value_size = key_dim // num_heads, value_dim // num_heads
    self.decay, self.decay_schedule, self.dialect = decay, decay_schedule, dialect
    self.eps, self.chunk_size = eps, chunk_size
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

    linear = functools.partial(Linear, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
    init, output_init = _kernel_inits(dialect)
    self.query = linear(d_model, key_dim, kernel_init=init)
    self.key = linear(d_model, num_kv_heads * self.key_size, kernel_init=init)
    self.value = linear(d_model, num_kv_heads * self.value_size, kernel_init=init)
    self.gate = linear(d_model, value_dim, kernel_init=init)
    self.output = linear(value_dim, d_model, kernel_init=output_init)

    initial = log_decays(num_heads, decay_schedule)
    if decay == "learned":  # decay = exp(-exp(log_rate)), always below 1
      self.log_rate = nnx.Param(jnp.asarray(np.log(-initial), state_dtype(param_dtype)))
    elif decay == "gated":
      self.decay_gate = linear(d_model, num_heads, kernel_init=init)
    self.norm_weight = (
      nnx.Param(jnp.ones(self.value_size, param_dtype)) if dialect == "fla" else None
    )

  def init_state(self, batch_size, *, max_len=None):
    kv = (batch_size, self.num_heads, self.key_size, self.value_size)
    return RetentionState(jnp.zeros(kv, state_dtype(self.dtype)), jnp.zeros(batch_size, jnp.uint32))

  def __call__(self, x, state=None, *, form: Form = "parallel", reset=None, mask=None, rngs=None):
    check_call(x, form, reset, mask)
    b, t, _ = x.shape
    x = jnp.asarray(x, self.dtype)
    start = jnp.zeros(b, jnp.uint32) if state is None else state.position
    position, seen = kernels.token_positions(start, reset, mask, t)
    # Constants of the trace, not variables of the module, so that the compiler computes what
    # follows from them and the positions once for all layers.
    steps = kernels.rotary_steps(rotary_angles(self.key_size, self.dialect))
    phase = kernels.rotary_phase(position, jnp.asarray(steps))
    log_decay = self._log_decay(x)

    def heads(a, size):
      return a.reshape(b, t, -1, size)

    q = kernels.rotate(heads(self.query(x), self.key_size), phase)
    k = kernels.rotate(heads(self.key(x), self.key_size) * self.key_size**-0.5, phase)
    o, kv = kernels.retention(
      q,
      k,
      heads(self.value(x), self.value_size),
      log_decay,
      state=None if state is None else state.kv,
      reset=reset,
      mask=mask,
      form=form,
      chunk_size=self.chunk_size,
    )
    o = kernels.head_norm(
      o,
      position,
      log_decay if self.dialect == "torchscale" and self.decay != "gated" else None,
      eps=self.eps,
      weight=None if self.norm_weight is None else self.norm_weight[...],
    )
    y = self.output(jax.nn.silu(self.gate(x)) * o.reshape(b, t, -1))
    return y, RetentionState(kv.astype(state_dtype(self.dtype)), seen)

  def _log_decay(self, x):  # [h] or [b, t, h]
    if self.decay == "fixed":
      return jnp.asarray(log_decays(self.num_heads, self.decay_schedule), state_dtype(self.dtype))
    if self.decay == "learned":
      return -jnp.exp(self.log_rate[...])
    gate = self.decay_gate(x).astype(state_dtype(self.dtype))
    return jax.nn.log_sigmoid(gate) / GATE_TEMPERATURE


def _kernel_inits(dialect: Dialect):
  """Initialisers of the input and output projections, as the dialect's own code has them."""
  if dialect == "fla":
    return nnx.initializers.normal(0.02), nnx.initializers.normal(0.02)
  xavier = nnx.initializers.variance_scaling
  return xavier(2.0**-5, "fan_avg", "uniform"), xavier(2.0**-2, "fan_avg", "uniform")
