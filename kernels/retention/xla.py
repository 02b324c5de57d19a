"""The three forms of retention in plain XLA: `S_n` and `q_n` by the weights of `..runs`.

Arrays have its axes, [n, b, g, r, c, ...]. The caller has zeroed q, k, v and a per-token log decay
at masked tokens.
"""

import jax
import jax.numpy as jnp

from ..runs import (
  by_head,
  by_time,
  make_runs,
  pad_to_runs,
  states_before,
  untouched_if_masked,
  weigh,
)
from ..sharding import varying_as

# Of the parallel form. Rows of 128 fill a matrix unit and skip nearly half of the pairs of a long
# sequence; every block is compiled by itself, so there are at most 8, which still skip 7/16.
ROW_BLOCK = 128
MAX_ROW_BLOCKS = 8


def accumulator(q, k, v, state) -> jnp.dtype:
  dtypes = [a.dtype for a in (q, k, v, state) if a is not None]
  return jnp.result_type(jnp.float32, *dtypes)


@jax.custom_vjp
def _attend(q, k, v, weights):
  """`((q k^T) * weights) v` with q [n, b, g, r, i, k], k and v [n, b, g, 1, j, ...].

  Its derivative is written out for the order of operands, which decides what XLA for CPU copies:
  it transposes the small scores, not the wide values and outputs.
  """
  return _attend_forward(q, k, v, weights)[0]


def _attend_forward(q, k, v, weights):
  dtype = weights.dtype
  scores = _product("nbgrik,nbgjk->nbgrij", q, _shared(k), dtype)
  weighted = (scores * weights).astype(v.dtype)
  out = _product("nbgrij,nbgjv->nbgriv", weighted, _shared(v), dtype)
  return out, (q, k, v, weights, scores)


def _attend_backward(residuals, d_out):
  q, k, v, weights, scores = residuals
  weighted = (scores * weights).astype(v.dtype)
  dtype = weights.dtype
  d_weighted = _product("nbgriv,nbgjv->nbgrij", d_out, _shared(v), dtype)
  d_scores = d_weighted * weights
  d_q = _product("nbgrij,nbgjk->nbgrik", d_scores, _shared(k), dtype)
  d_k = _product("nbgrij,nbgrik->nbgjk", d_scores, q, dtype)
  d_v = _product("nbgrij,nbgriv->nbgjv", weighted, d_out, dtype)
  alone = [axis for axis, size in enumerate(weights.shape) if size == 1]
  return (
    d_q.astype(q.dtype),
    d_k[:, :, :, None].astype(k.dtype),
    d_v[:, :, :, None].astype(v.dtype),
    (d_weighted * scores).sum(alone, keepdims=True),
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _product(equation, a, b, dtype=None):
  """`einsum` without the axis of heads that share a key where each has its own.

  With it XLA for CPU gives products another layout, and copies all of a state back.
  """
  terms = equation.replace("->", ",").split(",")
  sizes = dict(zip("".join(terms[:2]), a.shape + b.shape, strict=True))
  if sizes["r"] > 1:
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)
  a, b = (x.squeeze(3) if "r" in term else x for x, term in zip((a, b), terms, strict=False))
  out = jnp.einsum(equation.replace("r", ""), a, b, preferred_element_type=dtype)
  return out.reshape(*out.shape[:3], 1, *out.shape[3:]) if "r" in terms[2] else out


def _shared(a):
  """Keys or values [n, b, g, 1, j, ...], which the r query heads of a group share."""
  return a[:, :, :, 0]


def _read(q, state, weights):
  """What outputs take of the states [n, b, g, r, k, v] that precede their runs."""
  read = _product("nbgrck,nbgrkv->nbgrcv", q.astype(state.dtype), state)
  return weigh(weights[..., None], read)


def _leave(k, v, weights):
  """`sum_j weights_j k_j v_j^T`: what every run adds to the state, [n, b, g, r, k, v]."""
  weighted = k.astype(weights.dtype) * weights[..., None]
  return _product("nbgrck,nbgcv->nbgrkv", weighted, _shared(v).astype(weights.dtype))


def _zeros_state(q, v, dtype):
  return jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[-1]), dtype)


def row_blocks(t: int) -> list[tuple[int, int]]:
  """Where the blocks of rows of the parallel form start and stop."""
  size = max(ROW_BLOCK, -(-t // MAX_ROW_BLOCKS))
  return [(start, min(start + size, t)) for start in range(0, t, size)]


def parallel(q, k, v, log_decay, state, reset, mask):
  """One run of length t, in blocks of rows so that what causality hides is not computed."""
  t, g, dtype = q.shape[1], k.shape[2], accumulator(q, k, v, state)
  runs = make_runs(log_decay.astype(dtype), reset, mask, g, t, dtype)
  heads = (by_head(q, g, t), by_head(k, g, t), by_head(v, g, t))
  outputs = []
  for start, stop in row_blocks(t):
    rows, keys, values = heads[0][..., start:stop, :], *(a[..., :stop, :] for a in heads[1:])
    outputs.append(_attend(rows, keys, values, runs.pairs(start, stop)))
  out = jnp.concatenate(outputs, axis=-2)

  incoming = runs.incoming()
  final = _leave(*heads[1:], runs.pairs(t - 1, t)[..., 0, :])
  if state is not None:
    before = state.astype(dtype).reshape(final.shape)
    out += _read(heads[0], before, incoming)
    final += weigh(incoming[..., -1, None, None], before)
  else:
    state = _zeros_state(q, v, dtype)
  final = final.reshape(state.shape)
  return by_time(out, t, v.dtype), untouched_if_masked(final, state.astype(dtype), mask)


def chunkwise(q, k, v, log_decay, state, reset, mask, *, chunk_size):
  """All chunks at once, as above, but for a scan that carries the state from one to the next.

  On a CPU the scan does all there is to do for a chunk, whose arrays so stay in the cache.
  """
  t, g, dtype = q.shape[1], k.shape[2], accumulator(q, k, v, state)
  state = _zeros_state(q, v, dtype) if state is None else state.astype(dtype)
  log_decay = log_decay.astype(dtype)
  c = min(chunk_size, t)
  per_token = () if log_decay.ndim == 1 else (log_decay,)
  reset, mask, q, k, v, *per_token = pad_to_runs(c, reset, mask, q, k, v, *per_token)
  log_decay = per_token[0] if per_token else log_decay
  runs = make_runs(log_decay, reset, mask, g, c, dtype)
  q, k, v, out_dtype = by_head(q, g, c), by_head(k, g, c), by_head(v, g, c), v.dtype
  arrays = (q, k, v, runs.pairs(0, c), runs.incoming())
  before = state.reshape(k.shape[1], g, -1, *state.shape[2:])
  final, out = jax.lax.platform_dependent(before, *arrays, cpu=_one_by_one, default=_at_once)
  return by_time(out, t, out_dtype), untouched_if_masked(final.reshape(state.shape), state, mask)


def _at_once(state, q, k, v, within, incoming):
  added = _leave(k, v, within[..., -1, :])
  kept = jnp.broadcast_to(incoming[..., -1], added.shape[:-2])[..., None, None]
  final, before = states_before(state, kept, added)
  return final, _attend(q, k, v, within) + _read(q, before, incoming)


def _one_by_one(state, *arrays):
  n = max(map(len, arrays))
  for a in arrays[1:]:  # of which a chunk's state is made
    state = varying_as(a, state)

  def step(state, chunk):
    chunk = iter(chunk)  # of the arrays that differ from chunk to chunk
    state, out = _at_once(state, *(next(chunk)[None] if len(a) == n else a for a in arrays))
    return state, out[0]

  return jax.lax.scan(step, state, [a for a in arrays if len(a) == n])


def recurrent(q, k, v, log_decay, state, reset, mask):
  """One token after another, the state being all that is kept."""
  h, g, dtype = q.shape[2], k.shape[2], accumulator(q, k, v, state)
  state = _zeros_state(q, v, dtype) if state is None else state.astype(dtype)
  log_decay = log_decay.astype(dtype)

  def step(state, token):
    q, k, v, per_token, reset, mask = token
    # The state keeps its shape: reshaped, XLA would not update it in place.
    decay = jnp.exp(log_decay[None] if per_token is None else per_token)[..., None, None]
    kept = decay * state
    if reset is not None:  # not in the decay: 0 * NaN is NaN
      kept = jnp.where(reset[:, None, None, None], 0, kept)
    new = kept + k[..., None] * v[:, :, None]
    if mask is not None:
      new = jnp.where(mask[:, None, None, None], new, state)
    return new, jnp.einsum("bhkv,bhk->bhv", new, q)

  k, v = jnp.repeat(k, h // g, axis=2), jnp.repeat(v, h // g, axis=2)
  per_token = log_decay if log_decay.ndim == 3 else None
  tokens = (q.astype(dtype), k.astype(dtype), v.astype(dtype), per_token, reset, mask)
  tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens)
  final, out = jax.lax.scan(step, varying_as(q, state), tokens)
  return jnp.swapaxes(out, 0, 1).astype(v.dtype), final
