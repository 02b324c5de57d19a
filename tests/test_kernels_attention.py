"""Attention and its cache beside the laws: the oracle, full caches, junk in padding, buckets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from laws_errors import EXACT

from triform.arch.interface import FORMS
from triform.kernels import KVCache, attention, new_cache, relative_buckets
from triform.kernels.attention import platform, reference, tpu

B, T, H, G, K = 2, 12, 4, 2, 6
every_form = pytest.mark.parametrize("form", FORMS)


def tensors(seed=0, t=T):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(B, t, heads, K)) for heads in (H, G, G)]


def flags(seed=1, t=T):
  rng = np.random.default_rng(seed)
  return {"reset": rng.random((B, t)) < 0.2, "mask": rng.random((B, t)) < 0.8}


@functools.partial(jax.jit, static_argnames=("form", "window", "chunk_size", "tanh", "max_len"))
def compiled(q, k, v, **options):
  return attention(q, k, v, **options)


@every_form
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("scores", ["plain", "biased", "tanh"])
def test_is_the_oracle_whole_and_in_pieces(form, window, scores):
  qkv, where, tanh = tensors(), flags(), scores == "tanh"
  bias = np.random.default_rng(2).normal(size=(H, 4)) if scores == "biased" else None
  expected = reference.attention(*qkv, window=window, bias=bias, tanh=tanh, **where)
  with jax.enable_x64():
    cache, pieces = new_cache(B, window or T, G, K, jnp.float64), []
    whole, _ = compiled(*qkv, bias=bias, tanh=tanh, form=form, window=window, chunk_size=5, **where)
    for start, stop in ((0, 7), (7, 8), (8, T)):
      piece = np.s_[:, start:stop]
      o, cache = compiled(
        *(a[piece] for a in qkv),
        cache=cache,
        bias=bias,
        tanh=tanh,
        form=form,
        window=window,
        chunk_size=5,
        **{name: flag[piece] for name, flag in where.items()},
      )
      pieces.append(o)
  for got in (whole, np.concatenate(pieces, axis=1)):
    assert np.abs(np.asarray(got) - expected)[where["mask"]].max() <= EXACT


@every_form
def test_the_cache_holds_the_document_and_zeros(form):
  q, k, v = tensors()
  reset = np.zeros((B, T), bool)
  reset[0, 9] = reset[1, 0] = True
  _, before = compiled(*tensors(seed=1), max_len=15, form=form)
  _, cache = compiled(q, k, v, cache=before, reset=reset, form=form)
  assert cache.position.tolist() == [3, T]
  assert cache.k.shape == (B, 15, G, K)
  for row, begin in ((0, 9), (1, 0)):
    for held, given in ((cache.k, k), (cache.v, v)):
      expected = np.zeros((15, G, K), np.float32)
      expected[: T - begin] = given[row, begin:]
      np.testing.assert_array_equal(held[row], expected)


@every_form
def test_a_full_cache_gives_nan_until_the_next_document(form):
  """And the tokens that had a row are as in a cache that is larger."""
  q, k, v = tensors()
  reset = np.zeros((B, T), bool)
  reset[0, 10] = True
  small, large = (new_cache(B, rows, G, K, jnp.float32) for rows in (8, T))
  o, cache = compiled(q, k, v, cache=small, reset=reset, form=form, chunk_size=5)
  expected, _ = compiled(q, k, v, cache=large, reset=reset, form=form, chunk_size=5)
  full = np.zeros((B, T), bool)
  full[0, 8:10] = full[1, 8:] = True
  assert np.isnan(o[full]).all()
  np.testing.assert_allclose(o[~full], expected[~full], rtol=1e-5, atol=1e-6)
  again, _ = compiled(q[:, :1], k[:, :1], v[:, :1], cache=cache, form=form)
  assert np.isfinite(again[0]).all() and np.isnan(again[1]).all()
  assert np.isfinite(cache.k).all() and cache.position.tolist() == [2, T]


@every_form
@pytest.mark.parametrize("window", [None, 5])
def test_masked_tokens_may_be_nan(form, window):
  qkv, where = tensors(), flags()
  junk = [np.where(where["mask"][..., None, None], a, np.nan) for a in qkv]
  rows = window or T

  @jax.jit
  def run(q, k, v):
    def loss(q, k, v):
      cache = new_cache(B, rows, G, K, jnp.float32)
      o, cache = attention(q, k, v, cache=cache, window=window, form=form, **where)
      return o[where["mask"]].sum(), (o, cache)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  gradients, (expected, cache) = run(*map(np.float32, qkv))
  others, (got, after) = run(*map(np.float32, junk))
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(got[where["mask"]], expected[where["mask"]])
  jax.tree.map(np.testing.assert_array_equal, (after, others), (cache, gradients))


def test_a_window_needs_no_more_memory_or_work_for_a_longer_past():
  """Its chunkwise form looks at no more than a window and a chunk of keys at a time."""
  q, k, v = (jnp.zeros((1, 256, 1, 4)) for _ in range(3))
  jaxpr = str(
    jax.make_jaxpr(lambda *a: attention(*a, window=8, form="chunkwise", chunk_size=16))(q, k, v)
  )
  assert "1,1,16,24]" in jaxpr.replace(" ", "") and "256,256" not in jaxpr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"cache": new_cache(B, T - 1, G, K, jnp.float32)},
      "12 tokens do not fit a cache of max_len 11",
    ),
    ({"cache": new_cache(1, T, G, K, jnp.float32)}, r"cache.k has shape \[1, 12, 2, 6\], expected"),
    ({"cache": new_cache(B, 4, G, K, jnp.float32), "window": 5}, r"expected \[2, 5, 2, 6\]"),
    ({"window": 0}, "window is 0, expected at least 1"),
    ({"chunk_size": 0}, "chunk_size is 0"),
    ({"form": "x"}, "form is 'x', expected one of"),
    ({"bias": np.zeros((3, 2))}, r"bias has shape \[3, 2\], expected \[4, 2\]"),
    ({"mask": np.zeros((B, 3), bool)}, r"mask has shape \[2, 3\], expected \[2, 12\]"),
  ],
)
def test_what_does_not_fit_is_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    attention(*tensors(), **arguments)


def test_heads_must_be_shared_evenly():
  q, k, v = tensors()
  with pytest.raises(ValueError, match="3 query heads cannot share 2 key/value heads evenly"):
    attention(q[:, :, :3], k, v)


def test_padding_may_exceed_the_cache():
  """A prompt of 3 tokens, padded to a bucket of 12, in a cache of 4."""
  q, k, v = tensors()
  mask = np.arange(T)[None] < np.full((B, 1), 3)
  cache = new_cache(B, 4, G, K, jnp.float32)
  o, cache = attention(q, k, v, cache=cache, mask=mask, form="chunkwise")
  expected, _ = attention(*(a[:, :3] for a in (q, k, v)))
  np.testing.assert_allclose(o[:, :3], expected, rtol=1e-5, atol=1e-6)
  assert isinstance(cache, KVCache) and cache.position.tolist() == [3, 3]


def test_t5_buckets():
  """16 exact ones, then geometric ones up to distance 128, and all beyond."""
  buckets = relative_buckets()
  assert buckets.shape == (129,)
  assert buckets[:17].tolist() == [*range(16), 16]
  assert buckets[[31, 32, 64, 90, 127, 128]].tolist() == [21, 21, 26, 29, 31, 31]
  assert np.all(np.diff(buckets) >= 0) and set(buckets) == set(range(32))
  with pytest.raises(ValueError, match="cannot divide distances up to 8"):
    relative_buckets(32, 8)


@pytest.mark.parametrize(("window", "segmented"), [(None, True), (40, False)])
def test_the_kernel_for_tpus_is_the_same_function(window, segmented):
  """Interpreted, with gradients; that it compiles is in `test_compiled_for_tpu.py`."""
  rng = np.random.default_rng(0)
  q, k, v, weights = (
    jnp.asarray(rng.normal(size=(1, 128, heads, 64)), jnp.float32) for heads in (2, 1, 1, 2)
  )
  segments = jnp.asarray(rng.integers(0, 3, (1, 128)).cumsum(axis=1) // 60) if segmented else None
  assert tpu.supports(q)

  def results(f):
    def loss(q, k, v):
      o = f(q, k, v, segments, window=window, scale=0.1)
      return (o * weights).sum(), o

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  with pltpu.force_tpu_interpret_mode():
    got = results(tpu.attention)
  (_, o), gradients = got
  (_, expected), expected_gradients = results(platform.attend_causally)
  for a, b in zip((o, *gradients), (expected, *expected_gradients), strict=True):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
