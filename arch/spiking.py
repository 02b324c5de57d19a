"""How often neurons spike, and what that is said to cost.

rates = spike_rates(model, frames)
print(energy(model, rates))
"""

import functools
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from .interface import Form, SequenceModule
from .layers.conv_stem import TAPS
from .layers.normed import NormedLinear
from .layers.spiking import LIF
from .mixers.spiking_lmu import SpikingLMU
from .models.lmuformer import LMUFormer
from .models.stack import Stack

MAC_PICOJOULES, ACCUMULATE_PICOJOULES = 4.6, 0.9  # 45 nm, 32-bit floating point, by convention


def spike_rates(
  model: SequenceModule,
  x: jax.Array,  # [b, t, ...]
  *,
  mask: jax.Array | None = None,  # bool[b, t]
  form: Form = "parallel",
) -> dict[str, float]:
  """Spikes per neuron and real token of every layer of neurons, in one call in evaluation mode.

  Names are paths, such as `stack/layers/0/mixer/write_neuron`. The model is left as it is.

  Warns:
    UserWarning: if nothing is written to a memory, because none of its input neurons spikes.

  Raises:
    ValueError: for a model without spiking neurons.
  """
  measured = nnx.clone(model)
  for _, module in nnx.iter_graph(measured):
    if isinstance(module, LIF | Stack):
      module.measuring = True
  graphdef, variables = nnx.split(measured)

  @jax.jit
  def call(variables, x, mask):
    model = nnx.merge(graphdef, variables)
    model(x, form=form, mask=mask)
    return nnx.state(model, nnx.BatchStat)

  nnx.update(measured, call(variables, x, mask))
  rates = {}
  for path, module in nnx.iter_graph(measured):
    if isinstance(module, LIF):
      layers = np.asarray(module.rate[...])
      for name, layer in _by_layer("/".join(map(str, path)), layers):
        rates[name] = float(layer.mean())
  if not rates:
    raise ValueError(f"{type(model).__name__} has no spiking neurons")
  for name, rate in rates.items():
    if name.endswith("/write_neuron") and rate == 0:
      warnings.warn(
        f"{name} never spikes, so nothing is written to its memory: the block sees single frames, "
        "and W_u learns by the surrogate's tail alone. Another seed, more memory_channels, or a "
        "wider surrogate may wake it.",
        stacklevel=2,
      )
  return rates


def _by_layer(name: str, rate: np.ndarray):
  """A scanned stack has the rates of all its layers in one array."""
  if rate.ndim == 1:
    return [(name, rate)]
  return [(name.replace("layers/", f"layers/{i}/", 1), layer) for i, layer in enumerate(rate)]


class Energy(NamedTuple):
  """Operations a frame, and what they are said to take."""

  macs: float  # multiplications by numbers that are no spikes, with an addition each
  accumulates: float  # additions of a weight for every spike
  updates: float  # of potentials, one multiplication and addition a neuron; in no sum
  picojoules: float


def energy(model: LMUFormer, rates: Mapping[str, float] | None = None) -> Energy:
  """Energy of a frame by the convention that spiking networks are published with.

      4.6 pJ * multiply-accumulates + 0.9 pJ * sum over layers of (rate of the inputs * weights)

  The constants are those of arithmetic in a 45 nm process, whatever the model runs on; memory
  traffic, which costs more, is in neither. Included: all linear layers and convolutions, the
  Legendre memory as a recurrence (n^2 multiply-accumulates a channel, its state being real), batch
  norms that are not folded (one multiply-accumulate a feature), and the head for every frame, as
  published. Not included: updates of potentials, additions of residuals, activations.

  Args:
    model: an LMUFormer; the plain one has no spikes.
    rates: of `spike_rates`, for a spiking one.

  Raises:
    ValueError: for another model, or rates that are not those of its neurons.
  """
  if not isinstance(model, LMUFormer):
    raise ValueError(f"model is a {type(model).__name__}, expected LMUFormer")
  count = _Count({} if rates is None else dict(rates))
  stream = _count_stem(count, model)
  for i in range(model.stack.num_layers):
    stream = _count_block(count, model, i, stream)
  if model.neuron is not None:
    count.norm(model.d_model)
    stream = count.spikes("neuron", "neuron", model.d_model)
  count.linear(model.head.in_features, model.head.out_features, stream)
  if count.rates:
    raise ValueError(f"rates has {', '.join(sorted(count.rates))}, which the model has not")
  picojoules = MAC_PICOJOULES * count.macs + ACCUMULATE_PICOJOULES * count.accumulates
  return Energy(count.macs, count.accumulates, count.updates, picojoules)


class _Count:
  """Sums over a model. A `rate` is spikes a number, or `None` for numbers that are no spikes."""

  def __init__(self, rates: dict[str, float]):
    self.rates = rates
    self.macs = self.accumulates = self.updates = 0.0

  def linear(self, inputs: int, outputs: int, rate: float | None) -> None:
    if rate is None:
      self.macs += inputs * outputs
    else:
      self.accumulates += rate * inputs * outputs

  def norm(self, features: int) -> None:
    self.macs += features

  def layer(self, layer: nnx.Module, inputs: int, rate: float | None) -> None:
    linear = layer.linear if isinstance(layer, NormedLinear) else layer
    self.linear(inputs, linear.out_features, rate)
    if isinstance(layer, NormedLinear) and layer.norm is not None:
      self.norm(linear.out_features)

  def spikes(self, place: str, name: str | int, neurons: int) -> float:
    """The rate of a layer of neurons, which is used once."""
    name = f"{place}/{name}"
    if name not in self.rates:
      raise ValueError(f"rates lacks {name}")
    self.updates += neurons
    return self.rates.pop(name)


def _count_stem(count: _Count, model: LMUFormer) -> float | None:
  """The rate of the residual stream: of the variant "spiking" it is a sum of spikes."""
  stem, d, rate = model.stem, model.d_model, None
  for i, layer in enumerate(stem.convs):
    count.layer(layer, TAPS * (d if i else stem.in_features), rate)
    if stem.variant == "plain":
      count.norm(d)
    elif isinstance(layer, NormedLinear) or stem.variant == "spiking":
      rate = count.spikes("stem/neurons", i, d)
  residual = rate
  if stem.variant == "spiking_ms":
    count.norm(d)
    rate, residual = count.spikes("stem/neurons", len(stem.convs) - 1, d), None
  count.layer(stem.position, TAPS * d, rate)
  if stem.variant == "spiking":
    return residual + count.spikes("stem/neurons", len(stem.convs), d)
  return None


def _count_block(count: _Count, model: LMUFormer, i: int, stream: float | None) -> float | None:
  d, name = model.d_model, f"stack/layers/{i}"
  block = model.stack.layers if model.stack.scan else model.stack.layers[i]
  mixer, ffn = block.mixer, block.feed_forward
  hidden = ffn.input.linear.out_features
  if not isinstance(mixer, SpikingLMU):
    lmu = mixer.lmu
    count.layer(lmu.input, d, None)
    count.macs += lmu.channels * lmu.order * (lmu.order + 1)
    count.linear(lmu.channels * lmu.order + d, d, None)
    for layer, inputs in ((mixer.output, d), (ffn.input, d), (ffn.output, hidden)):
      count.layer(layer, inputs, None)
    return None
  spikes = functools.partial(count.spikes, f"{name}/mixer")
  memory, x = mixer.channels * mixer.order, stream
  if mixer.input_neuron is not None:
    count.norm(d)
    x = spikes("input_neuron", d)
  count.layer(mixer.input, d, x)
  written = spikes("write_neuron", mixer.channels)
  count.macs += mixer.channels * mixer.order**2
  count.accumulates += written * memory
  count.norm(memory)
  read = spikes("memory_neuron", memory)
  count.linear(memory, d, read)
  count.layer(mixer.hidden, d, x)
  count.layer(mixer.output, d, spikes("hidden_neuron", d))
  if mixer.output_neuron is not None:
    stream += spikes("output_neuron", d)
  spikes = functools.partial(count.spikes, f"{name}/feed_forward")
  x = stream
  if ffn.input_neuron is not None:
    count.norm(d)
    x = spikes("input_neuron/neuron", d)
  count.layer(ffn.input, d, x)
  count.layer(ffn.output, hidden, spikes("hidden_neuron", hidden))
  if ffn.output_neuron is not None:
    stream += spikes("output_neuron", d)
  return stream
