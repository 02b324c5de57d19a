"""The closed forms of LMUFormer's layers, plain and spiking, line by line.

What running averages of statistics and spike rates take is not in them, and spikes count as any
other numbers: products with them are multiply-adds. See `arch.spiking` for what is left if they are
not.
"""

from ..layers.batch_norm import BatchNorm
from ..layers.conv_stem import ConvStem
from ..layers.frequency_conv import FrequencyConv, halved
from ..layers.linear import Linear
from ..layers.normed import NormedLinear
from ..layers.spiking import LIF
from ..mixers.spiking_lmu import SpikingLMU
from ..models.lmuformer import (
  LMUFormerBlock,
  NormedLMU,
  NormedNeuron,
  PlainFeedForward,
  SpikingFeedForward,
)
from .closed import (
  ACTIVATIONS,
  count,
  dropped,
  each,
  fan_out,
  spared,
  total,
)
from .lmu import remembered, spared_convolution
from .work import Call, Count, Work

# Operations for every element of what stands for the derivative of a spike: vector, transcendental.
SURROGATES = {"atan": (6, 0), "sigmoid": (8, 1), "triangle": (7, 0)}


@count.register
def _(layer: BatchNorm, call: Call) -> Count:
  t, d = call.length, layer.features
  if not call.training:
    return Count(Work(vector=3 * t * d + 2 * d, transcendental=d))
  forward = Work(vector=7 * t * d + 4 * d + 2, transcendental=d)
  return Count(forward, Work(vector=12 * t * d + 13 * d))


@count.register
def _(layer: NormedLinear, call: Call) -> Count:
  return total(filter(None, (layer.linear, layer.norm)), call)


@count.register
def _(layer: LIF, call: Call) -> Count:
  size, soft = call.length * layer.features, layer.reset_value is None
  slope, transcendental = SURROGATES[layer.surrogate]
  backward = 5 - soft + slope
  if not layer.detach_reset:
    backward += 3 if soft else 5
  counted = Count(
    Work(vector=(7 if soft else 9) * size),
    Work(vector=backward * size, transcendental=transcendental * size),
  )
  if call.ahead:  # gradients of two pieces
    counted += Count(backward=Work(vector=size))
  if layer.tau_logit is not None:
    pieces = 2 if call.ahead else 1
    tau = Count(Work(vector=2, transcendental=1), Work(vector=2 * layer.features + 3))
    counted += tau * pieces + Count(backward=Work(vector=4 * size - 1))
  return counted


@count.register
def _(layer: NormedNeuron, call: Call) -> Count:
  return total((layer.norm, layer.neuron), call)


@count.register
def _(layer: FrequencyConv, call: Call) -> Count:
  """A linear layer of every window; the gradients by its bins are summed over all bins."""
  counted = count(layer.linear, call._replace(length=call.length * halved(layer.bins)))
  padded = (layer.bins + 2 * (layer.width // 2)) * layer.in_features // layer.bins
  return counted + Count(backward=Work(vector=(layer.width - 1) * padded * call.length))


@count.register
def _(stem: ConvStem, call: Call) -> Count:
  """Of given inputs, which have no gradient."""
  t, d = call.length, stem.d_model
  counted = total((*stem.norms, *stem.neurons), call) + Count(Work(vector=t * d))
  for i, layer in enumerate((*stem.convs, stem.position)):
    linear = layer
    if isinstance(layer, NormedLinear):
      linear = layer.linear
      if layer.norm is not None:
        counted += count(layer.norm, call)
    counted += _convolution(linear, call, given=i == 0)
  if stem.variant == "plain":
    counted += Count(Work(vector=t * sum(stem.widths[1:])))
  # Gradients of shifted inputs, and of the residual, which waits for what is ahead.
  shifted = sum(6 * t * width + 4 * width for width in stem.widths[1:])
  residual = 3 * t * d if call.ahead else t * d
  return counted + Count(backward=Work(vector=shifted + residual))


def _convolution(layer: Linear | FrequencyConv, call: Call, given: bool) -> Count:
  counted = count(layer, call)
  if given:
    counted = Count(counted.forward, Work(matmul=counted.forward.matmul))
  return Count(*(Work(convolution=w.matmul + w.vector) for w in counted.values()))


@count.register
def _(layer: NormedLMU, call: Call) -> Count:
  return total((layer.lmu, layer.output), call)


@count.register
def _(layer: SpikingLMU, call: Call) -> Count:
  layers = (
    *(layer.input_norm, layer.input_neuron, layer.input, layer.write_neuron, layer.memory_norm),
    *(layer.memory_neuron, layer.hidden, layer.hidden_neuron, layer.output, layer.output_neuron),
  )
  return (
    total(filter(None, layers), call) + remembered(layer, call) + fan_out(2, layer.d_model, call)
  )


@count.register
def _(layer: PlainFeedForward, call: Call) -> Count:
  t, linear = call.length, layer.input.linear
  counted = total((layer.input, layer.output), call)
  counted += each(ACTIVATIONS, "gelu", t * linear.out_features, linear.dtype)
  return counted + each(ACTIVATIONS, "relu", t * linear.in_features, linear.dtype)


@count.register
def _(layer: SpikingFeedForward, call: Call) -> Count:
  layers = (
    *(layer.input_neuron, layer.input, layer.hidden_neuron, layer.output),
    layer.output_neuron,
  )
  return total(filter(None, layers), call)


@count.register
def _(block: LMUFormerBlock, call: Call) -> Count:
  d = block.feed_forward.input.linear.in_features
  size = call.length * d
  counted = Count(Work(vector=2 * size), Work(vector=2 * size))
  counted += dropped(block.dropout, size, call) * 2
  return counted + total((block.mixer, block.feed_forward), call)


@spared.register
def _(block: LMUFormerBlock, remat: str, call: Call) -> Work:
  size = call.length * block.feed_forward.input.linear.in_features
  kept = Work(vector=size)  # the last addition, and what comes before it
  if block.dropout.rate:
    kept += Work(vector=size)
  if isinstance(block.feed_forward, PlainFeedForward):
    kept += Work(vector=size)
  elif block.feed_forward.output_neuron is None:
    kept += count(block.feed_forward.output, call).forward
  if remat == "dots":
    kept += Work(matmul=count(block, call).forward.matmul - kept.matmul)
    if isinstance(block.mixer, NormedLMU):
      kept += spared_convolution(block.mixer.lmu, call)
  return kept
