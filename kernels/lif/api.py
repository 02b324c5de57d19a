"""The public function: validation, then one scan over time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import check_shapes


class Surrogate(NamedTuple):
  """What a step is differentiated by: `derivative(z, slope)`, and the slope it has by default."""

  derivative: Callable
  slope: float


def _atan(z, slope):
  return slope / 2 / (1 + jnp.square(jnp.pi / 2 * slope * z))


def _sigmoid(z, slope):
  small = jnp.exp(-slope * jnp.abs(z))  # `1 - sigma` would lose the tail
  return slope * small / jnp.square(1 + small)


def _triangle(z, slope):
  return slope * jnp.maximum(0, 1 - slope * jnp.abs(z))


SURROGATES = {
  "atan": Surrogate(_atan, 2.0),
  "sigmoid": Surrogate(_sigmoid, 4.0),
  "triangle": Surrogate(_triangle, 1.0),
}


def check_neuron(tau: Any, surrogate: str, slope: float | None) -> None:
  """Raises `ValueError` for what no neuron has. The values of a `jax.Array` are not looked at."""
  if not isinstance(tau, jax.Array) and not np.all(np.asarray(tau) >= 1):
    raise ValueError(f"tau is {tau}, expected at least 1")
  if surrogate not in SURROGATES:
    raise ValueError(f"surrogate is {surrogate!r}, expected one of {', '.join(SURROGATES)}")
  if slope is not None and not slope > 0:
    raise ValueError(f"slope is {slope}, expected above 0")


# Tokens in one turn of an accelerator's loop, which costs more than their arithmetic: a training
# step takes a third of the time on an H200. Many more take minutes to compile.
UNROLLED = 10


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _spike(surrogate, slope, z):
  """1 where `z >= 0`, in the dtype of `z`."""
  return (z >= 0).astype(z.dtype)


@_spike.defjvp
def _spike_jvp(surrogate, slope, primals, tangents):
  (z,), (dz,) = primals, tangents
  return _spike(surrogate, slope, z), SURROGATES[surrogate].derivative(z, slope) * dz


def lif(
  x: jax.Array,  # [b, t, d]
  *,
  tau: float | jax.Array = 2.0,  # a number, [] or [d], at least 1
  threshold: float = 1.0,
  reset_value: float | None = 0.0,
  surrogate: str = "sigmoid",
  slope: float | None = None,
  decay_input: bool = True,
  detach_reset: bool = True,
  state: jax.Array | None = None,  # [b, d]
  reset: jax.Array | None = None,  # bool[b, t]
  mask: jax.Array | None = None,  # bool[b, t]
) -> tuple[jax.Array, jax.Array]:  # [b, t, d], [b, d]
  """Leaky integrate-and-fire neurons (PLIF, arXiv 2007.05785, where `tau` is learnt).

      h_n = v_{n-1} + (x_n - (v_{n-1} - r)) / tau      or, without `decay_input`,
      h_n = v_{n-1} - (v_{n-1} - r) / tau + x_n
      s_n = 1 if h_n >= threshold else 0
      v_n = (1 - s_n) h_n + s_n reset_value            or, if it is `None`, h_n - s_n threshold

  Here `r`, the potential at rest, is `reset_value`, or 0 if that is `None` (a soft reset). Spikes
  have no useful derivative. In its place, with `a` the slope and `z = h - threshold`, stands

      sigmoid    a sigma(a z) (1 - sigma(a z))       a = 4 by default
      atan       a / 2 / (1 + (pi a z / 2)^2)        a = 2
      triangle   a max(0, 1 - a |z|)                 a = 1

  Args:
    x: input currents.
    tau: the time constant of the membrane in tokens, of all neurons or of each.
    threshold: the potential at which a neuron spikes.
    reset_value: the potential after a spike; `None`: it falls by `threshold`.
    surrogate: the name of what stands for the derivative of a spike.
    slope: `a` above; the name's default if `None`.
    decay_input: inputs are divided by `tau`.
    detach_reset: no gradient flows through the spike that resets the potential.
    state: potentials before the first token; at rest if `None`.
    reset: true at the first token of a document; potentials are at rest before that token,
      whatever they were (NaN included).
    mask: false at padding, which leaves potentials bit for bit as they were and is invisible to
      real tokens (its own `reset` included), whatever it holds. It has no spikes.

  Returns:
    Spikes, 0 or 1 in the dtype of `x`, and the potentials after the last token. These are held in
    the widest of float32 and the dtypes of `x` and `state`. Everything is differentiable.

  Raises:
    ValueError: for shapes that do not fit together, an unknown surrogate, a slope that is not
      positive, or a `tau` below 1 (of a number or a NumPy array).
  """
  check_neuron(tau, surrogate, slope)
  x, tau, state = jax.tree.map(jnp.asarray, (x, tau, state))
  reset, mask = (None if flags is None else jnp.asarray(flags, bool) for flags in (reset, mask))
  if x.ndim != 3:
    raise ValueError(f"x has shape {list(x.shape)}, expected [batch, time, features]")
  b, t, d = x.shape
  expected = {
    "tau": (tau, {(), (d,)}),
    "state": (state, {(b, d)}),
    "reset": (reset, {(b, t)}),
    "mask": (mask, {(b, t)}),
  }
  check_shapes(f"x {list(x.shape)}", expected)
  narrow = x.dtype
  dtype = jnp.result_type(jnp.float32, *(a.dtype for a in (x, state) if a is not None))
  tau = jnp.broadcast_to(tau.astype(dtype), (1, d))
  rest = reset_value or 0.0
  spike = functools.partial(_spike, surrogate, slope or SURROGATES[surrogate].slope)

  def step(v, token):
    x, fresh, real = token
    before = v if fresh is None else jnp.where(fresh[:, None], rest, v)
    x = x.astype(dtype) if real is None else jnp.where(real[:, None], x, 0).astype(dtype)
    h = before + (x - (before - rest)) / tau if decay_input else before - (before - rest) / tau + x
    s = spike(h - threshold)
    r = jax.lax.stop_gradient(s) if detach_reset else s
    after = h - r * threshold if reset_value is None else (1 - r) * h + r * reset_value
    if real is not None:
      s, after = jnp.where(real[:, None], s, 0), jnp.where(real[:, None], after, v)
    return after, s.astype(narrow)

  fresh = reset
  if mask is not None:  # at padding too: gradients go through what is not selected, NaN or not
    fresh = ~mask if reset is None else reset | ~mask
  start = jnp.full((b, d), rest, dtype) if state is None else state.astype(dtype)
  over_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, fresh, mask))
  unroll = 1 if jax.default_backend() == "cpu" else UNROLLED
  final, spikes = jax.lax.scan(step, start, over_time, unroll=unroll)
  return jnp.moveaxis(spikes, 0, 1), final
