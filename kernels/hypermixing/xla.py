"""The three forms of causal HyperMixing in plain XLA.

The states of a run of `c` tokens are what the run leaves of them, by the weights of `..runs`, and
what is left of the state before it. The caller has zeroed w1, w2 and v at masked tokens and brought
all to one dtype; `scale` is [b, t, h] or absent, and `read` is `read` below with its options.
"""

import functools

import jax
import jax.numpy as jnp

from ..runs import in_runs, make_runs, pad_to_runs, states_before, untouched_if_masked, weigh

RMS_EPS = 1e-6


def activate(z: jax.Array, activation: str) -> jax.Array:
  """`"gelu"`, by the error function, or `"relu"`. Raises `ValueError` for another name."""
  if activation == "relu":
    return jnp.maximum(z, 0)
  if activation == "gelu":  # by `erf`, which takes less than the `erfc` of `jax.nn.gelu`
    return 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))
  raise ValueError(f"activation is {activation!r}, expected gelu or relu")


def read(states, w2, scale, *, rms, activation):
  """`act(scale S)^T w2`: states [..., k, v], w2 [..., k] and scale [...] or None to [..., v]."""
  if rms is not None:
    axes = (-1,) if rms == "row" else (-2, -1)
    mean_square = jnp.mean(states * states, axis=axes, keepdims=True)
    states *= jax.lax.rsqrt(mean_square + RMS_EPS)
  if scale is not None:
    states *= scale[..., None, None]
  return jnp.einsum("...kv,...k->...v", activate(states, activation), w2)


def _run(
  w1: jax.Array,  # [b, c, h, k]
  v: jax.Array,  # [b, c, h, v]
  log_decay: jax.Array,  # [h]
  reset: jax.Array | None,  # bool[b, c]
  mask: jax.Array | None,  # bool[b, c]
) -> tuple[jax.Array, jax.Array]:  # [b, h, c, k, v], [b, h, c]
  """What a run leaves to each of its tokens, and the weights there of the state before it."""
  b, c, h, _ = w1.shape
  runs = make_runs(log_decay, reset, mask, h, c, w1.dtype)
  weights, incoming = runs.pairs(0, c)[0, :, :, 0], runs.incoming()[0, :, :, 0]
  added = jnp.einsum("bchk,bchv->bhckv", w1, v)
  weights = jnp.broadcast_to(weights, (b, h, c, c))
  return jnp.einsum("bhij,bhjkv->bhikv", weights, added), jnp.broadcast_to(incoming, (b, h, c))


def _of_heads(a):
  """[b, c, h, ...] to [b, h, c, ...]."""
  return None if a is None else a.swapaxes(1, 2)


def _padded(w1, w2, v, scale, reset, mask, chunk_size):
  """All tokens in chunks, [n, b, c, ...]."""
  c = min(chunk_size, w1.shape[1])
  scales = () if scale is None else (scale,)
  reset, mask, w1, w2, v, *scales = pad_to_runs(c, reset, mask, w1, w2, v, *scales)
  arrays = (w1, w2, v, scales[0] if scales else None, reset, mask)
  return jax.tree.map(functools.partial(in_runs, c), arrays)


def parallel(w1, w2, v, log_decay, scale, state, reset, mask, read, *, chunk_size):
  """The states of all tokens at once, but for a scan over those that the chunks leave."""
  t = w1.shape[1]
  w1, w2, v, scale, *flags = _padded(w1, w2, v, scale, reset, mask, chunk_size)
  flag_axes = [None if flag is None else 0 for flag in flags]
  added, incoming = jax.vmap(_run, (0, 0, None, *flag_axes))(w1, v, log_decay, *flags)
  incoming = incoming[..., None, None]

  final, before = states_before(state, incoming[:, :, :, -1], added[:, :, :, -1])
  states = added + weigh(incoming, before[:, :, :, None])
  y = read(states, w2.swapaxes(2, 3), None if scale is None else scale.swapaxes(2, 3))
  return _tokens(y, t), untouched_if_masked(final, state, mask)


def chunkwise(w1, w2, v, log_decay, scale, state, reset, mask, read, *, chunk_size):
  """One chunk after another. Only the states between them are stored for the backward pass."""

  def step(before, chunk):
    w1, w2, v, scale, reset, mask = chunk
    added, incoming = _run(w1, v, log_decay, reset, mask)
    states = added + weigh(incoming[..., None, None], before[:, :, None])
    return states[:, :, -1], read(states, _of_heads(w2), _of_heads(scale))

  chunks = _padded(w1, w2, v, scale, reset, mask, chunk_size)
  final, y = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state, chunks)
  return _tokens(y, w1.shape[1]), untouched_if_masked(final, state, mask)


def _tokens(y, t):
  """[n, b, h, c, v] to [b, t, h, v], dropping the padded tail."""
  n, b, h, c, v = y.shape
  return y.transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, v)[:, :t]


def recurrent(w1, w2, v, log_decay, scale, state, reset, mask, read):
  """One token after another, the state being all that is kept; for a gradient, all states are."""
  decay = jnp.exp(log_decay)[None, :, None, None]

  def step(state, token):
    w1, w2, v, scale, reset, mask = token
    kept = decay * state
    if reset is not None:  # not in the decay: 0 * NaN is NaN
      kept = jnp.where(reset[:, None, None, None], 0, kept)
    new = kept + w1[..., None] * v[..., None, :]
    if mask is not None:
      new = jnp.where(mask[:, None, None, None], new, state)
    return new, read(new, w2, scale)

  tokens = jax.tree.map(lambda a: a.swapaxes(0, 1), (w1, w2, v, scale, reset, mask))
  final, y = jax.lax.scan(step, state, tokens)
  return y.swapaxes(0, 1), final
