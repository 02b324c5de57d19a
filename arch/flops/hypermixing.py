"""The closed forms of HyperMixing: `mixers/hypermixing.py`, `kernels/hypermixing/`, line by line.

What causality leaves is the same in every form: a token's product is added to the state, the state
is read, and either has two gradients.
"""

import jax
from flax import nnx

from ..interface import state_dtype
from ..layers.hypernetwork import HeadLinear, Hypernetwork
from ..mixers.hypermixing import CausalHyperMixing, HyperMixing
from .closed import ACTIVATIONS, BEFORE_0_11, count, each, fan_out, total
from .work import Call, Count, Work

# Of the kernel, for every element of a state: vector and transcendental, forward and backward.
STATE_ACTIVATIONS = {"gelu": ((4, 1), (8, 1)), "relu": ((1, 0), (BEFORE_0_11, 0))}


@count.register
def _(layer: HeadLinear, call: Call) -> Count:
  heads, in_size, out_size = layer.kernel.shape[-3:]
  flops = 2 * call.length * heads * in_size * out_size
  bias = Work(vector=0 if layer.bias is None else call.length * heads * out_size)
  return Count(Work(matmul=flops) + bias, Work(matmul=2 * flops) + bias)


@count.register
def _(layer: Hypernetwork, call: Call) -> Count:
  heads, _, hidden = layer.input.kernel.shape[-3:]
  size = call.length * heads * hidden
  return total((layer.input, layer.output), call) + each(ACTIVATIONS, "gelu", size, layer.dtype)


@count.register
def _(layer: CausalHyperMixing, call: Call) -> Count:
  counted = _generated(layer, call) + _scale(layer, call.length) + _core(layer, call)
  return counted if layer.norm is None else counted + count(layer.norm, call)


@count.register
def _(layer: HyperMixing, call: Call) -> Count:
  """Of a sequence with itself. Every token is needed by every other, so causality leaves all."""
  t, d, h = call.length, layer.d_model, layer.num_heads
  form = "parallel" if call.causal else call.form
  size = {"parallel": t, "chunkwise": min(layer.chunk_size, t), "recurrent": 1}[form]
  pieces = -(-t // size)
  tokens, state = pieces * size, h * layer.key_size * layer.value_size
  networks = (layer.w1, layer.w1 if layer.w2 is None else layer.w2)
  padded = call._replace(length=tokens)
  counted = total(filter(None, (*networks, layer.norm)), padded) + _positions(layer, tokens) * 2
  products = Work(mixing=4 * tokens * state)
  counted += Count(products + Work(vector=pieces * state), products * 2)
  counted += each(STATE_ACTIVATIONS, layer.activation, state, state_dtype(layer.dtype))
  counted += fan_out(3, d, call)  # as keys, values and queries
  summed = pieces * state
  if pieces > 1:  # gradients of what every piece uses; of one token, a vector's is no sum itself
    parts = filter(None, (*networks, layer.norm))
    used = sum(_parameters(part, vectors=size > 1) for part in parts)
    summed += state + pieces * used
  if layer.w2 is None:
    summed += _parameters(layer.w1)
  return counted + Count(backward=Work(vector=summed))


def _parameters(module: nnx.Module, vectors: bool = True) -> int:
  names = ("kernel", "bias", "scale") if vectors else ("kernel",)
  leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
  return sum(leaf.size for path, leaf in leaves if path[-1].key in names)


def _generated(layer, call: Call) -> Count:
  """Both matrices, of tokens with their positions."""
  t, d = call.length, layer.d_model
  counted = _positions(layer, t) + count(layer.w1, call)
  if layer.w2 is None:  # its rows are read twice, and the tokens once more
    return counted + fan_out(2, layer.num_heads * layer.key_size, call) + fan_out(2, d, call)
  return counted + count(layer.w2, call) + fan_out(3, d, call)


def _positions(layer, t: int) -> Count:
  size = t * layer.d_model
  if layer.position == "none":
    return Count()
  added = Count(Work(vector=2 * size, transcendental=size))
  return added if layer.position == "standard" else added + Count(*[Work(vector=size)] * 2)


def _scale(layer: CausalHyperMixing, t: int) -> Count:
  """The gain, divided by what the position tells."""
  h = layer.num_heads
  if layer.normalizer == "none":
    return Count()
  if layer.normalizer in ("row_rms", "head_rms"):
    return Count(backward=Work(vector=t * h))
  counted = Count(Work(vector=3 * t * h + t, transcendental=t * h + h), Work(vector=2 * t * h + h))
  if layer.normalizer == "variance":
    counted += Count(Work(vector=h, transcendental=t * h))
  return counted


def _core(layer: CausalHyperMixing, call: Call) -> Count:
  t, h, k, v = call.length, layer.num_heads, layer.key_size, layer.value_size
  if call.causal:
    states = t * h * k * v
    products = Work(mixing=4 * states)
    return Count(products + Work(vector=states), products * 2) + _activated(layer, t)
  if call.form == "recurrent":  # which has the product of a token elementwise
    states = t * h * k * v
    read = Work(mixing=2 * states)
    forward = read + Work(vector=3 * states, transcendental=h)
    backward = read * 2 + Work(vector=8 * states + t * h * (k + v))
    return Count(forward, backward) + _activated(layer, t)
  c = min(layer.chunk_size, t)
  chunks = -(-t // c)
  tokens = chunks * c
  states = tokens * h * k * v
  product, sums = Work(mixing=2 * states), Work(mixing=2 * c * states)
  # Without documents and padding, all chunks have one table of decays.
  shared = call.form == "parallel" and not call.training and t % c == 0
  tables = 1 if shared else chunks
  decays = h * tables * c * (c + 1)  # of pairs, and of the state before
  counted = _activated(layer, tokens) + Count(
    product + sums + Work(vector=2 * states + decays + tables * c * c, transcendental=decays),
    product * 4 + sums + Work(vector=4 * states),
  )
  carried = Work(vector=chunks * h * k * v)
  if call.form == "parallel":
    return counted + Count(product + carried * 2, carried * 3)
  again = counted.forward if call.training else Work()
  return counted + Count(product, carried, again)


def _activated(layer: CausalHyperMixing, tokens: int) -> Count:
  """What becomes of the states before they are read."""
  h, k = layer.num_heads, layer.key_size
  states = tokens * h * k * layer.value_size
  counted = each(STATE_ACTIVATIONS, layer.activation, states, state_dtype(layer.dtype))
  if layer.normalizer == "none":
    return counted
  counted += Count(Work(vector=states), Work(vector=3 * states + tokens * h))
  if layer.normalizer in ("mean", "variance"):
    return counted
  rows = tokens * h * (k if layer.normalizer == "row_rms" else 1)
  return counted + Count(
    Work(vector=3 * states + 2 * rows, transcendental=rows), Work(vector=7 * states + 5 * rows)
  )
