"""The closed forms of Legendre memories: `mixers/lmu.py`, `kernels/lmu/`, line by line.

What causality leaves is of the form's own algorithm: pairs of tokens in a convolution that is a
product, all of one that is an FFT. Tables of a learned theta are made once for a batch, not for
every token, and are left out; what their gradient takes of every token is not.
"""

from triform.kernels.lmu.api import fastest_method, folds

from ..mixers.lmu import LMU
from ..models.lmu import LMUClassifier
from .closed import count
from .work import Call, Count, Work


@count.register
def _(layer: LMU, call: Call) -> Count:
  t, d, n = call.length, layer.channels, layer.order
  counted = count(layer.input, call) + _memory(layer, call)
  if layer.read is not None:
    out = layer.read.out_features
    flops = 2 * t * d * n * out
    counted += Count(Work(matmul=flops), Work(matmul=2 * flops))
    if layer.skip is not None:
      counted += count(layer.skip, call)
  return counted


@count.register
def _(model: LMUClassifier, call: Call) -> Count:
  """Without a loss: what the gradients of given logits take. Inputs have no gradient."""
  t, d, n, i = call.length, model.lmu.channels, model.lmu.order, model.lmu.d_model
  hidden, classes = model.head.in_features, model.head.out_features
  flops = 2 * t * i * d
  counted = Count(Work(matmul=flops), Work(matmul=flops))
  if call.form == "parallel" and folds(1, t, d, n, hidden, fastest_method(t)):
    memory = Work(mixing=2 * t * d * n)
    counted += Count(memory, memory * (2 if model.lmu.log_theta is not None else 1))
  else:
    counted += _memory(model.lmu, call)
  read, skip, head = 2 * d * n * hidden, 2 * i * hidden, 2 * hidden * classes
  return counted + Count(Work(logits=read + skip + head), Work(logits=2 * read + skip + 2 * head))


def _memory(layer: LMU, call: Call) -> Count:
  t, d, n = call.length, layer.channels, layer.order
  if call.form == "recurrent":
    products = 2 * t * d * n * n
  else:
    c = min(t if call.form == "parallel" else layer.chunk_size, t)
    products = 2 * d * n * t * (c + 1) / 2
    if c < t or call.context:
      products += 2 * t * d * n * n
  memory = Work(mixing=products)
  return Count(memory, memory * (2 if layer.log_theta is not None else 1))
