"""The convolutions that LMUFormer begins with."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from triform import kernels

from ..interface import SequenceModule, State
from .ahead import answer_ahead
from .batch_norm import BatchNorm
from .linear import Linear
from .normed import NormedLinear, uniform_init

TAPS = 3
NUM_CONVS = 4  # before the one of the residual, which waits for a frame as well

Padding = Literal["causal", "same"]
Variant = Literal["plain", "spiking_ms", "spiking"]


class ConvStemState(NamedTuple):
  """What convolutions, the delay of the residual and neurons carry."""

  tails: tuple[jax.Array, ...]  # [b, 2, channels] each, the last inputs
  delayed: State  # [b, 1, d], where the residual waits and is not in a tail; else ()
  potentials: tuple[jax.Array, ...]  # [b, d] each


class ConvStem(SequenceModule):
  """Four convolutions of three frames and one more beside a residual, `[b, t, i]` to `[b, t, d]`.

      plain        z <- BN(relu(conv(z)))  four times                    y = z + conv(z)
      spiking_ms   z <- LIF(BN(conv(z)))  three times, z <- conv(z)      y = z + conv(LIF(BN(z)))
      spiking      z <- LIF(BN(conv(z)))  four times                     y = z + LIF(BN(conv(z)))

  (LMUFormer, arXiv 2402.04882, and its published code.) With `padding="causal"`, ours, a frame sees
  the ten before it. With `"same"`, as published, five of them come later: an output is that of the
  frame `lookahead` = 5 before, and the zeros at either end of a document stand before every
  convolution. The stem is then told by `frames` which frames there are: the index in its document
  of every token, uint32 `[b, t]`, and how many frames there are in all, `[b]`. Tokens with later
  indices push the last frames out; `ahead` of them, at the end, are left out of the state.
  """

  def __init__(
    self,
    in_features: int,
    d_model: int,
    *,
    variant: Variant,
    padding: Padding,
    make_neuron: Callable[[int], nnx.Module],
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    options = {"use_bias": False, "kernel_init": uniform_init, **dtypes, "rngs": rngs}
    self.in_features, self.d_model, self.variant = in_features, d_model, variant
    self.causal = padding == "causal"
    self.lookahead = 0 if self.causal else NUM_CONVS + 1
    self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
    kinds = [NormedLinear] * NUM_CONVS
    if variant == "plain":
      kinds = [Linear] * NUM_CONVS
    elif variant == "spiking_ms":
      kinds[-1] = Linear  # what the residual adds is not normalised
    widths = [in_features] + [d_model] * (NUM_CONVS - 1)
    self.convs = nnx.List(
      kind(TAPS * width, d_model, **options) for kind, width in zip(kinds, widths, strict=True)
    )
    norms = {"plain": NUM_CONVS, "spiking_ms": 1, "spiking": 0}[variant]
    self.norms = nnx.List(BatchNorm(d_model, **dtypes) for _ in range(norms))
    last = NormedLinear if variant == "spiking" else Linear
    self.position = last(TAPS * d_model, d_model, **options)
    neurons = {"plain": 0, "spiking_ms": NUM_CONVS, "spiking": NUM_CONVS + 1}[variant]
    self.neurons = nnx.List(make_neuron(d_model) for _ in range(neurons))

  def init_state(self, batch_size, *, max_len=None):
    widths = [self.in_features] + [self.d_model] * NUM_CONVS
    return ConvStemState(
      tuple(jnp.zeros((batch_size, TAPS - 1, width), self.dtype) for width in widths),
      jnp.zeros((batch_size, 1, self.d_model), self.dtype) if self._delays() else (),
      tuple(neuron.init_state(batch_size) for neuron in self.neurons),
    )

  def _delays(self) -> bool:
    return self.lookahead > 0 and self.variant == "spiking_ms"

  def __call__(
    self,
    x,
    state=None,
    *,
    form="parallel",
    reset=None,
    mask=None,
    rngs=None,
    frames=None,
    ahead=0,
  ):
    if x.shape[2:] != (self.in_features,):
      shape = [x.shape[0], x.shape[1] - ahead, *x.shape[2:]]  # as the model was given it
      raise ValueError(f"x has shape {shape}, expected [batch, time, {self.in_features}]")
    state = self.init_state(x.shape[0]) if state is None else state
    tails, potentials = [], []

    def real(delay):
      """Which tokens have a frame behind `delay` convolutions; the others are padding or zero."""
      if frames is None:
        return mask
      index, count = frames
      there = (index >= delay) & (index < (count + delay)[:, None])
      return there if mask is None else there & mask

    def window(x):
      """Inputs of a convolution, the newest first, and the tail kept."""

      def shift(tail, x, reset, mask):
        shifts, tail = kernels.causal_shifts(x, TAPS - 1, tail=tail, reset=reset, mask=mask)
        return jnp.concatenate(shifts, axis=-1), tail

      x, tail = answer_ahead(shift, ahead, state.tails[len(tails)], x, reset, mask)
      tails.append(tail)
      return x

    def convolve(layer, x, there):
      normed = isinstance(layer, NormedLinear)
      with jax.named_scope("convolution"):
        x = (layer.linear if normed else layer)(x)
      return layer.normalise(x, mask=there, rngs=rngs) if normed else x

    def fire(x, there):
      i = len(potentials)
      x, v = self.neurons[i](
        x, state.potentials[i], reset=reset, mask=there, ahead=ahead, rngs=rngs
      )
      potentials.append(v)
      return x

    x = jnp.asarray(x, self.dtype)
    there = real(0)
    for i, layer in enumerate(self.convs):
      x = _only(x, there)
      there = real(i + 1) if self.lookahead else mask
      x = convolve(layer, window(x), there)
      if self.variant == "plain":
        x = self.norms[i](jax.nn.relu(x), mask=there, rngs=rngs)
      elif isinstance(layer, NormedLinear):
        x = fire(x, there)
    residual = x = _only(x, there)
    if self.variant == "spiking_ms":
      x = fire(self.norms[0](x, mask=there, rngs=rngs), there)
    seen = window(x)
    delayed = ()
    if self._delays():
      residual, delayed = self._delay(residual, state.delayed, mask, ahead)
    elif self.lookahead:
      residual = seen[..., self.d_model : 2 * self.d_model]
    there = real(self.lookahead) if self.lookahead else mask
    x = convolve(self.position, seen, there)
    if self.variant == "spiking":
      x = fire(x, there)
    return _only(residual + x, there), ConvStemState(tuple(tails), delayed, tuple(potentials))

  def _delay(self, x, last, mask, ahead):
    def shift(tail, x, mask):
      shifts, tail = kernels.causal_shifts(x, 1, tail=tail, mask=mask)
      return shifts[1], tail

    return answer_ahead(shift, ahead, last, x, mask)


def _only(x, there):
  """Zero where there is no frame; padding may hold anything, NaN included."""
  return x if there is None else jnp.where(there[..., None], x, 0)
