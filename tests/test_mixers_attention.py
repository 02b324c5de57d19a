"""Attention layers against the formulas they state, in float64 NumPy.

Positions, grouped heads, convolutions and every option of Primer's ablations; documents are
packed and padded, so that nothing of one may be in another.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws_errors import EXACT

from triform.arch import FORMS, Attention, MultiDConvHeadAttention
from triform.kernels.attention import reference
from triform.kernels.attention.relative import relative_buckets

B, T, D = 2, 11, 8
every_form = pytest.mark.parametrize("form", FORMS)


def documents(reset, mask):
  """Which token of which document each real token is: `position`, and the indices before it."""
  position, before = np.zeros((B, T), int), [[[] for _ in range(T)] for _ in range(B)]
  for row in range(B):
    seen = []
    for n in np.flatnonzero(mask[row]):
      seen = [] if reset[row, n] else seen
      position[row, n], before[row][n] = len(seen), seen[::-1]
      seen = [*seen, n]
  return position, before


def convolved(x, taps, before):
  """`y_i = sum_s taps_s x_{i-s}`, the sum ending where the document begins."""
  y = x * taps[0]
  for row in range(B):
    for n in range(T):
      for tap, past in zip(taps[1:], before[row][n], strict=False):
        y[row, n] += tap * x[row, past]
  return y


def rotated(a, position):
  """Pairs `(i, i + k / 2)` turned by `position * 10000^(-2 i / k)`."""
  half = a.shape[-1] // 2
  angle = position[..., None, None] * 10000.0 ** (-np.arange(half) / half)
  turned = (a[..., :half] + 1j * a[..., half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def expected(layer, x, reset, mask):
  weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
  position, before = documents(reset, mask)
  x = np.where(mask[..., None], x, 0)
  projected = {}
  if getattr(layer, "input_floor", None) is not None:
    x = np.maximum(x, layer.input_floor)
  for name in ("key", "value", "query"):
    source = x
    if name == "query" and getattr(layer, "shared_qk", False):
      source = projected["key"]
    projected[name] = source @ weights[name]["kernel"]
    if f"{name}_conv" in weights:
      y = convolved(projected[name], weights[f"{name}_conv"]["taps"], before)
      projected[name] = y * layer.conv_scale
  q, k, v = (
    projected[name].reshape(B, T, -1, layer.key_size) for name in ("query", "key", "value")
  )
  if layer.position == "rotary":
    q, k = rotated(q, position), rotated(k, position)
  bias = None
  if layer.position == "relative":
    bias = weights["bias"]["relative_bias"][:, relative_buckets()]
  o = reference.attention(
    q, k, v, window=layer.window, bias=bias, scale=layer.scale, tanh=layer.tanh,
    reset=reset, mask=mask,
  )  # fmt: skip
  return o.reshape(B, T, -1) @ weights["output"]["kernel"]


OPTIONS = {
  "rotary": (Attention, {}),
  "grouped": (Attention, {"num_heads": 4, "num_kv_heads": 2, "position": "none"}),
  "wide-heads": (Attention, {"num_kv_heads": 1, "key_size": 6, "scale": 0.3}),
  "relative": (Attention, {"position": "relative"}),
  "window": (Attention, {"window": 3}),
  "primer-ez": (MultiDConvHeadAttention, {"position": "relative", "scale": 1.0}),
  "primer": (MultiDConvHeadAttention, {"position": "relative", "scale": 1.0, "shared_qk": True}),
  "five-taps": (MultiDConvHeadAttention, {"num_taps": 5, "num_kv_heads": 1, "window": 3}),
  "one-tap": (MultiDConvHeadAttention, {"num_taps": 1, "position": "none"}),
  "searched": (
    MultiDConvHeadAttention,
    {"input_floor": -0.57, "conv_scale": -1.12, "tanh": True, "scale": 1.0, "shared_qk": True},
  ),
}


@every_form
@pytest.mark.parametrize("name", OPTIONS)
def test_is_its_formula(name, form):
  kind, options = OPTIONS[name]
  rng = np.random.default_rng(0)
  reset, mask = rng.random((B, T)) < 0.2, rng.random((B, T)) < 0.8
  with jax.enable_x64():
    options = {"num_heads": 2, "chunk_size": 4, "param_dtype": jnp.float64, **options}
    layer = kind(D, **options, rngs=nnx.Rngs(0))
    for _, leaf in nnx.iter_graph(layer):
      if isinstance(leaf, nnx.Param):
        leaf[...] += jnp.asarray(rng.normal(size=leaf.shape) / 4)
    x = rng.normal(size=(B, T, D))
    y, _ = jax.jit(lambda x: layer(x, form=form, reset=reset, mask=mask))(x)
    want = expected(layer, x, reset, mask)
    # Rotary phases are whole multiples of 2 pi / 2**32.
    tolerance = 1e-8 if layer.position == "rotary" else EXACT
    assert np.abs(y - want)[mask].max() <= tolerance * np.abs(want).max()


@every_form
@pytest.mark.parametrize("tail", [False, True])
def test_no_document_is_in_the_convolution_of_the_next(form, tail):
  """Whatever the document before ends with, in the same call or in one before, changes no bit."""
  layer = MultiDConvHeadAttention(D, num_heads=2, shared_qk=True, chunk_size=4, rngs=nnx.Rngs(0))
  x = np.float32(np.random.default_rng(0).normal(size=(1, T, D)))
  begin = 0 if tail else 5
  reset = (np.arange(T) == begin)[None]

  @jax.jit
  def outcome(past):
    _, state = layer(past[:, :3], layer.init_state(1, max_len=T + 3), form=form)
    packed = jnp.concatenate([past[:, :begin], x[:, begin:]], axis=1)
    return layer(packed, state, form=form, reset=reset)[0][:, begin:]

  np.testing.assert_array_equal(outcome(x), outcome(-100 * x))
