"""The public functions: validation, then the form asked for."""

import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .. import implementations
from ..checks import Form, check_form, check_heads, check_shapes
from ..implementations import Implementation
from ..positions import decayed_count
from ..sharding import divided, parts, varying_as
from . import pieces, xla


@jax.named_scope("mixing")
def retention(
  q: jax.Array,  # [b, t, h, k]
  k: jax.Array,  # [b, t, g, k]
  v: jax.Array,  # [b, t, g, v]
  log_decay: jax.Array,  # [h] or [b, t, h], at most 0
  *,
  state: jax.Array | None = None,  # [b, h, k, v]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
  form: Form = "chunkwise",
  chunk_size: int = 128,
  implementation: Implementation | Sequence[Implementation] | None = None,
  sequence_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:  # [b, t, h, v], [b, h, k, v]
  """Multi-scale retention (RetNet, section 2.1), without scaling, rotation or normalisation.

      S_n = exp(log_decay_n) S_{n-1} + k_n v_n^T        o_n = S_n^T q_n

  The three forms are three algorithms for this one function. `"parallel"` weighs all pairs of
  tokens at once (quadratic in `t`), `"chunkwise"` does so within chunks of `chunk_size` tokens
  and carries the state between them (linear), `"recurrent"` takes one token after another.

  Args:
    q: queries. Query head `i` reads key/value head `i // (h // g)`.
    k: keys, already scaled and rotated.
    v: values.
    log_decay: natural logarithm of the decay of every query head, the same for all tokens or
      one per token; finite. Kept as it is given: a decay per head is never widened to a stream.
    state: the state that precedes the first token; zeros if `None`.
    reset: true at the first token of a document; the state is cleared before that token,
      whatever it holds (NaN included).
    mask: false at padding, which leaves the state bit for bit as it was and is invisible to
      real tokens (its own `reset` included), whatever it holds. The output there is finite and
      unspecified.
    form: which algorithm.
    chunk_size: tokens in a chunk of the chunkwise form of `"xla"`; the rest ignore it.
    implementation: `"xla"`, every form of any arrays; `"tpu"`, a kernel for the chunkwise form of
      128 or more tokens in bfloat16 or float32 and sizes from 64 to 512; `"gpu"`, one for bfloat16
      on Hopper GPUs and for float32 on those of Pallas-Triton, not yet run on any and so only by
      name; or several, of which the first is taken that fits. `None`: on a TPU its kernel, where
      it fits.
    sequence_axis: within `jax.shard_map`, the axis of the mesh that divides the tokens: arrays are
      this shard's, `state` comes before the first shard and the final state after the last. Every
      shard gets both whole. Kernels need `check_vma=False` there.

  Returns:
    Outputs in the dtype of `v`, and the final state. State, decays and sums are held in the
    widest of float32 and the input dtypes. Everything is differentiable, `state` and
    `log_decay` included.

  Raises:
    ValueError: for shapes that do not fit together, an unknown form or implementation.
    NotImplementedError: if no implementation asked for takes these arguments; it says why.
  """
  arrays = (q, k, v, log_decay, state, reset, mask)
  q, k, v, log_decay, state, reset, mask = jax.tree.map(jnp.asarray, arrays)
  check_heads(q=q, k=k, v=v)
  b, t, h, key_size = q.shape
  g = k.shape[2]
  expected = {
    "k": (k, {(b, t, g, key_size)}),
    "v": (v, {(b, t, g, v.shape[-1])}),
    "log_decay": (log_decay, {(h,), (b, t, h)}),
    "state": (state, {(b, h, key_size, v.shape[-1])}),
    "reset": (reset, {(b, t)}),
    "mask": (mask, {(b, t)}),
  }
  check_shapes(f"q {list(q.shape)}", expected)
  if h % g:
    raise ValueError(f"{h} query heads cannot share {g} key/value heads evenly")
  check_form("retention", t, form, chunk_size)
  forms = {
    "parallel": xla.parallel,
    "chunkwise": functools.partial(xla.chunkwise, chunk_size=chunk_size),
    "recurrent": xla.recurrent,
  }
  if mask is not None:  # a weight of 0 would not keep NaN out
    q, k, v = (jnp.where(mask[..., None, None], a, 0) for a in (q, k, v))
    if log_decay.ndim == 3:
      log_decay = jnp.where(mask[..., None], log_decay, 0)
  log_decay = varying_as(q, log_decay)  # or its gradient, which is written out, would not
  final = None
  if sequence_axis is not None:
    dtype = xla.accumulator(q, k, v, state)
    before = jnp.zeros((b, h, key_size, v.shape[-1]), dtype) if state is None else state
    state, final = pieces.over_shards(
      sequence_axis, k, v, log_decay, before.astype(dtype), reset, mask
    )
  out, after = implementations.run(
    "retention",
    implementation,
    {
      "xla": forms[form],
      "tpu": functools.partial(_with_kernel, "tpu"),
      "gpu": functools.partial(_with_kernel, "gpu"),
    },
    {
      name: functools.partial(_unsupported_reason, name, form, q, k, v, state)
      for name in ("tpu", "gpu")
    },
    *(q, k, v, log_decay, state, reset, mask),
  )
  return out, after if final is None else final


def _module(name: str):
  # Not at the top: Pallas takes long to import, and few need it.
  return importlib.import_module(f".{name}", __package__)


def _unsupported_reason(name, form, q, k, v, state) -> str | None:
  """Why not; asked of what a device has of these arrays."""
  if form != "chunkwise":
    return f"the form is {form!r}, expected 'chunkwise'"
  arrays, axes = (q, k, v, state), ("bth", "bth", "bth", "bh")
  own = parts(arrays, axes, rows=q.shape[0], heads=k.shape[2])
  return _module(name).unsupported_reason(*own)


def _with_kernel(name, q, k, v, log_decay, state, reset, mask):
  decays = "h" if log_decay.ndim == 1 else "bth"
  one = divided(
    _module(name).chunkwise,
    ("bth", "bth", "bth", decays, "bh", "bt", "bt"),
    ("bth", "bh"),
    rows=q.shape[0],
    heads=k.shape[2],
  )
  return one(q, k, v, log_decay, state, reset, mask)


def head_norm(
  o: jax.Array,  # [b, t, h, v]
  position: jax.Array,  # uint32[b, t]
  log_decay: jax.Array | None,  # [h]
  *,
  eps: float,
  weight: jax.Array | None = None,  # [v]
) -> jax.Array:  # [b, t, h, v]
  """Root-mean-square norm of every head with RetNet's row scale folded into `eps`.

      y_n = o_n / sqrt(mean(o_n^2) + eps s_n^2)      s_n^2 = (1 - g^(n+1)) / (1 - g)

  RetNet (section 2.1, "score normalization") divides row `n` of the decay matrix by `s_n` and
  normalises afterwards. The division cancels but for `eps`, so it is moved there: no running
  scale, and the three forms agree whatever `eps`. `log_decay=None` means `s_n = 1`.
  Computed in at least float32; returned in the dtype of `o`.
  """
  dtype = jnp.promote_types(o.dtype, jnp.float32)
  x = o.astype(dtype)
  variance = jnp.mean(x * x, axis=-1, keepdims=True)
  if log_decay is None:
    floor = dtype.type(eps)
  else:
    squared_scale = decayed_count(position, jnp.asarray(log_decay).astype(dtype))
    floor = eps * squared_scale[..., None]
  y = x * jax.lax.rsqrt(variance + floor)
  if weight is not None:
    y = y * jnp.asarray(weight).astype(dtype)[None, None, None, :]
  return y.astype(o.dtype)
