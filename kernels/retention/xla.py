"""The three forms of retention in plain XLA.

All of them follow from one observation. Within a run of tokens let `n_i` count the real ones up
to token `i`, `s_i` the documents begun, and `A_i = log_decay n_i` (or the running sum of a
per-token log decay). Then token `j` enters output `i` with weight

    exp(A_i - A_j)   if j <= i, token j is real and s_i = s_j,   else 0

and the incoming state with weight `exp(A_i)` if `s_i = 0`, else 0. The outgoing state is what
the last token sees. Counting only real tokens makes a padded tail exact without code of its own.
The caller has zeroed q, k, v and a per-token log decay at masked tokens.

Arrays are run-major, then head-major, [n, b, g, r, c, ...], with n runs of c tokens and r = h / g
query heads to a key/value head: products and the scan over runs then take them as they are. An
axis on which nothing depends has size 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of the parallel form. Rows of 128 fill a matrix unit and skip nearly half of the pairs of a long
# sequence; every block is compiled by itself, so there are at most 8, which still skip 7/16.
ROW_BLOCK = 128
MAX_ROW_BLOCKS = 8


class _Runs(NamedTuple):
  """What the weights of the tokens of a run are made of."""

  rate: jax.Array  # [1, 1, g, r, 1], `A = rate * count`
  count: jax.Array  # [..., c], n_i, or A_i itself (and rate 1) for a per-token decay
  documents: jax.Array | None  # int32[..., c], s_i
  real: jax.Array | None  # bool[..., c]

  def pairs(self, start: int, stop: int) -> jax.Array:
    """Weights of tokens [0, stop) in outputs [start, stop): [..., stop - start, stop]."""

    def rows(a):
      return a[..., start:stop, None]

    def columns(a):
      return a[..., None, :stop]

    positions = jnp.arange(stop)[None, None, None, None]
    visible = rows(positions) >= columns(positions)
    if self.real is not None:
      visible &= columns(self.real)
    if self.documents is not None:
      visible &= rows(self.documents) == columns(self.documents)
    exponent = self.rate[..., None] * (rows(self.count) - columns(self.count))
    # The mask goes inside the exponential: outside, 0 * inf would make NaN gradients.
    return jnp.exp(jnp.where(visible, exponent, -jnp.inf))

  def incoming(self) -> jax.Array:
    """Weights of the incoming state in every output: [..., c]."""
    exponent = self.rate * self.count
    if self.documents is not None:
      exponent = jnp.where(self.documents == 0, exponent, -jnp.inf)
    return jnp.exp(exponent)


def _runs(log_decay, reset, mask, g: int, c: int, dtype) -> _Runs:
  """`log_decay` [h] or [b, t, h] in `dtype`; `reset` and `mask` [b, t] or None."""
  real = None if mask is None else _by_head(mask[..., None], 1, c)
  if log_decay.ndim == 1:
    rate = log_decay.reshape(1, 1, g, -1, 1)
    tokens = jnp.ones((1, 1, 1, 1, c), bool) if real is None else real
    count = jnp.cumsum(tokens, axis=-1, dtype=jnp.int32).astype(dtype)
  else:
    rate = jnp.ones((1, 1, 1, 1, 1), dtype)
    decays = _by_head(log_decay, g, c)
    count = jnp.cumsum(decays, axis=-1)
  documents = None
  if reset is not None:
    starts = reset if mask is None else reset & mask
    documents = jnp.cumsum(_by_head(starts[..., None], 1, c), axis=-1, dtype=jnp.int32)
  return _Runs(rate, count, documents, real)


def _by_head(x: jax.Array, g: int, c: int) -> jax.Array:
  """[b, n c, g r, ...] to [n, b, g, r, c, ...]."""
  b, t, h = x.shape[:3]
  x = x.reshape(b, t // c, c, g, h // g, *x.shape[3:])
  return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))


def _by_time(x: jax.Array, t: int, dtype) -> jax.Array:
  """[n, b, g, r, c, v] to [b, t, g r, v], dropping the padded tail."""
  n, b, g, r, c, v = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * c, g * r, v)[:, :t].astype(dtype)


def _accumulator(q, k, v, state) -> jnp.dtype:
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
  scores = jnp.einsum("nbgrik,nbgjk->nbgrij", q, _shared(k), preferred_element_type=dtype)
  weighted = (scores * weights).astype(v.dtype)
  out = jnp.einsum("nbgrij,nbgjv->nbgriv", weighted, _shared(v), preferred_element_type=dtype)
  return out, (q, k, v, weights, scores)


def _attend_backward(residuals, d_out):
  q, k, v, weights, scores = residuals
  weighted = (scores * weights).astype(v.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=weights.dtype)
  d_weighted = product("nbgriv,nbgjv->nbgrij", d_out, _shared(v))
  d_scores = d_weighted * weights
  d_q = product("nbgrij,nbgjk->nbgrik", d_scores, _shared(k))
  d_k = product("nbgrij,nbgrik->nbgjk", d_scores, q)
  d_v = product("nbgrij,nbgriv->nbgjv", weighted, d_out)
  alone = [axis for axis, size in enumerate(weights.shape) if size == 1]
  return (
    d_q.astype(q.dtype),
    d_k[:, :, :, None].astype(k.dtype),
    d_v[:, :, :, None].astype(v.dtype),
    (d_weighted * scores).sum(alone, keepdims=True),
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _shared(a):
  """Keys or values [n, b, g, 1, j, ...], which the r query heads of a group share."""
  return a[:, :, :, 0]


def _read(q, state, weights):
  """What outputs take of the states [n, b, g, r, k, v] that precede their runs."""
  read = jnp.einsum("nbgrck,nbgrkv->nbgrcv", q.astype(state.dtype), state)
  return _weigh(weights[..., None], read)


def _weigh(weights, x):
  """`weights * x`, but 0 where the weight is 0: a reset forgets a state that is not finite too."""
  return jnp.where(weights == 0, 0, weights * x)


def _leave(k, v, weights):
  """`sum_j weights_j k_j v_j^T`: what every run adds to the state, [n, b, g, r, k, v]."""
  weighted = k.astype(weights.dtype) * weights[..., None]
  return jnp.einsum("nbgrck,nbgcv->nbgrkv", weighted, _shared(v).astype(weights.dtype))


def _untouched_if_masked(new, old, mask):
  """Keeps the state of rows without a real token bit for bit (-0.0 included)."""
  if mask is None:
    return new
  return jnp.where(mask.any(axis=1)[:, None, None, None], new, old)


def _zeros_state(q, v, dtype):
  return jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[-1]), dtype)


def row_blocks(t: int) -> list[tuple[int, int]]:
  """Where the blocks of rows of the parallel form start and stop."""
  size = max(ROW_BLOCK, -(-t // MAX_ROW_BLOCKS))
  return [(start, min(start + size, t)) for start in range(0, t, size)]


def parallel(q, k, v, log_decay, state, reset, mask):
  """One run of length t, in blocks of rows so that what causality hides is not computed."""
  t, g, dtype = q.shape[1], k.shape[2], _accumulator(q, k, v, state)
  runs = _runs(log_decay.astype(dtype), reset, mask, g, t, dtype)
  heads = (_by_head(q, g, t), _by_head(k, g, t), _by_head(v, g, t))
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
    final += _weigh(incoming[..., -1, None, None], before)
  else:
    state = _zeros_state(q, v, dtype)
  final = final.reshape(state.shape)
  return _by_time(out, t, v.dtype), _untouched_if_masked(final, state.astype(dtype), mask)


def chunkwise(q, k, v, log_decay, state, reset, mask, *, chunk_size):
  """All chunks at once, as above, but for a scan that carries the state from one to the next."""
  t, g, dtype = q.shape[1], k.shape[2], _accumulator(q, k, v, state)
  state = _zeros_state(q, v, dtype) if state is None else state.astype(dtype)
  log_decay = log_decay.astype(dtype)
  c = min(chunk_size, t)
  if t % c:
    mask = jnp.ones((q.shape[0], t), bool) if mask is None else mask

    def pad(a):
      return jnp.pad(a, [(0, 0), (0, -t % c)] + [(0, 0)] * (a.ndim - 2))

    q, k, v, mask = pad(q), pad(k), pad(v), pad(mask)
    reset = None if reset is None else pad(reset)
    log_decay = log_decay if log_decay.ndim == 1 else pad(log_decay)

  runs = _runs(log_decay, reset, mask, g, c, dtype)
  q, k, v, out_dtype = _by_head(q, g, c), _by_head(k, g, c), _by_head(v, g, c), v.dtype
  within, incoming = runs.pairs(0, c), runs.incoming()
  added = _leave(k, v, within[..., -1, :])
  kept = jnp.broadcast_to(incoming[..., -1], added.shape[:-2])[..., None, None]

  def carry(before, chunk):
    kept, added = chunk
    return _weigh(kept, before) + added, before

  final, before = jax.lax.scan(carry, state.reshape(added.shape[1:]), (kept, added))
  out = _attend(q, k, v, within) + _read(q, before, incoming)
  return _by_time(out, t, out_dtype), _untouched_if_masked(final.reshape(state.shape), state, mask)


def recurrent(q, k, v, log_decay, state, reset, mask):
  """One token after another, the state being all that is kept."""
  h, g, dtype = q.shape[2], k.shape[2], _accumulator(q, k, v, state)
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
  final, out = jax.lax.scan(step, state, tokens)
  return jnp.swapaxes(out, 0, 1).astype(v.dtype), final
