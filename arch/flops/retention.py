"""The closed form of retention: `mixers/retention.py` and `kernels/retention/`, line by line."""

from triform.kernels.retention.xla import row_blocks

from ..mixers.retention import Retention
from .closed import BEFORE_0_11, count, fan_out, total
from .work import Call, Count, Work


@count.register
def _(layer: Retention, call: Call) -> Count:
  t, d = call.length, layer.query.in_features
  h, g, v = layer.num_heads, layer.num_kv_heads, layer.value_size
  projections = [layer.query, layer.key, layer.value, layer.gate]
  if layer.decay == "gated":
    projections.append(layer.decay_gate)
  scaled_keys = Count(*[Work(vector=t * g * layer.key_size)] * 2)
  gate = Count(Work(vector=2 * t * h * v, transcendental=t * h * v), Work(vector=8 * t * h * v))
  return (
    total([*projections, layer.output], call)
    + fan_out(len(projections), d, call)
    + rotation(t, h, layer.key_size)
    + rotation(t, g, layer.key_size)
    + scaled_keys
    + _decay(layer, t)
    + CORES[call.form](layer, call)
    + _head_norm(layer, t)
    + gate
  )


def rotation(t: int, heads: int, size: int) -> Count:
  """`kernels.rotate` of tokens `[t, heads, size]`."""
  return Count(
    Work(vector=3 * t * heads * size + t * size, transcendental=t * size),
    Work(vector=3.5 * t * heads * size),
  )


def _decay(layer: Retention, t: int) -> Count:
  h = layer.num_heads
  if layer.decay == "learned":
    return Count(Work(vector=h, transcendental=h), Work(vector=3 * h))
  if layer.decay == "gated":
    return Count(
      Work(vector=9 * t * h, transcendental=2 * t * h), Work(vector=5 * t * h, transcendental=t * h)
    )
  return Count()


def _head_norm(layer: Retention, t: int) -> Count:
  h, v = layer.num_heads, layer.value_size
  counted = Count(
    Work(vector=t * h * (3 * v + 2), transcendental=t * h), Work(vector=t * h * (7 * v + 5))
  )
  if layer.norm_weight is not None:
    counted += Count(Work(vector=t * h * v), Work(vector=3 * t * h * v + v))
  if layer.dialect == "torchscale" and layer.decay != "gated":
    counted += Count(Work(vector=3 * t * h + t, transcendental=t * h + h))
    if layer.decay == "learned":
      slopes = (t + 1) * h  # of `expm1`: `y + 1`, later `exp(x)`
      again = Work(vector=slopes) if BEFORE_0_11 else Work(transcendental=slopes)
      counted += Count(backward=Work(vector=9 * t * h + 5 * h) + again)
  return counted


def _weights(layer: Retention, pairs: float) -> Work:
  """Decays between pairs of tokens, for all heads: a difference, a product with the rate, `exp`."""
  h = layer.num_heads
  differences = h if layer.decay == "gated" else 1
  return Work(vector=(h + differences) * pairs, transcendental=h * pairs)


def _incoming(layer: Retention, tokens: float) -> Work:
  """Decays of the state before a run."""
  return Work(vector=1, transcendental=1) * (layer.num_heads * tokens)


def _running_sums(layer: Retention, tokens: float) -> Work:
  return Work(vector=layer.num_heads * tokens if layer.decay == "gated" else 0)


def _parallel(layer: Retention, call: Call) -> Count:
  t, h, g, k, v = call.length, *_sizes(layer)
  blocks = [(0, t)] if call.causal else row_blocks(t)
  pairs = t * (t + 1) / 2 if call.causal else sum((stop - start) * stop for start, stop in blocks)
  products = 2 * h * pairs * (k + v)
  forward = Work(mixing=products, vector=h * pairs)
  forward += _weights(layer, pairs) + _running_sums(layer, t)
  if not call.training:
    forward += _weights(layer, t) + Work(mixing=2 * t * h * k * v, vector=t * h * k)
  if call.context:
    read = Work(mixing=2 * t * h * k * v, vector=2 * h * v * (t + k))
    forward += _incoming(layer, t) + read
  joins = len(blocks) - 1
  backward = {
    "fixed": 2 * h * pairs,
    "learned": h * (7 * pairs + 2 * joins + 1),
    "gated": h * (9 * pairs + (3 + 2 * joins) * t + sum(stop for _, stop in blocks)),
  }[layer.decay] + joins * t * (h * k + g * (k + v))
  return Count(forward, Work(mixing=2 * products, vector=backward))


def _chunkwise(layer: Retention, call: Call) -> Count:
  t, h, g, k, v = call.length, *_sizes(layer)
  c = min(layer.chunk_size, t)
  chunks = t / c if call.causal else -(-t // c)
  tokens, pairs = chunks * c, chunks * c * ((c + 1) / 2 if call.causal else c)
  products = 2 * h * pairs * (k + v) + 4 * tokens * h * k * v
  # Without documents and padding, a decay per head is one table for all chunks.
  shared = layer.decay != "gated" and not call.training and t % c == 0
  tables = 1 / chunks if shared else 1
  forward = Work(mixing=products, vector=h * (pairs + chunks * 2 * k * v + tokens * (k + 2 * v)))
  forward += _weights(layer, tables * pairs) + _incoming(layer, tables * tokens)
  forward += _running_sums(layer, tokens)
  backward = tokens * (3 * h * (2 * k + v) - g * (k - v)) + 4 * chunks * h * k * v
  backward += {
    "fixed": 2 * h * (pairs - chunks * k * v - tokens * (k + v)),
    "learned": h * (8 * pairs + 6 * tokens + chunks + 2),
    "gated": h * (10 * (pairs + tokens) + chunks),
  }[layer.decay]
  return Count(forward, Work(mixing=2 * products, vector=backward))


def _recurrent(layer: Retention, call: Call) -> Count:
  t, h, _, k, v = call.length, *_sizes(layer)
  state = t * h * k * v
  # `k v^T` is a product of a token with a token, though the program has it elementwise.
  outer = Work(mixing=2 * state) if call.causal else Work(vector=2 * state)
  decays = h if call.training and layer.decay != "gated" else t * h
  forward = Work(mixing=2 * state, vector=state, transcendental=decays) + outer
  per_token = {"fixed": 0, "learned": 4, "gated": 2}[layer.decay]
  backward = Work(
    mixing=4 * state,
    vector=(3 if layer.decay == "fixed" else 5) * state + t * h * (2 * (k + v) + per_token),
  )
  return Count(forward, backward + outer * 2)


def _sizes(layer: Retention) -> tuple[int, ...]:
  return layer.num_heads, layer.num_kv_heads, layer.key_size, layer.value_size


CORES = {"parallel": _parallel, "chunkwise": _chunkwise, "recurrent": _recurrent}
