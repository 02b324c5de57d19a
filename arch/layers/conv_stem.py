"""The convolutions that LMUFormer begins with."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from triform import kernels

from ..interface import SequenceModule, State
from .ahead import answer_ahead
from .batch_norm import BatchNorm
from .frequency_conv import FrequencyConv, halved
from .linear import Linear
from .normed import NormedLinear, uniform_init

TAPS = 3
NUM_CONVS = 4  # before the one of the residual, which waits for a frame as well
BINS = (5, 3, 3)  # of frequency, that convolutions see which share their weights over it

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

  With `channels`, ours, the first convolutions share their weights over frequency too, see
  `FrequencyConv`: so many channels for every second bin, then for every second of those, and so on.
  """

  def __init__(
    self,
    in_features: int,
    d_model: int,
    *,
    variant: Variant,
    padding: Padding,
    channels: Sequence[int] = (),
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
    if len(channels) > len(BINS) or any(number < 1 for number in channels):
      raise ValueError(
        f"stem_channels is {tuple(channels)}, expected at most {len(BINS)} positive numbers"
      )
    widths = [in_features]
    makers, bins = [Linear] * NUM_CONVS, in_features
    for i, number in enumerate(channels):
      makers[i] = functools.partial(FrequencyConv, frames=TAPS, bins=bins, width=BINS[i])
      bins = halved(bins)
      widths.append(bins * number)
    # Of what the convolutions see, and the last gives.
    self.widths = (*widths, *[d_model] * (NUM_CONVS - len(channels)))
    # What the residual adds is not normalised.
    normed = {"plain": 0, "spiking_ms": NUM_CONVS - 1, "spiking": NUM_CONVS}[variant]
    self.convs = nnx.List(
      NormedLinear(TAPS * width, out, make_linear=make, **options)
      if i < normed
      else make(TAPS * width, out, **options)
      for i, (make, (width, out)) in enumerate(
        zip(makers, itertools.pairwise(self.widths), strict=True)
      )
    )
    norms = {"plain": self.widths[1:], "spiking_ms": [d_model], "spiking": []}[variant]
    self.norms = nnx.List(BatchNorm(width, **dtypes) for width in norms)
    last = NormedLinear if variant == "spiking" else Linear
    self.position = last(TAPS * d_model, d_model, **options)
    fired = {
      "plain": [],
      "spiking_ms": [*self.widths[1:-1], d_model],
      "spiking": [*self.widths[1:], d_model],
    }[variant]
    self.neurons = nnx.List(map(make_neuron, fired))

  def init_state(self, batch_size, *, max_len=None):
    return ConvStemState(
      tuple(jnp.zeros((batch_size, TAPS - 1, width), self.dtype) for width in self.widths),
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

      x, tail = answer_ahead(shift, ahead, state.tails[len(tails)], x, reset, mask, again=True)
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

    return answer_ahead(shift, ahead, last, x, mask, again=True)


def _only(x, there):
  """Zero where there is no frame; padding may hold anything, NaN included."""
  return x if there is None else jnp.where(there[..., None], x, 0)
