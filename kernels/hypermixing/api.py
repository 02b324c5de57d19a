"""The public function: validation, then the form asked for."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ..checks import Form, check_form, check_heads, check_shapes
from . import xla

Activation = Literal["gelu", "relu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Rms = Literal["row", "head"]


@jax.named_scope("mixing")
def causal_hypermixing(
  w1: jax.Array,  # [b, t, h, k]
  w2: jax.Array,  # [b, t, h, k]
  v: jax.Array,  # [b, t, h, v]
  log_decay: jax.Array | None = None,  # [h], finite, at most 0
  *,
  scale: jax.Array | None = None,  # [h] or [b, t, h]
  rms: Rms | None = None,
  activation: Activation = "gelu",
  state: jax.Array | None = None,  # [b, h, k, v]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
  form: Form = "chunkwise",
  chunk_size: int = 16,
) -> tuple[jax.Array, jax.Array]:  # [b, t, h, v], [b, h, k, v]
  """HyperMixing (arXiv 2203.03691, section 3) of every token with those up to it.

      S_n = exp(log_decay) S_{n-1} + w1_n v_n^T        y_n = act(scale_n S_n)^T w2_n

  The causal form is this library's: none is published. Without decay and scale, `y_n` is what
  HyperMixing of the first `n` tokens gives the last of them. The activation is of a matrix that
  every token changes, so that outputs cannot be had from pairs of tokens, as in attention:
  `"parallel"` holds the states of all tokens at once, `"chunkwise"` those of `chunk_size` tokens,
  which the backward pass computes again, and `"recurrent"` takes one token after another.

  Args:
    w1: rows of the first generated matrix, what a token is written by.
    w2: rows of the second, what it is read by.
    v: what is mixed.
    log_decay: natural logarithm of every head's decay; `None`: nothing is forgotten.
    scale: of the state before the activation; 1 if `None`.
    rms: `"row"`: every row of the state is first divided by its root mean square over `v`;
      `"head"`: all of it by that over `k` and `v`. 1e-6 is added to the mean square.
    activation: `"gelu"`, by the error function, or `"relu"`.
    state: the sum before the first token; zeros if `None`.
    reset: true at the first token of a document; the state is cleared before that token, whatever
      it holds (NaN included).
    mask: false at padding, which leaves the state bit for bit as it was and is invisible to real
      tokens (its own `reset` included), whatever it holds. The output there is finite and
      unspecified.
    form: which algorithm.
    chunk_size: tokens in a chunk; the recurrent form ignores it.

  Returns:
    Outputs in the dtype of `v`, and the final state. The state and all that is made of it are held
    in the widest of float32 and the input dtypes. Everything is differentiable.

  Raises:
    ValueError: for shapes that do not fit together, or an unknown form, activation or rms.
  """
  arrays = (w1, w2, v, log_decay, scale, state, reset, mask)
  w1, w2, v, log_decay, scale, state, reset, mask = jax.tree.map(jnp.asarray, arrays)
  check_heads(w1=w1, v=v)
  b, t, h, k = w1.shape
  expected = {
    "w2": (w2, {(b, t, h, k)}),
    "v": (v, {(b, t, h, v.shape[-1])}),
    "log_decay": (log_decay, {(h,)}),
    "scale": (scale, {(h,), (b, t, h)}),
    "state": (state, {(b, h, k, v.shape[-1])}),
    "reset": (reset, {(b, t)}),
    "mask": (mask, {(b, t)}),
  }
  check_shapes(f"w1 {list(w1.shape)}", expected)
  check_form("hypermixing", t, form, chunk_size)
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
  if rms is not None and rms not in get_args(Rms):
    raise ValueError(f"rms is {rms!r}, expected row, head or None")
  forms = {
    "parallel": functools.partial(xla.parallel, chunk_size=chunk_size),
    "chunkwise": functools.partial(xla.chunkwise, chunk_size=chunk_size),
    "recurrent": xla.recurrent,
  }
  if mask is not None:  # a weight of 0 would not keep NaN out
    w1, w2, v = (jnp.where(mask[..., None, None], a, 0) for a in (w1, w2, v))
  dtype = jnp.result_type(jnp.float32, *(a.dtype for a in (w1, w2, v, state) if a is not None))
  if log_decay is None:
    log_decay = jnp.zeros(h, dtype)
  if state is None:
    state = jnp.zeros((b, h, k, v.shape[-1]), dtype)
  if scale is not None:
    scale = jnp.broadcast_to(scale.astype(dtype), (b, t, h))
    scale = scale if mask is None else jnp.where(mask[..., None], scale, 0)
  w1, w2, x, log_decay, state = (a.astype(dtype) for a in (w1, w2, v, log_decay, state))
  read = functools.partial(xla.read, rms=rms, activation=activation)
  y, final = forms[form](w1, w2, x, log_decay, scale, state, reset, mask, read)
  return y.astype(v.dtype), final
