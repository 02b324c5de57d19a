"""What spiking models do: how often their neurons fire, and the energy that is said to take."""

import functools
import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .interface import Form, SequenceModule
from .layers.batch_norm import BatchNorm
from .layers.conv_stem import TAPS
from .layers.frequency_conv import FrequencyConv, halved
from .layers.linear import Linear
from .layers.normed import NormedLinear
from .layers.spiking import LIF
from .layout import split_model
from .mixers.spiking_lmu import SpikingLMU
from .models.lmuformer import LMUFormer, PlainFeedForward
from .models.stack import Stack

# Joules in 45 nm: 32-bit floating-point sums are 0.9 pJ and products 3.7 pJ (Horowitz, ISSCC 2014).
MAC = 4.6e-12
ACCUMULATE = 0.9e-12


def spike_rates(
  model: SequenceModule,
  x: jax.Array,
  *,
  mask: jax.Array | None = None,
  form: Form = "parallel",
) -> dict[str, float]:
  """Spikes of a neuron for each real frame, on average over the neurons of a layer, in evaluation.

  Names are paths, `stack/layers/0/mixer/write_neuron`, whether layers are scanned or not. `model`
  stays as it is.

  Args:
    model: has `LIF` layers.
    x: its inputs, `[b, t, ...]`, from no state.
    mask: bool `[b, t]`, false at padding.
    form: of the call.

  Raises:
    ValueError: if the model has no spiking neurons.

  Warns:
    UserWarning: of every `SpikingLMU` to whose memory nothing is written.
  """
  model = nnx.clone(model)
  neurons = [path for path, module in nnx.iter_graph(model) if isinstance(module, LIF)]
  if not neurons:
    raise ValueError(
      f"{type(model).__name__} has no spiking neurons: expected a model with LIF layers"
    )
  for _, module in nnx.iter_graph(model):
    if isinstance(module, LIF | Stack):
      module.measuring = True
  rates = _measure(*split_model(model), x, mask, form)
  rates = {name: float(rate) for name, rate in rates.items()}
  _warn_of_dead(rates)
  return rates


@functools.partial(jax.jit, static_argnums=(0, 5))
def _measure(graphdef, params, variables, x, mask, form):
  model = nnx.merge(graphdef, params, variables)
  model(x, mask=mask, form=form)
  rates = {}
  for path, module in nnx.iter_graph(model):
    if isinstance(module, LIF):
      rates |= _by_layer(path, module.rate[...].mean(axis=-1))
  return rates


def _by_layer(path, rate):
  """Of a scanned layer, by the names that it would have otherwise."""
  if jnp.ndim(rate) == 0:
    return {"/".join(map(str, path)): rate}
  at = path.index("layers") + 1
  return {"/".join(map(str, (*path[:at], i, *path[at:]))): one for i, one in enumerate(rate)}


def _warn_of_dead(rates):
  for name, rate in rates.items():
    if name.endswith("write_neuron") and rate == 0:
      warnings.warn(
        f"{name} never fires: nothing is written to the memory behind it, so that the block sees "
        "every frame by itself, and the weights before it learn from the tail of the surrogate "
        "alone; try memory_channels above 1, a lower threshold of these neurons, or another seed",
        stacklevel=3,
      )


class Operations(NamedTuple):
  """What a layer takes for a whole clip."""

  macs: float
  accumulates: float


class Energy(NamedTuple):
  """The energy of a clip in joules, and what it is a sum of; see `energy`."""

  joules: float
  layers: dict[str, Operations]
  updates: float  # of potentials, a multiply-add each, which are not in the sum


def energy(
  model: LMUFormer,
  rates: Mapping[str, float] | float,
  *,
  frames: int,
  form: Form = "recurrent",
  mac: float = MAC,
  accumulate: float = ACCUMULATE,
) -> Energy:
  """The energy of a clip, as spiking models are usually compared.

      mac * multiply-accumulates + accumulate * spikes * (additions that a spike causes)

  Multiply-accumulates are all products with what is real-valued: the first convolution, `Abar m` of
  the memories, the head, once, on the mean, and of a plain model everything. Batch norms are one
  for every element, where they are not folded (`fold_batch_norm`). All other products see spikes,
  whose weights are only added: their number is the rate of their inputs times the weights. In the
  variant `"spiking"` residuals are sums of spikes, of which all count. Not counted are additions of
  biases and residuals, activations, the potentials' `updates`, and any traffic to memory, which in
  hardware can well be most of the energy: the constants are a convention, and no measurement.

  Args:
    model: may be abstract.
    rates: as of `spike_rates`, or a number for all neurons; `{}` for a plain model.
    frames: of the clip.
    form: of the memory. `"recurrent"` is `Abar m + Bbar u`; `"parallel"` the convolution with its
      response, of `(frames + 1) / 2` inputs on average, which for spikes is of additions alone.
    mac: joules of a multiply-accumulate.
    accumulate: joules of an addition.

  Raises:
    ValueError: for another model, a layer without a rate, or another form.
  """
  if not isinstance(model, LMUFormer):
    raise ValueError(f"model is a {type(model).__name__}, expected an LMUFormer")
  if form not in ("recurrent", "parallel"):
    raise ValueError(f"form is {form!r}, expected recurrent or parallel")
  ledger = _Ledger(rates)
  x = _stem(ledger, model.stem)
  stack = model.stack
  for i in range(stack.num_layers):
    block = stack.layers if stack.scan else stack.layers[i]
    x = _block(ledger, f"stack/layers/{i}", block, x, None if form == "recurrent" else frames)
  if model.neuron is not None:
    ledger.norm("neuron/norm", model.neuron.norm)
  layers = {name: Operations(*(n * frames for n in one)) for name, one in ledger.layers.items()}
  layers["head"] = Operations(model.head.in_features * model.head.out_features, 0)
  macs, accumulates = (sum(column) for column in zip(*layers.values(), strict=True))
  neurons = [math.prod(m.rate.shape) for _, m in nnx.iter_graph(model) if isinstance(m, LIF)]
  return Energy(mac * macs + accumulate * accumulates, layers, frames * sum(neurons))


class _Ledger:
  """The operations of every layer in a frame. Inputs are given as spikes, `None` if real-valued."""

  def __init__(self, rates: Mapping[str, float] | float):
    self.layers: dict[str, Operations] = {}
    self._rates = rates

  def rate(self, name: str) -> float:
    if not isinstance(self._rates, Mapping):
      return self._rates
    if name not in self._rates:
      raise ValueError(f"rates has no {name}, expected those of spike_rates")
    return self._rates[name]

  def add(self, name: str, operations: float, spikes: float | None) -> None:
    macs, accumulates = self.layers.get(name, Operations(0, 0))
    real = spikes is None
    self.layers[name] = Operations(
      macs + operations if real else macs,
      accumulates if real else accumulates + spikes * operations,
    )

  def norm(self, name: str, norm: BatchNorm | None) -> None:
    if norm is not None:
      self.add(name, norm.features, None)

  def linear(self, name: str, layer: Linear | NormedLinear, *inputs: tuple[int, float | None]):
    """A layer of several inputs beside each other, each of a width."""
    if isinstance(layer, NormedLinear):
      self.norm(f"{name}/norm", layer.norm)
      layer, name = layer.linear, f"{name}/linear"
    for width, spikes in inputs:
      self.add(name, width * layer.out_features, spikes)

  def convolution(self, name: str, layer: Linear | FrequencyConv | NormedLinear, spikes):
    if isinstance(layer, NormedLinear):
      self.norm(f"{name}/norm", layer.norm)
      layer, name = layer.linear, f"{name}/linear"
    windows = halved(layer.bins) if isinstance(layer, FrequencyConv) else 1
    linear = layer.linear if isinstance(layer, FrequencyConv) else layer
    self.add(name, windows * linear.in_features * linear.out_features, spikes)


def _stem(ledger, stem):
  """The spikes of what comes out of it, as of all below."""
  x = None
  for i, conv in enumerate(stem.convs):
    ledger.convolution(f"stem/convs/{i}", conv, x)
    x = ledger.rate(f"stem/neurons/{i}") if i < len(stem.neurons) else None
  for i, norm in enumerate(stem.norms):
    ledger.norm(f"stem/norms/{i}", norm)
  ledger.linear("stem/position", stem.position, (TAPS * stem.d_model, x))
  if stem.variant != "spiking":
    return None
  return x + ledger.rate(f"stem/neurons/{len(stem.convs)}")


def _block(ledger, name, block, x, convolved):
  memory = _spiking_memory if isinstance(block.mixer, SpikingLMU) else _plain_memory
  x = memory(ledger, f"{name}/mixer", block.mixer, x, convolved)
  own, name = block.feed_forward, f"{name}/feed_forward"
  hidden = own.input.linear
  if isinstance(own, PlainFeedForward):
    ledger.linear(f"{name}/input", own.input, (hidden.in_features, None))
    ledger.linear(f"{name}/output", own.output, (hidden.out_features, None))
    return None
  seen = x
  if own.input_neuron is not None:
    ledger.norm(f"{name}/input_neuron/norm", own.input_neuron.norm)
    seen = ledger.rate(f"{name}/input_neuron/neuron")
  ledger.linear(f"{name}/input", own.input, (hidden.in_features, seen))
  spikes = ledger.rate(f"{name}/hidden_neuron")
  ledger.linear(f"{name}/output", own.output, (hidden.out_features, spikes))
  return None if own.output_neuron is None else x + ledger.rate(f"{name}/output_neuron")


def _plain_memory(ledger, name, mixer, x, convolved):
  lmu, d = mixer.lmu, mixer.lmu.d_model
  ledger.linear(f"{name}/lmu/input", lmu.input, (d, None))
  _remember(ledger, f"{name}/lmu/memory", lmu, None, convolved)
  ledger.linear(f"{name}/lmu/read", lmu.read, (lmu.channels * lmu.order, None))
  ledger.linear(f"{name}/lmu/skip", lmu.skip, (d, None))
  ledger.linear(f"{name}/output", mixer.output, (d, None))


def _spiking_memory(ledger, name, mixer, x, convolved):
  d, memory = mixer.d_model, mixer.channels * mixer.order
  seen = x
  if mixer.input_neuron is not None:
    ledger.norm(f"{name}/input_norm", mixer.input_norm)
    seen = ledger.rate(f"{name}/input_neuron")
  ledger.linear(f"{name}/input", mixer.input, (d, seen))
  _remember(ledger, f"{name}/memory", mixer, ledger.rate(f"{name}/write_neuron"), convolved)
  ledger.norm(f"{name}/memory_norm", mixer.memory_norm)
  read = ledger.rate(f"{name}/memory_neuron")
  ledger.linear(f"{name}/hidden", mixer.hidden, (memory, read), (d, seen))
  ledger.linear(f"{name}/output", mixer.output, (d, ledger.rate(f"{name}/hidden_neuron")))
  return None if mixer.output_neuron is None else x + ledger.rate(f"{name}/output_neuron")


def _remember(ledger, name, layer, spikes, convolved):
  """The memory, as a recurrence, or convolved with so many inputs."""
  size = layer.channels * layer.order
  if convolved is None:
    ledger.add(name, size * layer.order, None)
    ledger.add(name, size, spikes)
  else:
    ledger.add(name, size * (convolved + 1) / 2, spikes)
