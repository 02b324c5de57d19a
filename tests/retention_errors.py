"""Interpreted kernels of retention, held to float64 and to the error of the simplest form."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from laws_errors import error

from triform import kernels
from triform.kernels.retention import reference

B, CHUNK = 2, 128
EPS = {dtype: float(jnp.finfo(dtype).eps) for dtype in ("bfloat16", "float32")}
NAMES = ("q", "k", "v", "log_decay", "state")


def numbers(seed, t, decay, h, g, k, v, dtype="float32"):
  """q, k, v, log_decay and state, of which the first three are exact in `dtype`."""
  rng = np.random.default_rng(seed)
  shapes = [(B, t, h, k), (B, t, g, k), (B, t, g, v)]
  arrays = [jnp.asarray(rng.normal(size=shape) / 4, dtype) for shape in shapes]
  decays = -0.1 * np.abs(rng.normal(size=(h,) if decay == "[h]" else (B, t, h)))
  return (*arrays, np.float32(decays), np.float32(rng.normal(size=(B, h, k, v))))


def as_called(chunkwise, arrays, reset, mask, interpret=True):
  """A kernel's `chunkwise` as the public function calls it, but interpreted."""
  *heads, log_decay, state = arrays
  if mask is not None:
    heads = [jnp.where(mask[..., None, None], a, 0) for a in heads]
    log_decay = log_decay if log_decay.ndim == 1 else jnp.where(mask[..., None], log_decay, 0)
  return chunkwise(*heads, log_decay, state, reset, mask, interpret=interpret)


def plain(arrays, reset, mask):
  """The simplest form of XLA."""
  *arrays, state = arrays
  return kernels.retention(*arrays, state=state, reset=reset, mask=mask, form="recurrent")


@functools.partial(jax.jit, static_argnames=("f", "interpret"))
def with_gradients(f, arrays, cotangents, reset, mask, **interpret):
  results, backward = jax.vjp(lambda arrays: f(arrays, reset, mask, **interpret), arrays)
  return results, backward(cotangents)[0]


def wide(arrays):
  return tuple(np.asarray(a, np.float64) for a in arrays)


class Error(NamedTuple):
  """Of one result, relative to its norm, and how large it may be."""

  name: str
  found: float
  allowed: float


def compare(*args, **options):
  """What `errors` finds is allowed."""
  for name, found, allowed in errors(*args, **options):
    assert found <= allowed, name


def errors(kernel, arrays, reset, mask, *, by_differences=False, **interpret):
  """Of results and every gradient; twice that of the simplest form and four roundings are allowed.

  The simplest form and float64 run on the CPU, where a product of float32 numbers is one.
  `by_differences`: the gradient of decays is a sum of `q . dq - k . dk` over all later tokens, so
  that it may be off by what the errors found in `dq`, `dk` and the state, if they are allowed, make
  of it, too.
  """
  dtype = str(arrays[0].dtype)
  rng = np.random.default_rng(1)
  real = np.ones(arrays[0].shape[:2], bool) if mask is None else mask
  o, state = (
    jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.eval_shape(plain, arrays, reset, mask)
  )
  cotangents = (
    jnp.asarray(rng.normal(size=o.shape) * real[..., None, None], o.dtype),
    jnp.asarray(rng.normal(size=state.shape), state.dtype),
  )
  got = with_gradients(kernel, arrays, cotangents, reset, mask, **interpret)
  cpu = jax.devices("cpu")[0]
  simplest = with_gradients(plain, *jax.device_put((arrays, cotangents, reset, mask), cpu))
  with jax.enable_x64():
    exact = jax.device_put((wide(arrays), wide(cotangents), reset, mask), cpu)
    _, gradients = with_gradients(plain, *exact)
  *heads, before = arrays
  truth = reference.retention(*wide(heads), state=before, reset=reset, mask=mask)

  def measured(name, one, other, expected, more=0.0):
    one, other = np.float64(one), np.float64(other)
    allowed = 2 * error(other, expected) + 4 * EPS[dtype] + more / np.linalg.norm(expected)
    return Error(name, error(one, expected), allowed)

  (out, after), d = got
  (other_out, other_after), other_d = simplest
  assert out.dtype == dtype and after.dtype == jnp.float32
  # That of a decay is a sum of terms of either sign, of which a chunk's are added one by one.
  terms = [np.float64(a) * b for a, b in zip(cotangents, truth, strict=True)]
  rounding = CHUNK**0.5 * EPS["float32"] * np.sqrt(sum((a**2).sum() for a in terms))
  found = [
    measured("out", out[real], other_out[real], truth[0][real]),
    measured("final state", after, other_after, truth[1]),
  ]
  for name, one, other, expected in zip(NAMES, d, other_d, gradients, strict=True):
    more = rounding if name == "log_decay" else 0.0
    if name == "log_decay" and by_differences:
      made = [np.fmin(row.found, row.allowed) for row in found[1:4]]
      more += passed_on(made, arrays, gradients, cotangents[1], truth[1])
    found.append(measured(f"gradient of {name}", one, other, expected, more))
  return found


def passed_on(made, arrays, gradients, d_after, after):
  """The size of the error that those of the state, `dq` and `dk` leave in the gradient of decays.

  They are relative to the norm of each token's vector (or of a matrix of the state), and of
  independent parts: the sum of `n` products with them is then off by the product of the norms times
  that error over the root of `n`. A token's `q . dq` and `k . dk` are in the gradients of the
  decays of all tokens up to it (which for a decay per head are added, errors and all), `<dS, S>` at
  the end in those of all tokens.
  """
  of_state, *of_gradients = made
  t = arrays[0].shape[1]
  power = 2 if arrays[3].ndim == 1 else 1
  weights = (np.arange(t) + 1.0)[:, None] ** power

  def variance(relative, a, b, axes, weights):
    a, b = np.float64(a), np.float64(b)
    squares = (a**2).sum(axes) * (b**2).sum(axes) / math.prod(a.shape[axis] for axis in axes)
    return relative**2 * (weights * squares).sum()

  total = variance(of_state, d_after, after, (2, 3), t**power)
  for relative, a, d in zip(of_gradients, arrays, gradients, strict=False):
    total += variance(relative, a, d, (3,), weights)
  return math.sqrt(total)
