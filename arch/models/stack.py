"""Residual blocks, and stacks of them with one compiled body or one per layer."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ..interface import Scanned, SequenceModule, check_call, copy_traits
from ..layers.linear import PRODUCT
from ..sharding import constrain_batch

# What of a layer is stored for the backward pass, which computes the rest again.
REMAT_POLICIES = {
  "none": None,  # all of it is stored
  "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),  # products with weights
  "full": jax.checkpoint_policies.nothing_saveable,  # its input alone
}


NormPlacement = Literal["pre", "pre_post"]


class Block(SequenceModule):
  """`x += dropout(mixer(norm(x)))`, then `x += dropout(feed_forward(norm(x)))`: pre-norm residual.

  With `norm_placement="pre_post"`, Primer's, the second is `x += dropout(norm(feed_forward(x)))`.
  Its state is the mixer's, and so are keyword arguments that it does not know.
  """

  def __init__(
    self,
    *,
    mixer_norm: nnx.Module,
    mixer: SequenceModule,
    feed_forward_norm: nnx.Module,
    feed_forward: nnx.Module,
    norm_placement: NormPlacement = "pre",
    dropout: float = 0.0,
  ):
    if norm_placement not in get_args(NormPlacement):
      raise ValueError(f"norm_placement is {norm_placement!r}, expected pre or pre_post")
    self.norm_placement = norm_placement
    self.mixer_norm, self.mixer = mixer_norm, mixer
    self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
    self.dropout = nnx.Dropout(dropout)
    copy_traits(self, mixer)

  def init_state(self, batch_size, *, max_len=None):
    return self.mixer.init_state(batch_size, max_len=max_len)

  def __call__(
    self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, **of_mixer
  ):
    def drop(y):
      return self.dropout(y, rngs=rngs, deterministic=rngs is None)

    y, state = self.mixer(
      self.mixer_norm(x), state, form=form, reset=reset, mask=mask, rngs=rngs, **of_mixer
    )
    x = x + drop(y)
    if self.norm_placement == "pre":
      y = self.feed_forward(self.feed_forward_norm(x))
    else:
      y = self.feed_forward_norm(self.feed_forward(x))
    return x + drop(y), state


class Stack(SequenceModule):
  """`num_layers` blocks of one kind, one after another.

  `scan=True` keeps the layers stacked and runs them as one compiled body whatever the depth;
  its state is `Scanned`. `scan=False` keeps and compiles every layer by itself, which on a CPU
  and for decoding is several times faster; its state is a tuple. `None` is the latter on a CPU
  alone.
  Both start from the same values for the same `rngs`, and `arch.layout` converts between them.
  `remat` names one of `REMAT_POLICIES`. While `measuring` is true, statistics that blocks keep of a
  call are kept in evaluation too. Keyword arguments that it does not know are the blocks', the same
  for all.
  """

  measuring: bool = False

  def __init__(
    self,
    make_block: Callable[[nnx.Rngs], SequenceModule],
    num_layers: int,
    *,
    scan: bool | None,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    if remat not in REMAT_POLICIES:
      raise ValueError(f"remat is {remat!r}, expected one of {', '.join(REMAT_POLICIES)}")
    self.num_layers, self.remat = num_layers, remat
    self.scan = jax.default_backend() != "cpu" if scan is None else scan
    stacked = nnx.vmap(make_block)(rngs.split(num_layers))
    copy_traits(self, stacked)
    if self.scan:
      self.layers = stacked
    else:
      self.layers = nnx.List(_layer(stacked, i) for i in range(num_layers))

  def init_state(self, batch_size, *, max_len=None):
    if not self.scan:
      return tuple(layer.init_state(batch_size, max_len=max_len) for layer in self.layers)
    one = self.layers.init_state(batch_size, max_len=max_len)
    return Scanned(jax.tree.map(lambda a: jnp.broadcast_to(a, (self.num_layers, *a.shape)), one))

  def __call__(
    self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, **of_block
  ):
    check_call(x, form, reset, mask)
    keys = None if rngs is None else jax.random.split(rngs.dropout(), self.num_layers)

    def run(graphdef, x, layer):
      variables, before, key = layer
      block = nnx.merge(graphdef, variables)
      rngs = None if key is None else nnx.Rngs(dropout=key)
      x, after = block(x, before, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)
      return constrain_batch(x), (after, nnx.state(block, nnx.BatchStat))

    policy = REMAT_POLICIES[self.remat]
    if policy is not None:
      # Within a scan, XLA cannot merge what is computed again with what was computed before.
      run = jax.checkpoint(run, policy=policy, prevent_cse=not self.scan, static_argnums=0)
    x = constrain_batch(x)
    if self.scan:
      graphdef, variables = nnx.split(self.layers)
      before = None if state is None else state.layers
      x, (states, statistics) = jax.lax.scan(
        functools.partial(run, graphdef), x, (variables, before, keys)
      )
      self._update(self.layers, statistics, rngs)
      return x, Scanned(states)
    states = []
    for i, layer in enumerate(self.layers):
      before, key = (None if a is None else a[i] for a in (state, keys))
      graphdef, variables = nnx.split(layer)
      x, (after, statistics) = run(graphdef, x, (variables, before, key))
      self._update(layer, statistics, rngs)
      states.append(after)
    return x, tuple(states)

  def _update(self, layer, statistics, rngs):
    # Evaluation writes nothing, so it may run within any transform.
    if rngs is not None or self.measuring:
      nnx.update(layer, statistics)


class Group(SequenceModule):
  """Blocks of several kinds, one after another; its state is the tuple of theirs."""

  def __init__(
    self, make_blocks: Sequence[Callable[[nnx.Rngs], SequenceModule]], *, rngs: nnx.Rngs
  ):
    self.blocks = nnx.List(make(rngs) for make in make_blocks)
    copy_traits(self, *self.blocks)

  def init_state(self, batch_size, *, max_len=None):
    return tuple(block.init_state(batch_size, max_len=max_len) for block in self.blocks)

  def __call__(
    self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, **of_block
  ):
    states = []
    for i, block in enumerate(self.blocks):
      own = None if state is None else state[i]
      x, own = block(x, own, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)
      states.append(own)
    return x, tuple(states)


class PatternStack(SequenceModule):
  """`num_layers` blocks whose kinds repeat: those of `make_blocks`, again and again.

  Each repetition is a layer of a `Stack`, `repeated`, so that scanning compiles it once; what is
  left of an incomplete last one, `rest`, is never scanned. Its state is a tuple of the states of
  the two, of which `rest` may be absent.
  """

  def __init__(
    self,
    make_blocks: Sequence[Callable[[nnx.Rngs], SequenceModule]],
    num_layers: int,
    *,
    scan: bool | None,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    repetitions, rest = divmod(num_layers, len(make_blocks))
    if not repetitions:
      raise ValueError(f"{num_layers} layers are less than the pattern's {len(make_blocks)}")

    def stack(makers, count, scan):
      make_group = functools.partial(_make_group, makers)
      return Stack(make_group, count, scan=scan, remat=remat, rngs=rngs)

    self.num_layers = num_layers
    self.repeated = stack(tuple(make_blocks), repetitions, scan)
    self.scan = self.repeated.scan
    self.rest = stack(tuple(make_blocks[:rest]), 1, False) if rest else None
    copy_traits(self, *self._stacks())

  def _stacks(self):
    return (self.repeated,) if self.rest is None else (self.repeated, self.rest)

  def init_state(self, batch_size, *, max_len=None):
    return tuple(stack.init_state(batch_size, max_len=max_len) for stack in self._stacks())

  def __call__(
    self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None, **of_block
  ):
    states = []
    for i, stack in enumerate(self._stacks()):
      own = None if state is None else state[i]
      x, own = stack(x, own, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)
      states.append(own)
    return x, tuple(states)


def _make_group(make_blocks, rngs):
  return Group(make_blocks, rngs=rngs)


def _layer(stacked: nnx.Module, i: int) -> nnx.Module:
  graphdef, variables = nnx.split(stacked)
  return nnx.merge(graphdef, jax.tree.map(lambda a: a[i], variables))
