"""Residual blocks, and stacks of them with one compiled body or one per layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import Scanned, SequenceModule, check_call


class Block(SequenceModule):
  """`x += dropout(mixer(norm(x)))`, then `x += dropout(feed_forward(norm(x)))`: pre-norm residual.

  Its state is the mixer's.
  """

  def __init__(
    self,
    *,
    mixer_norm: nnx.Module,
    mixer: SequenceModule,
    feed_forward_norm: nnx.Module,
    feed_forward: nnx.Module,
    dropout: float = 0.0,
  ):
    self.mixer_norm, self.mixer = mixer_norm, mixer
    self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
    self.dropout = nnx.Dropout(dropout)
    self.causal, self.state_is_constant = mixer.causal, mixer.state_is_constant

  def init_state(self, batch_size, *, max_len=None):
    return self.mixer.init_state(batch_size, max_len=max_len)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    def drop(y):
      return self.dropout(y, rngs=rngs, deterministic=rngs is None)

    y, state = self.mixer(self.mixer_norm(x), state, form=form, reset=reset, mask=mask, rngs=rngs)
    x = x + drop(y)
    return x + drop(self.feed_forward(self.feed_forward_norm(x))), state


class Stack(SequenceModule):
  """`num_layers` blocks of one kind, one after another.

  `scan=True` keeps the layers stacked and runs them as one compiled body whatever the depth;
  its state is `Scanned`. `scan=False` keeps and compiles every layer by itself, which on a CPU
  and for decoding is several times faster; its state is a tuple.
  Both start from the same values for the same `rngs`, and `arch.layout` converts between them.
  """

  def __init__(
    self,
    make_block: Callable[[nnx.Rngs], SequenceModule],
    num_layers: int,
    *,
    scan: bool,
    rngs: nnx.Rngs,
  ):
    self.num_layers, self.scan = num_layers, scan
    stacked = nnx.vmap(make_block)(rngs.split(num_layers))
    self.causal, self.state_is_constant = stacked.causal, stacked.state_is_constant
    if scan:
      self.layers = stacked
    else:
      self.layers = nnx.List(_layer(stacked, i) for i in range(num_layers))

  def init_state(self, batch_size, *, max_len=None):
    if not self.scan:
      return tuple(layer.init_state(batch_size, max_len=max_len) for layer in self.layers)
    one = self.layers.init_state(batch_size, max_len=max_len)
    return Scanned(jax.tree.map(lambda a: jnp.broadcast_to(a, (self.num_layers, *a.shape)), one))

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    check_call(x, form, reset, mask)
    keys = None if rngs is None else jax.random.split(rngs.dropout(), self.num_layers)
    call = {"form": form, "reset": reset, "mask": mask}
    if self.scan:
      return self._scan(x, state, keys, call)
    absent = [None] * self.num_layers
    states = []
    for layer, before, key in zip(
      self.layers, absent if state is None else state, absent if keys is None else keys, strict=True
    ):
      x, after = layer(x, before, rngs=_layer_rngs(key), **call)
      states.append(after)
    return x, tuple(states)

  def _scan(self, x, state, keys, call):
    graphdef, variables = nnx.split(self.layers)

    def body(x, layer):
      variables, before, key = layer
      block = nnx.merge(graphdef, variables)
      x, after = block(x, before, rngs=_layer_rngs(key), **call)
      return x, (after, nnx.state(block, nnx.BatchStat))

    per_layer = (variables, None if state is None else state.layers, keys)
    x, (states, statistics) = jax.lax.scan(body, x, per_layer)
    if keys is not None:  # evaluation writes nothing, so it may run within any transform
      nnx.update(self.layers, statistics)
    return x, Scanned(states)


def _layer(stacked: nnx.Module, i: int) -> nnx.Module:
  graphdef, variables = nnx.split(stacked)
  return nnx.merge(graphdef, jax.tree.map(lambda a: a[i], variables))


def _layer_rngs(key):
  return None if key is None else nnx.Rngs(dropout=key)
