"""The closed forms of Legendre memories: `mixers/lmu.py`, `kernels/lmu/`, line by line.

What causality leaves is of the form's own algorithm: pairs of tokens where a convolution is a
product of matrices, all of it where it is an FFT. Tables of a learned theta, which are made once
for a batch and not for every token, are left out; what their gradients take of every token is not.
"""

import scipy.fft

from triform.kernels.lmu.api import fastest_method, folds

from ..layers.linear import Linear
from ..mixers.lmu import LMU
from ..models.lmu import LMUClassifier
from .closed import ACTIVATIONS, BEFORE_0_11, count, each, fan_out, without_input_gradient
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
    return counted + _memory(layer, call) + _moved(layer, d * n, call)
  out = layer.read.out_features
  if _folds(layer, call):
    counted += _folded(layer, call)
  else:
    read = Work(matmul=2 * t * d * n * out)
    counted += _memory(layer, call) + Count(read, read * 2)
  counted += _moved(layer, out, call)
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
  if _folds(layer, call):
    memory = Work(mixing=2 * t * d * n)
    counted += Count(memory, memory * _gradients(layer) + Work(vector=t * d))
  else:
    taken = -t if call.form == "recurrent" else 1  # a sum of gradients less, or one row of many
    counted += _memory(layer, call) + Count(backward=Work(vector=taken * d * n))
  counted += _moved(layer, 0, call)
  counted += _of_one(layer.read) + without_input_gradient(layer.skip, call._replace(length=1))
  counted += Count(Work(vector=out))
  counted += each(LMU_ACTIVATIONS, layer.hidden_activation, out, layer.dtype)
  return counted + _of_one(model.head, "logits")


def _of_one(layer: Linear, kind: str = "matmul") -> Count:
  """Of one vector, so that the gradient of the bias is no sum."""
  product = Work(**{kind: 2 * layer.in_features * layer.out_features})
  bias = Work(vector=0 if layer.bias is None else layer.out_features)
  return Count(product + bias, product * 2)


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


def _gradients(layer: LMU) -> int:
  """Of a product of inputs with a table."""
  return 1 if layer.log_theta is None else 2


def _moved(layer: LMU, width: int, call: Call) -> Count:
  """The gradient of putting padding aside, of the memory's inputs and of `width` outputs."""
  return Count(backward=Work(vector=call.length * (layer.channels + width) if call.training else 0))


def _folds(layer: LMU, call: Call) -> bool:
  """Whether the memory is never made, see `kernels.lmu`."""
  if call.form != "parallel" or call.context or (call.training and call.packed):
    return False
  t, d, n, out = call.length, layer.channels, layer.order, layer.read.out_features
  return folds(1, t, d, n, out, fastest_method(t))


def _folded(layer: LMU, call: Call) -> Count:
  """A convolution with what is read of the response."""
  t, d, n, out = call.length, layer.channels, layer.order, layer.read.out_features
  response = Work(mixing=2 * t * d * n * out)
  counted = Count(response, response * _gradients(layer))
  if not call.training:
    counted += Count(Work(mixing=2 * t * d * n))  # the state
  if fastest_method(t) == "gemm":
    product = Work(mixing=2 * d * out * (t * (t + 1) / 2 if call.causal else t * t))
    return counted + Count(product, product * 2 + Work(vector=2 * t * t * d + 5 * t * d))
  length, frequencies = _transformed(t)
  transforms = Work(mixing=(d + d * out + out) * fft_flops(length, real=True))
  product = Work(mixing=8 * frequencies * d * out)
  scaled = 6 * frequencies * (1 + out) + (6 * frequencies + length) * d * (1 + out)
  return counted + Count(transforms + product, transforms + product * 2 + Work(vector=scaled))


def _memory(layer: LMU, call: Call) -> Count:
  """The memory of every token."""
  t, d, n = call.length, layer.channels, layer.order
  if call.form == "recurrent":
    states = t * d * n
    product = Work(mixing=2 * states * n)
    return Count(
      product + Work(vector=2 * states),
      product * _gradients(layer) + Work(vector=4 * states + t * d),
    )
  if call.form == "chunkwise":
    return _pieces(layer, call, layer.chunk_size)
  if fastest_method(t) == "gemm":
    return _pieces(layer, call, t)
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


def _pieces(layer: LMU, call: Call, chunk_size: int) -> Count:
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
