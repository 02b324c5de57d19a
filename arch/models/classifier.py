"""The classifier of sequences that every architecture fills with its own blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from triform import kernels

from ..interface import (
  SequenceModule,
  State,
  check_call,
  copy_traits,
  restart_rows,
  sees_all,
  state_dtype,
)
from ..layers.audio import FrontEnd, forget
from ..layers.linear import Linear


class ClassifierState(NamedTuple):
  """States of the parts, and the sum of features of the current document and its tokens."""

  front_end: State
  stem: State
  stack: State
  neuron: State
  total: jax.Array  # [b, d], in at least float32
  count: jax.Array  # uint32[b], tokens heard


class TokenEmbedding(SequenceModule):
  """Token ids `[b, t]` to `scale` times the rows of a table, `[b, t, d]`."""

  def __init__(self, vocab_size: int, d_model: int, *, scale: float, dtype, param_dtype, rngs):
    self.scale = scale
    self.embedding = nnx.Embed(
      vocab_size,
      d_model,
      embedding_init=nnx.initializers.normal(d_model**-0.5),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def init_state(self, batch_size, *, max_len=None):
    return ()

  def __call__(self, ids, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    x = self.embedding(jnp.asarray(ids))
    return x * jnp.asarray(self.scale, x.dtype), ()


class Classifier(SequenceModule):
  """Sequences to logits of classes: a stem, a stack of blocks, a norm, the mean, a linear layer.

  `logits, state = model(x, state, mask=mask)` with logits `[b, classes]`, in at least float32, of
  all that was heard of the current document, this call's tokens and those of calls before. It has
  one answer to a call: in a row with a `reset`, the one about what stands from the last one on.

  With a stem that looks ahead, a call answers as if its last token were the last of all: the stem
  and the stack are run past the end, and the state is from before that. `encode` alone does not,
  and `read_out(state)` gives the logits when they are wanted, so that a stream of short pieces need
  not pay for an answer to each. A stack that sees whole sequences has no state, `()`.

  With a `front_end` inputs are samples `[b, n]`, which it makes frames of, and `reset` and `mask`
  are of samples. Frames `[b, t, num_features]`, with a mask of theirs, are taken too, as if the
  front end had made them.

  Args:
    front_end: samples to frames, or `None`.
    stem: inputs to features `[b, t, d]`; one with `lookahead` takes `frames` and `ahead`, see
      `ConvStem`.
    stack: of blocks, which take `ahead` if the stem looks ahead.
    norm: of features, token by token, or `None`.
    neuron: a `SequenceModule` behind it, or `None`.
    num_classes: of the linear layer `head`.
  """

  def __init__(
    self,
    stem: SequenceModule,
    stack: SequenceModule,
    *,
    front_end: FrontEnd | None = None,
    norm: nnx.Module | None = None,
    neuron: SequenceModule | None = None,
    d_model: int,
    num_classes: int,
    kernel_init: Any = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.d_model = d_model
    self.front_end = front_end
    self.stem, self.stack = stem, stack
    self.norm, self.neuron = norm, neuron
    copy_traits(self, stem, stack)
    if front_end is not None:
      self.lookahead *= front_end.shift
    self.head = Linear(
      d_model,
      num_classes,
      use_bias=True,
      kernel_init=kernel_init or nnx.initializers.lecun_normal(),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def init_state(self, batch_size, *, max_len=None):
    if sees_all(self):
      return ()
    dtype = state_dtype(self.head.dtype or self.head.param_dtype)
    return ClassifierState(
      () if self.front_end is None else self.front_end.init_state(batch_size),
      self.stem.init_state(batch_size),
      self.stack.init_state(batch_size, max_len=max_len),
      () if self.neuron is None else self.neuron.init_state(batch_size),
      jnp.zeros((batch_size, self.d_model), dtype),
      jnp.zeros(batch_size, jnp.uint32),
    )

  def encode(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    """Inputs to the features `[b, t, d]` that are averaged, and the state.

    With a stem that looks n tokens ahead, the features at a token are those of the one n before it
    in its document, unspecified at the first n; `flush` has the last ones. Of samples they are
    those of frames, by how many the state's `count` grows, and unspecified behind those.
    """
    check_call(x, form, reset, mask)
    features, _, state = self._run(x, state, form, reset, mask, rngs, 0)
    return features, state

  def flush(self, state: ClassifierState) -> jax.Array:  # [b, stem.lookahead, d]
    """The features of the last tokens, if nothing follows. Of fewer tokens, the first are void."""
    self._check_state()
    if not self.stem.lookahead:
      dtype = self.head.dtype or self.head.param_dtype
      return jnp.zeros((len(state.count), 0, self.d_model), dtype)
    return self._run(None, state, "recurrent", None, None, None, self.stem.lookahead)[0]

  def read_out(self, state: ClassifierState) -> jax.Array:  # [b, classes]
    """Logits of all that was heard."""
    self._check_state()
    if not self.stem.lookahead:
      return self._logits(state.total, state.count)
    return self._run(None, state, "recurrent", None, None, None, self.stem.lookahead)[1]

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    check_call(x, form, reset, mask)
    _, logits, state = self._run(x, state, form, reset, mask, rngs, self.stem.lookahead)
    return logits, state

  def _hears(self, x: jax.Array) -> bool:
    """Whether `x` are samples."""
    return self.front_end is not None and jnp.ndim(x) == 2

  def _check_state(self) -> None:
    if sees_all(self):
      raise NotImplementedError(
        f"{type(self).__name__} sees whole sequences and keeps no state to read out; call it"
      )

  def _run(self, x, state, form, reset, mask, rngs, ahead):
    """Features, logits and the state after a piece, which is followed by `ahead` tokens of none."""
    if sees_all(self):
      return self._run_whole(x, state, form, reset, mask, rngs)
    first = self.init_state(len(state.count) if x is None else x.shape[0])
    starts = state is None
    state = first if starts else state
    front_end = state.front_end
    if x is not None and self._hears(x):
      if reset is not None:
        state, mask = forget(state, first, reset, mask)
        reset = None
      x, mask, front_end = self.front_end(x, None if starts else state.front_end, mask=mask)
    if x is None:
      x = jnp.zeros((len(state.count), 0, self.stem.in_features), first.total.dtype)
    (b, t), given = x.shape[:2], mask
    mask = jnp.ones((b, t), bool) if mask is None else jnp.asarray(mask)
    current = mask
    if reset is not None:
      begins = jnp.asarray(reset) & mask
      last = jnp.max(jnp.where(begins, jnp.arange(t)[None], -1), axis=1)
      current = mask & (jnp.arange(t)[None] >= last[:, None])
      state = state._replace(
        **restart_rows({"total": state.total}, {"total": first.total}, last >= 0)
      )
      if self.stem.lookahead:  # of a document that has ended nothing is asked any more
        state = restart_rows(state, first, last >= 0)
        mask, given, reset = current, current, None
    count = state.count
    if t:
      _, count = kernels.token_positions(count, reset, mask, t)
    options = {}
    if self.stem.lookahead:
      given = jnp.pad(mask, ((0, 0), (0, ahead)), constant_values=True)
      current = jnp.pad(current, ((0, 0), (0, ahead)), constant_values=True)
      x = jnp.pad(jnp.asarray(x), ((0, 0), (0, ahead), *[(0, 0)] * (x.ndim - 2)))
      index, _ = kernels.token_positions(state.count, None, given, t + ahead)
      options = {"ahead": ahead}
    keywords = {"form": form, "reset": reset, "rngs": rngs, **options}
    of_stem = {"frames": (index, count)} if self.stem.lookahead else {}
    x, stem = self.stem(x, state.stem, mask=given, **keywords, **of_stem)
    if self.stem.lookahead:
      given = given & (index >= self.stem.lookahead)
      current = current & given
    # Some forms have less to do where nothing came before.
    x, stack = self.stack(x, None if starts else state.stack, mask=given, **keywords)
    if self.norm is not None:
      x = self.norm(x)
    neuron = ()
    if self.neuron is not None:
      x, neuron = self.neuron(x, state.neuron, mask=given, **keywords)
    summed = jnp.where(current[..., None], x, 0).astype(state.total.dtype)
    heard = current[:, :t].any(axis=1)[:, None]  # adding nothing would make 0 of -0
    total = jnp.where(heard, state.total + summed[:, :t].sum(axis=1), state.total)
    logits = self._logits(total + summed[:, t:].sum(axis=1), count)
    return x, logits, ClassifierState(front_end, stem, stack, neuron, total, count)

  def _run_whole(self, x, state, form, reset, mask, rngs):
    if state not in (None, ()):
      raise NotImplementedError(
        f"{type(self).__name__} sees whole sequences and goes on from no state; expected None"
      )
    if self._hears(x):
      if reset is not None:
        raise ValueError("reset is given, expected none: the model sees whole sequences of samples")
      x, mask, _ = self.front_end(x, mask=mask)
    keywords = {"form": form, "reset": reset, "mask": mask, "rngs": rngs}
    x, _ = self.stem(x, None, **keywords)
    x, _ = self.stack(x, None, **keywords)
    if self.norm is not None:
      x = self.norm(x)
    total = x if mask is None else jnp.where(jnp.asarray(mask)[..., None], x, 0)
    total = total.astype(state_dtype(x.dtype)).sum(axis=1)
    count = jnp.full(len(x), x.shape[1]) if mask is None else jnp.asarray(mask).sum(axis=1)
    return x, self._logits(total, count), ()

  @jax.named_scope("logits")
  def _logits(self, total, count):
    """Of the mean; without tokens, the bias of the linear layer."""
    mean = total / jnp.maximum(count, 1).astype(total.dtype)[:, None]
    return self.head(mean.astype(self.head.dtype or mean.dtype)).astype(total.dtype)
