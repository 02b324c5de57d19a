"""Spiking neurons as a layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from triform import kernels
from triform.kernels.lif.api import check_neuron

from ..interface import state_dtype
from .ahead import answer_ahead

MOMENTUM = 0.9  # of the spike rate that is kept from call to call in training


class LIF(nnx.Module):
  """Leaky integrate-and-fire neurons, one to a feature; see `triform.kernels.lif` for the options.

  With `learn_tau` the layer learns one time constant, `1 / tau = sigmoid(tau_logit)`, which starts
  as `tau` (PLIF, arXiv 2007.05785).

  What it carries between calls is the potentials, `[b, d]` in at least float32. `rate` is how many
  spikes a neuron has per real token: a running average, of which a call in training makes up a
  tenth, or, while `measuring` is true, that of the last call alone. No gradient flows through it.

  Raises:
    ValueError: for a `tau` below 1 (of 1 or below with `learn_tau`), an unknown surrogate or a
      slope that is not positive.
  """

  def __init__(
    self,
    features: int,
    *,
    tau: float = 2.0,
    learn_tau: bool = False,
    threshold: float = 1.0,
    reset_value: float | None = 0.0,
    surrogate: str = "sigmoid",
    slope: float | None = None,
    decay_input: bool = True,
    detach_reset: bool = True,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
  ):
    check_neuron(tau, surrogate, slope)
    if learn_tau and not tau > 1:
      raise ValueError(f"tau is {tau}, expected above 1 where it is learnt")
    self.features, self.tau = features, tau
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    self.threshold, self.reset_value = threshold, reset_value
    self.surrogate, self.slope = surrogate, slope
    self.decay_input, self.detach_reset = decay_input, detach_reset
    start = jnp.asarray(-math.log(tau - 1), param_dtype) if learn_tau else None
    self.tau_logit = None if start is None else nnx.Param(start)
    self.rate = nnx.BatchStat(jnp.zeros(features, state_dtype(param_dtype)))
    self.measuring = False

  def init_state(self, batch_size: int) -> jax.Array:
    rest = self.reset_value or 0.0
    return jnp.full((batch_size, self.features), rest, state_dtype(self.dtype))

  def __call__(self, x, v=None, *, reset=None, mask=None, ahead=0, rngs=None):
    """Spikes `[b, t, d]` for currents `[b, t, d]`, and the potentials to carry on with.

    Args:
      x: currents.
      v: potentials before the first token; those of `init_state` if `None`.
      reset: bool `[b, t]`, true at the first token of a document.
      mask: bool `[b, t]`, false at padding.
      ahead: how many tokens at the end are answered but left out of the potentials returned.
      rngs: given means training, when `rate` is updated.
    """
    x = jnp.asarray(x, self.dtype)
    v = self.init_state(x.shape[0]) if v is None else v
    spikes, v = answer_ahead(self._fire, ahead, v, x, reset, mask)
    if self.measuring or rngs is not None:
      self._count(spikes, mask)
    return spikes, v

  def _fire(self, v, x, reset, mask):
    tau = self.tau
    if self.tau_logit is not None:
      logit = self.tau_logit[...]
      tau = 1 + jnp.exp(-logit.astype(state_dtype(logit.dtype)))
    return kernels.lif(
      x,
      tau=tau,
      threshold=self.threshold,
      reset_value=self.reset_value,
      surrogate=self.surrogate,
      slope=self.slope,
      decay_input=self.decay_input,
      detach_reset=self.detach_reset,
      state=v,
      reset=reset,
      mask=mask,
    )

  def _count(self, spikes, mask):
    old = self.rate[...]
    tokens = jnp.asarray(spikes.shape[0] * spikes.shape[1] if mask is None else mask.sum())
    counted = jax.lax.stop_gradient(spikes).astype(old.dtype).sum(axis=(0, 1))
    new = counted / jnp.maximum(tokens, 1).astype(old.dtype)
    if not self.measuring:
      new = MOMENTUM * old + (1 - MOMENTUM) * new
    self.rate[...] = jnp.where(tokens > 0, new, old)
