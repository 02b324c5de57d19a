"""Closed forms: what a call of a module computes, layer by layer, from its sizes alone.

`count(module, call)` looks its closed form up by the module's class. The file of a new layer brings
its own:

    @count.register
    def _(layer: MyMixer, call: Call) -> Count:
      return products(layer.projection, call) + ...

They say what the program does, to the last addition, and tests hold them to `walk`. A training step
is the gradient of the summed cross entropy of one row of tokens; what an optimizer does, and what
pieces of the loss and of a batch add up, is not in it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ..layers.audio import FrontEnd, rows_at_once
from ..layers.feed_forward import FeedForward, GatedFeedForward
from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..models.classifier import Classifier, TokenEmbedding
from ..models.language_model import LanguageModel
from ..models.stack import Block, Group, PatternStack, Stack
from .walk import fft_flops
from .work import Call, Count, Work

BEFORE_0_11 = jax.__version_info__ < (0, 11)  # JAX, which has other derivatives since


@functools.singledispatch
def count(module: nnx.Module, call: Call) -> Count:
  """The work of `module` in a call.

  Args:
    module: with or without values, see `nnx.eval_shape`.
    call: how it is called.

  Raises:
    NotImplementedError: for a class of modules that has no closed form.
  """
  raise NotImplementedError(
    f"{type(module).__name__} has no closed form of its work; write one in the file that defines "
    "it, with `@triform.arch.flops.count.register`"
  )


def fan_out(readers: int, width: int, call: Call) -> Count:
  """What `readers` of one vector a token add: the sum of their gradients."""
  return Count(backward=Work(vector=(readers - 1) * call.length * width))


@count.register
def _(layer: Linear, call: Call) -> Count:
  flops = 2 * call.length * layer.in_features * layer.out_features
  bias = Work(vector=0 if layer.bias is None else call.length * layer.out_features)
  return Count(Work(matmul=flops) + bias, Work(matmul=2 * flops) + bias)


def without_input_gradient(layer: Linear, call: Call) -> Count:
  """A layer of what is given, which is not differentiated by."""
  counted = count(layer, call)
  return counted - Count(backward=Work(matmul=counted.forward.matmul))


@count.register
def _(layer: RMSNorm, call: Call) -> Count:
  t, d = call.length, layer.num_features
  return Count(
    Work(vector=t * (4 * d + 2), transcendental=t),
    Work(vector=t * (11 * d + 3), transcendental=t),
  )


@count.register
def _(layer: nnx.LayerNorm, call: Call) -> Count:  # with a variance of differences, and a bias
  t, d = call.length, layer.num_features
  return Count(Work(vector=t * (8 * d + 3), transcendental=t), Work(vector=t * (15 * d + 7)))


# Operations for every element of an activation, forward and backward: vector, transcendental.
ACTIVATIONS = {
  "gelu": ((4, 1), (10, 1)),
  "relu": ((1, 0), (0, 0)),
  "silu": ((1, 1), (6, 0)),
  "squared_relu": ((2, 0), (3, 0)),
}
# Operations for every element of `gate(a, b)`, likewise.
GATES = {"gelu": ((5, 1), (12, 1)), "relu": ((2, 0), (2, 0)), "silu": ((4, 1), (7, 1))}


@count.register
def _(layer: FeedForward, call: Call) -> Count:
  size = call.length * layer.input.out_features
  return total((layer.input, layer.output), call) + each(
    ACTIVATIONS, layer.activation, size, layer.input.dtype
  )


@count.register
def _(layer: GatedFeedForward, call: Call) -> Count:
  size = call.length * layer.input.out_features
  projections = total((layer.input, layer.gate, layer.output), call)
  read = fan_out(2, layer.input.in_features, call)
  return projections + read + each(GATES, layer.activation, size, layer.input.dtype)


def each(table: dict, name: str, size: int, dtype: jnp.dtype) -> Count:
  """An activation of `size` elements."""
  counted = Count(*(Work(vector=v, transcendental=f) * size for v, f in table[name]))
  if name == "gelu" and dtype == jnp.float32 and not BEFORE_0_11:
    counted += Count(backward=Work(vector=17 * size))  # `exp(-x^2)` to the last bit
  return counted


@count.register
def _(block: Block, call: Call) -> Count:
  size = call.length * block.mixer_norm.num_features
  added = (
    Count(Work(vector=2 * size), Work(vector=2 * size)) + dropped(block.dropout, size, call) * 2
  )
  parts = (block.mixer_norm, block.mixer, block.feed_forward_norm, block.feed_forward)
  return total(parts, call) + added


def dropped(dropout: nnx.Dropout, size: int, call: Call) -> Count:
  """Dropout of `size` elements."""
  if not call.training or not dropout.rate:
    return Count()
  # Random bits are made numbers, compared, scaled.
  return Count(Work(vector=5 * size + 1), Work(vector=size))


@count.register
def _(group: Group, call: Call) -> Count:
  return total(group.blocks, call)


@count.register
def _(stack: PatternStack, call: Call) -> Count:
  return total(filter(None, (stack.repeated, stack.rest)), call)


@count.register
def _(stack: Stack, call: Call) -> Count:
  layers = [stack.layers] * stack.num_layers if stack.scan else stack.layers
  counted = total(layers, call)
  if stack.remat == "none" or not call.training or call.causal:
    return counted
  again = (count(layer, call).forward - spared(layer, stack.remat, call) for layer in layers)
  return counted + Count(recompute=sum(again, Work()))


@functools.singledispatch
def spared(layer: nnx.Module, remat: str, call: Call) -> Work:
  """What of a layer is not computed a second time.

  That is what only its result needs and, if `remat` is "dots", all products with weights.
  """
  raise NotImplementedError(f"{type(layer).__name__} has no closed form of what remat spares")


@spared.register
def _(block: Block, remat: str, call: Call) -> Work:
  width = call.length * block.mixer_norm.num_features
  kept = Work(vector=width)  # the last addition
  if block.norm_placement == "pre":
    kept += count(block.feed_forward.output, call).forward
  elif isinstance(block.feed_forward_norm, nnx.LayerNorm):
    kept += Work(vector=2 * width)
  else:
    kept += count(block.feed_forward_norm, call).forward
  if remat == "dots":
    kept += Work(matmul=count(block, call).forward.matmul - kept.matmul)
  if block.feed_forward.activation == "squared_relu" and kept.matmul:
    kept += Work(vector=call.length * block.feed_forward.input.out_features)
  return kept


@spared.register
def _(group: Group, remat: str, call: Call) -> Work:
  *before, last = group.blocks
  kept = spared(last, remat, call)
  return kept + Work(matmul=total(before, call).forward.matmul) if remat == "dots" else kept


@count.register
def _(model: LanguageModel, call: Call) -> Count:
  t, d, vocab = call.length, model.embedding.features, model.vocab_size
  embedded = Count(Work(vector=t * d), Work(vector=2 * t * d))
  scaled = Count(Work(vector=t * d), Work(vector=t * d))
  logits = Count(Work(logits=2 * t * d * vocab), Work(logits=4 * t * d * vocab))
  if model.head is None:  # the gradients of the table as what is read and as the head
    logits += Count(backward=Work(vector=vocab * d))
  counted = embedded + total((model.stack, model.norm), call) + scaled + logits
  if model.relative_bias is not None:  # the gradients of all layers are summed
    table = count(model.relative_bias, call)
    counted += Count(backward=table.backward * model.stack.num_layers)
  return counted + _loss(t, d, vocab) if call.training else counted


@count.register
def _(layer: TokenEmbedding, call: Call) -> Count:
  size = call.length * layer.embedding.features
  return Count(Work(vector=size), Work(vector=2 * size))


@count.register
def _(model: Classifier, call: Call) -> Count:
  """Without a loss: what the gradients of given logits take.

  With look-ahead a call answers as if nothing followed: the program has that many tokens more,
  though what they push out are no more than the call's own.
  """
  heard, length = Count(), call.length
  if model.front_end is not None:
    heard, length = count(model.front_end, call), model.front_end.num_frames(length, call.context)
  ahead = 0 if call.causal else model.stem.lookahead
  t, d = length + ahead, model.d_model
  call = call._replace(length=t, packed=False, ahead=ahead)
  counted = total(filter(None, (model.stem, model.stack, model.norm, model.neuron)), call) + heard
  mean = Count(Work(vector=t * d + d), Work(vector=d))
  if model.causal or model.stem.lookahead:  # added to what was heard before, in two pieces
    mean += Count(Work(vector=2 * d), Work(vector=t * d))
  return counted + mean + of_one(model.head, "logits")


@count.register
def _(layer: FrontEnd, call: Call) -> Count:
  """Of samples, which have no gradient."""
  analysis = layer.analysis
  frames = layer.num_frames(call.length, call.context)
  rows = -(-frames // rows_at_once()) * rows_at_once()
  bins, filters = analysis.fft_size // 2 + 1, analysis.num_mel_bins
  vector = 5 * analysis.window + 1 + 3 * bins + filters
  matmul = 2 * bins * filters
  if analysis.num_ceps is not None:
    matmul += 2 * filters * analysis.num_ceps
  one = Work(
    matmul=matmul,
    mixing=fft_flops(analysis.fft_size, real=True),
    vector=vector,
    transcendental=filters,
  )
  scaled = call.length + 2 * frames * analysis.num_features
  return Count(one * rows + Work(vector=scaled))


def of_one(layer: Linear, kind: str = "matmul") -> Count:
  """A layer of one vector, so that the gradient of the bias is no sum."""
  product = Work(**{kind: 2 * layer.in_features * layer.out_features})
  bias = Work(vector=0 if layer.bias is None else layer.out_features)
  return Count(product + bias, product * 2)


def _loss(t: int, d: int, vocab: int) -> Count:
  """Cross entropy, which forms its gradient with its value: all of it stands under forward."""
  return Count(
    Work(vector=t * (6 * vocab + d + 9) + 2 * d * vocab + 3, transcendental=t * (2 * vocab + 1))
  )


def total(modules, call: Call) -> Count:
  """The work of modules that are called one after another."""
  return sum((count(module, call) for module in modules), Count())
