"""The public functions: validation, what decides who sees whom, then the form asked for."""

import functools

import jax
import jax.numpy as jnp

from ..checks import Form, check_form, check_heads, check_shapes
from ..positions import token_positions
from . import forms
from .forms import KVCache, Rule, Tokens


def new_cache(
  batch_size: int, rows: int, num_kv_heads: int, key_size: int, dtype: jnp.dtype
) -> KVCache:
  """An empty cache for documents of `rows` tokens, or a window of as many."""
  shape = (batch_size, rows, num_kv_heads, key_size)
  # Two arrays, not one twice: who donates a cache donates both.
  k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
  return KVCache(k, v, jnp.zeros(batch_size, jnp.uint32))


@jax.named_scope("mixing")
def attention(
  q: jax.Array,  # [b, t, h, k]
  k: jax.Array,  # [b, t, g, k]
  v: jax.Array,  # [b, t, g, k]
  *,
  cache: KVCache | None = None,
  max_len: int = 0,
  window: int | None = None,
  bias: jax.Array | None = None,  # [h, n]
  scale: float | None = None,
  tanh: bool = False,
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
  form: Form = "parallel",
  chunk_size: int = 128,
) -> tuple[jax.Array, KVCache]:  # [b, t, h, k]
  """Causal softmax attention to a document so far, whose keys and values the cache carries.

      o_i = sum_j softmax_j(scale q_i k_j + bias[i - j]) v_j      j <= i, of the same document

  `"parallel"` weighs all pairs of tokens at once, in the kernel that JAX has for the platform;
  `"chunkwise"` takes `chunk_size` queries at a time, in memory linear in `t` (and time too, with a
  window); `"recurrent"` writes one token after another into the cache and reads it.

  Args:
    q: queries. Query head `i` reads key/value head `i // (h // g)`.
    k: keys, which carry their positions already.
    v: values.
    cache: what an earlier call returned; `None` is an empty one.
    max_len: rows of the cache that is made where none is given, `t` at least.
    window: tokens that a query sees, itself included; the cache is then a ring of as many rows.
    bias: added to the scores by distance, the last one at every distance from `n - 1` on.
    scale: of the scores; `k ** -0.5` by default.
    tanh: of the softmax, as in the program that Primer was made from.
    reset: true at the first token of a document.
    mask: false at padding, which leaves the cache bit for bit as it was and is invisible to real
      tokens, whatever it holds. The output there is finite and unspecified.
    form: which algorithm.
    chunk_size: queries in a chunk of the chunkwise form; other forms ignore it.

  Returns:
    Outputs, and the cache after the last token, in the dtype of `k` or of the cache given. A token
    for which a cache without a window has no row left gets NaN.

  Raises:
    ValueError: for shapes that do not fit together, an unknown form, or more tokens than rows.
  """
  arrays = (q, k, v, cache, bias, reset, mask)
  q, k, v, cache, bias, reset, mask = jax.tree.map(jnp.asarray, arrays)
  b, t, size = _check(q, k, v, cache, window, bias, reset, mask, form, chunk_size)
  rows = window or max(max_len, t)
  fresh = cache is None
  if fresh:
    cache = new_cache(b, rows, k.shape[2], size, k.dtype)
  rows = cache.k.shape[1]
  position, seen = token_positions(cache.position, reset, mask, t)
  real = mask
  if not fresh and window is None:
    fits = position < rows
    real = fits if mask is None else mask & fits
  if real is not None:  # a weight of 0 would not keep NaN out
    q, k, v = (jnp.where(real[..., None, None], a, 0) for a in (q, k, v))
  document = None
  if reset is not None:
    document = jnp.cumsum(reset if mask is None else reset & mask, axis=1, dtype=jnp.int32)
  tokens, order = Tokens(position, document, real), None
  if window is not None and mask is not None and form != "recurrent":
    order = jnp.argsort(~mask, axis=1, stable=True)
    q, k, v, tokens = forms.take_tokens((q, k, v, tokens), order)
  algorithms = {
    "parallel": forms.parallel,
    "chunkwise": functools.partial(forms.chunkwise, chunk_size=chunk_size),
    "recurrent": forms.recurrent,
  }
  out, keys, values = algorithms[form](
    q,
    k,
    v,
    tokens,
    cache,
    seen,
    fresh=fresh,
    rule=Rule(window, bias, size**-0.5 if scale is None else scale, tanh),
  )
  if order is not None:
    out = forms.take_tokens(out, jnp.argsort(order, axis=1))
  if not fresh and window is None:
    full = ~fits if mask is None else mask & ~fits
    out = jnp.where(full[..., None, None], jnp.nan, out)
  return out, KVCache(keys, values, seen)


def _check(q, k, v, cache, window, bias, reset, mask, form, chunk_size):
  check_heads(q=q, k=k, v=v)
  b, t, h, size = q.shape
  g = k.shape[2]
  expected = {"k": (k, {(b, t, g, size)}), "v": (v, {(b, t, g, size)})}
  expected |= {"reset": (reset, {(b, t)}), "mask": (mask, {(b, t)})}
  if bias is not None:
    expected["bias"] = (bias, {(h, bias.shape[-1])})
  if cache is not None:
    rows = window or cache.k.shape[1]
    expected |= {f"cache.{name}": (getattr(cache, name), {(b, rows, g, size)}) for name in "kv"}
  check_shapes(f"q {list(q.shape)}", expected)
  if h % g:
    raise ValueError(f"{h} query heads cannot share {g} key/value heads evenly")
  check_form("attention", t, form, chunk_size)
  if window is not None and window < 1:
    raise ValueError(f"window is {window}, expected at least 1")
  if cache is not None and window is None and reset is None and mask is None and t > rows:
    raise ValueError(f"{t} tokens do not fit a cache of max_len {rows}")
  return b, t, size
