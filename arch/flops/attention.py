"""The closed form of attention: `mixers/attention.py` and `kernels/attention/`, line by line.

It is that of JAX's own attention in plain XLA; a kernel computes fewer pairs.
"""

from ..layers.depthwise_conv import DepthwiseConv
from ..mixers.attention import MAX_DISTANCE, Attention, MultiDConvHeadAttention, RelativeBias
from .closed import BEFORE_0_11, count, fan_out, total
from .retention import rotation
from .work import Call, Count, Work

DISTANCES = MAX_DISTANCE + 1


@count.register
def _(layer: Attention, call: Call) -> Count:
  projections = (layer.query, layer.key, layer.value)
  read = fan_out(len(projections), layer.key.in_features, call)
  return total(projections, call) + read + _attend(layer, call)


@count.register
def _(layer: MultiDConvHeadAttention, call: Call) -> Count:
  t, d = call.length, layer.key.in_features
  convs = layer._convs()
  counted = total([layer.query, layer.key, layer.value, *convs.values()], call)
  counted += fan_out(len(convs), d, call)
  if layer.shared_qk:
    counted += fan_out(2, layer.key.out_features, call)
  if layer.input_floor is not None:
    counted += Count(Work(vector=t * d), Work(vector=(1 + BEFORE_0_11) * t * d))
  if layer.conv_scale != 1:
    width = sum(conv.features for conv in convs.values())
    counted += Count(Work(vector=t * width), Work(vector=t * width))
  return counted + _attend(layer, call)


@count.register
def _(layer: DepthwiseConv, call: Call) -> Count:
  t, d, taps = call.length, layer.features, layer.num_taps
  if call.causal:
    needed = Work(convolution=(2 * taps - 1) * t * d)
    return Count(needed, needed * 2)
  # The program adds to zeros, and takes inputs from where padding leaves them.
  backward = 5 * taps * t * d + (2 * taps * (taps - 1) + 1) * d
  return Count(Work(convolution=2 * taps * t * d), Work(convolution=backward))


@count.register
def _(layer: RelativeBias, call: Call) -> Count:
  return Count(backward=Work(vector=layer.relative_bias.shape[-2] * DISTANCES))


def _attend(layer: Attention, call: Call) -> Count:
  """Positions, attention, and the projection of what it gives."""
  t, h, g, k = call.length, layer.num_heads, layer.num_kv_heads, layer.key_size
  counted = count(layer.output, call) + _core(layer, call)
  if layer.position == "rotary":
    counted += rotation(t, h, k) + rotation(t, g, k)
  return counted if layer.bias is None else counted + count(layer.bias, call)


def _core(layer: Attention, call: Call) -> Count:
  t, h, g, k = call.length, layer.num_heads, layer.num_kv_heads, layer.key_size
  queries, keys, chunks = _extent(layer, call)
  pairs = _causal_pairs(layer, call) if call.causal else queries * keys
  bias, tanh = layer.position == "relative", layer.tanh
  weigh = Work(
    mixing=2 * h * k * pairs,
    vector=h * ((5 + bias) * pairs + queries),
    transcendental=(1 + tanh) * h * pairs,
  )
  product = Work(mixing=2 * h * k * pairs)
  slopes = 7 + bias + (3 + BEFORE_0_11) * tanh
  backward = product * 4 + Work(vector=h * (slopes * pairs + 3 * queries))
  if layer.window is not None and call.form != "recurrent":  # padding is moved to the end
    backward += Work(vector=2 * t * k * (h + g))
  if call.form != "parallel":  # the gradients of keys and bias are summed over steps
    summed = keys
    if layer.window is not None and call.form == "chunkwise":
      summed = layer.window + queries  # with the parts that a chunk does not see
    backward += Work(vector=chunks * (2 * g * k * summed + bias * h * DISTANCES))
  if call.form == "recurrent":
    backward += Work(vector=t * k * (h + 2 * g))
  again = weigh if call.form == "chunkwise" and call.training and not call.causal else Work()
  return Count(weigh + product, backward, again)


def _extent(layer: Attention, call: Call) -> tuple[int, int, int]:
  """Queries with padding, the keys that one is multiplied with, and steps of a loop."""
  t, window = call.length, layer.window
  held = window or (call.context + t if call.context else max(layer.max_len, t))
  if call.form == "recurrent":
    return t, held, t
  before = held if call.context else 0
  if call.form == "parallel":
    return t, t + before, 1
  c = min(layer.chunk_size, t)
  chunks = -(-t // c)
  return chunks * c, t + before if window is None else window + c, chunks


def _causal_pairs(layer: Attention, call: Call) -> float:
  """Keys in sight, over all queries."""
  first, last = call.context + 1, call.context + call.length
  inside = min(layer.window or last, last)
  growing = max(inside - first + 1, 0)
  return growing * (first + inside) / 2 + (call.length - growing) * inside
