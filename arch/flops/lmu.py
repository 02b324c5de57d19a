"""The closed forms of Legendre memories: `mixers/lmu.py`, `kernels/lmu/`, line by line.

What causality leaves is of the algorithm that the form takes here: pairs of tokens where a
convolution is a product of matrices, all of it where it is an FFT. Weights are then used once for a
token, also where the program folds them into the response. Tables of a learned theta, which are
made once for a batch and not for every token, are left out; what their gradients take of every
token is not.
"""

import scipy.fft

from triform.kernels.lmu.api import fastest_method, folds

from ..mixers.lmu import LMU
from ..mixers.spiking_lmu import SpikingLMU
from ..models.lmu import LMUClassifier
from .closed import (
  ACTIVATIONS,
  BEFORE_0_11,
  count,
  dropped,
  each,
  fan_out,
  of_one,
  without_input_gradient,
)
from .walk import fft_flops
from .work import Call, Count, Work

LMU_ACTIVATIONS = {
  **ACTIVATIONS,
  "linear": ((0, 0), (0, 0)),
  "tanh": ((0, 1), (3 + BEFORE_0_11, 0)),
}


@count.register
def _(layer: LMU, call: Call) -> Count:
  if layer.output_feedback is not None or layer.memory_feedback is not None:
    return _with_feedback(layer, call)
  t, d, n = call.length, layer.channels, layer.order
  counted = count(layer.input, call)
  counted += each(LMU_ACTIVATIONS, layer.input_activation, t * d, layer.dtype)
  if layer.input_to_hidden:
    counted += fan_out(2, layer.d_model, call)
  if layer.read is None:
    if layer.cell is not None:
      counted += count(layer.cell, call)
    return counted + remembered(layer, call)
  out = layer.read.out_features
  counted += sum((_read(layer, piece) for piece in _pieces_of(call)), Count())
  if call.training and call.ahead:
    counted += _handed_over(layer, call, _folds(layer, _pieces_of(call)[0]))
    counted += Count(backward=Work(vector=d * n * out))
  if layer.read.bias is not None:
    counted += Count(Work(vector=t * out), Work(vector=(t + 1) * out))
  if layer.skip is not None:
    counted += count(layer.skip, call) + Count(Work(vector=t * out))
  return counted + each(LMU_ACTIVATIONS, layer.hidden_activation, t * out, layer.dtype)


@count.register
def _(model: LMUClassifier, call: Call) -> Count:
  """Without a loss: what the gradients of given logits take. Only the last memory is read."""
  call = call._replace(packed=False)
  layer, t = model.lmu, call.length
  d, n, out = layer.channels, layer.order, model.head.in_features
  counted = without_input_gradient(layer.input, call)
  counted += each(LMU_ACTIVATIONS, layer.input_activation, t * d, layer.dtype)
  if _folds(layer, call) or (call.causal and call.form == "parallel"):
    memory = Work(mixing=2 * t * d * n + (2 * d * n * n if call.context else 0))
    counted += Count(memory, memory * _gradients(layer) + Work(vector=t * d))
  else:
    taken = -t if call.form == "recurrent" else 1  # a sum of gradients less, or one row of many
    counted += _memory(layer, call) + Count(backward=Work(vector=taken * d * n))
  counted += _moved(layer, 0, call)
  counted += of_one(layer.read) + without_input_gradient(layer.skip, call._replace(length=1))
  counted += Count(Work(vector=out))
  counted += each(LMU_ACTIVATIONS, layer.hidden_activation, out, layer.dtype)
  counted += dropped(model.dropout, out, call)
  return counted + of_one(model.head, "logits")


def _with_feedback(layer: LMU, call: Call) -> Count:
  """One token after another: the gradients of all weights are summed over steps."""
  if call.form != "recurrent":
    raise NotImplementedError(
      f"form is {call.form!r}, but an LMU with feedback has no other than recurrent"
    )
  t, d, n = call.length, layer.channels, layer.order
  layers = (layer.input, layer.output_feedback, layer.memory_feedback, layer.read, layer.skip)
  counted = _memory(layer, call) + Count(backward=Work(vector=t * d))
  for one in filter(None, layers):
    weights = t * one.in_features * one.out_features
    bias = Work(vector=0 if one.bias is None else t * one.out_features)
    summed = Work(vector=weights)
    counted += Count(Work(matmul=2 * weights) + bias, Work(matmul=4 * weights) + summed + bias)
  counted += each(LMU_ACTIVATIONS, layer.input_activation, t * d, layer.dtype)
  if layer.cell is not None:
    counted += count(layer.cell, call)
  if layer.read is not None:
    out = t * layer.read.out_features
    counted += each(LMU_ACTIVATIONS, layer.hidden_activation, out, layer.dtype)
    if layer.output_feedback is not None:
      counted += Count(Work(vector=t * d), Work(vector=2 * out))
    if layer.skip is not None:
      counted += Count(Work(vector=out))
  if layer.input_to_hidden:
    counted += fan_out(2, layer.d_model, call)
  if layer.memory_feedback is not None:
    counted += Count(Work(vector=t * d), Work(vector=t * d * n))
  return counted


def _pieces_of(call: Call) -> list[Call]:
  """What the state keeps, and the tokens that are answered ahead."""
  if not call.ahead:
    return [call]
  kept = call.length - call.ahead
  rest = call._replace(length=call.ahead, context=call.context + kept, ahead=0)
  return [call._replace(length=kept), rest]


def _read(layer: LMU, call: Call) -> Count:
  """What is read of the memory of every token."""
  t, d, n, out = call.length, layer.channels, layer.order, layer.read.out_features
  moved = _moved(layer, out, call)
  if _folds(layer, call):
    return _folded(layer, call) + moved
  read = Work(matmul=2 * t * d * n * out)
  return _memory(layer, call) + Count(read, read * 2) + moved


def remembered(layer: LMU | SpikingLMU, call: Call) -> Count:
  """The memory of every token, which is not only read."""
  width = layer.channels * layer.order
  pieces = (_memory(layer, piece) + _moved(layer, width, piece) for piece in _pieces_of(call))
  counted = sum(pieces, Count())
  if call.training and call.ahead:
    counted += _handed_over(layer, call, folds=False)
  return counted


def _handed_over(layer: LMU | SpikingLMU, call: Call, folds: bool) -> Count:
  """In training, the memory before the tokens ahead, and the gradients of two pieces."""
  t, d, n = call.length - call.ahead, layer.channels, layer.order
  pieces = Count(backward=Work(vector=call.length * d))
  if folds:
    last = Work(mixing=2 * t * d * n)
    return pieces + Count(last, last * _gradients(layer) + Work(vector=2 * t * d))
  return pieces + Count(backward=Work(vector=0 if call.form == "recurrent" else (t + 1) * d * n))


def _gradients(layer: LMU | SpikingLMU) -> int:
  """Of a product of inputs with a table: that of a learned theta has one too."""
  return 1 if getattr(layer, "log_theta", None) is None else 2


def _moved(layer: LMU | SpikingLMU, width: int, call: Call) -> Count:
  """The gradient of putting padding aside, of the memory's inputs and of `width` outputs."""
  return Count(backward=Work(vector=call.length * (layer.channels + width) if call.training else 0))


def _folds(layer: LMU, call: Call) -> bool:
  """Whether the program never makes the memory, see `kernels.lmu`."""
  if call.causal or call.form != "parallel" or call.context or (call.training and call.packed):
    return False
  t, d, n, out = call.length, layer.channels, layer.order, layer.read.out_features
  return folds(1, t, d, n, out, fastest_method(t))


def spared_convolution(layer: LMU, call: Call) -> Work:
  """Of a product with weights that is folded into a convolution, what is not computed again."""
  t, d, out = call.length - call.ahead, layer.channels, layer.read.out_features
  if not _folds(layer, call._replace(length=t)):
    return Work()
  if fastest_method(t) == "gemm":
    return Work(mixing=2 * t * t * d * out)
  length, frequencies = _transformed(t)
  return Work(mixing=out * fft_flops(length, real=True) + 8 * frequencies * d * out)


def _folded(layer: LMU, call: Call) -> Count:
  """A convolution with what is read of the response, which the rows of a batch would share."""
  t, d, n, out = call.length, layer.channels, layer.order, layer.read.out_features
  response = Work(mixing=2 * t * d * n * out)
  counted = Count(response, response * _gradients(layer))
  if not call.training:
    counted += Count(Work(mixing=2 * t * d * n))  # the state
  if fastest_method(t) == "gemm":
    product = Work(mixing=2 * t * t * d * out)
    return counted + Count(product, product * 2 + Work(vector=2 * t * t * d + 5 * t * d))
  length, frequencies = _transformed(t)
  transforms = Work(mixing=(d + d * out + out) * fft_flops(length, real=True))
  product = Work(mixing=8 * frequencies * d * out)
  scaled = 6 * frequencies * (1 + out) + (6 * frequencies + length) * d * (1 + out)
  return counted + Count(transforms + product, transforms + product * 2 + Work(vector=scaled))


def _memory(layer: LMU | SpikingLMU, call: Call) -> Count:
  """The memory of every token."""
  t, d, n = call.length, layer.channels, layer.order
  if call.form == "recurrent":
    states = t * d * n
    product = Work(mixing=2 * states * n)
    # `Bbar u` is a product of a token, though the program has it elementwise.
    outer = Work(mixing=2 * states) if call.causal else Work(vector=2 * states)
    backward = product * _gradients(layer) + outer + Work(vector=2 * states + t * d)
    return Count(product + outer, backward)
  if call.form == "chunkwise":
    return _pieces(layer, call, layer.chunk_size)
  if fastest_method(t) == "gemm":
    return _pieces(layer, call, layer.chunk_size if call.context else t)
  if call.training and call.packed:
    return _pieces(layer, call, layer.chunk_size)
  length, frequencies = _transformed(t)
  transform = fft_flops(length, real=True)
  products = 6 * frequencies * d * n
  scaled = 6 * frequencies * (1 + d) + length * d
  counted = Count(
    Work(mixing=(d + n + d * n) * transform, vector=products),
    Work(
      mixing=(d + d * n) * transform * _gradients(layer),
      vector=scaled + 2 * frequencies * d * (1 + n) + 2 * products,
    ),
  )
  if call.context:
    counted += _pieces(layer, call, layer.chunk_size) + Count(Work(vector=t * d * n))
  return counted


def _pieces(layer: LMU | SpikingLMU, call: Call, chunk_size: int) -> Count:
  """Products within chunks, and of the state before each."""
  t, d, n = call.length, layer.channels, layer.order
  c = min(chunk_size, t)
  chunks = t / c if call.causal else -(-t // c)
  tokens = chunks * c
  product = Work(mixing=2 * tokens * d * n * ((c + 1) / 2 if call.causal else c))
  forward, backward = product, product * _gradients(layer)
  backward += Work(vector=2 * tokens * d * (c + 2))
  if c < t or call.context:
    carried = Work(mixing=2 * (tokens + chunks) * d * n * n, vector=(tokens + chunks) * d * n)
    forward += carried
    backward += carried + Work(mixing=carried.mixing * (_gradients(layer) - 1))
  return Count(forward, backward)


def _transformed(t: int) -> tuple[int, int]:
  """Length of the transforms of a convolution, and frequencies of real numbers."""
  length = scipy.fft.next_fast_len(2 * t - 1, real=True)
  return length, length // 2 + 1
