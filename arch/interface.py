"""The one interface: every causal model here computes a function `(x, state) -> (y, state')`.

The parallel, chunkwise and recurrent forms are three algorithms for the same function, so `form`
is a choice of cost, never of result. What that promises, and `tests/laws.py` checks:

1. Forms agree: outputs, final state and gradients (parameters, inputs, incoming state).
2. Splits compose: a sequence cut anywhere and continued from the state equals the whole, with
   any form for any piece.
3. Padding is an identity: masked tokens change nothing else, wherever they stand.
4. Packing is separation: documents packed with `reset` equal the documents run alone.
5. Causality: no output depends on a later input, no row on another row.
6. State is constant: its shape does not depend on the length seen. A cache of keys and values
   is the declared exception (`state_is_constant`), with room for `max_len` tokens of a document.
7. Positions do not drift: a state carried to position 1,000,000 is as good as a fresh one.

In training mode (`rngs` given) dropout and batch statistics couple tokens by design: laws 2 and 5
are laws of evaluation.

Axis letters, everywhere: `b` batch, `t` time, `d` model, `h` heads, `g` key/value heads, `k` key,
`v` value, `c` chunk, `f` hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from triform.kernels import FORMS, Form

__all__ = [
  "FORMS",
  "Form",
  "Scanned",
  "SequenceModule",
  "State",
  "check_call",
  "copy_traits",
  "put_rows",
  "restart_rows",
  "sees_all",
  "state_bytes",
  "state_dtype",
  "take_rows",
]

State = Any  # a pytree of arrays with the batch first


class Scanned(NamedTuple):
  """The states of a scanned stack: a leading layer axis, the batch second."""

  layers: State


class SequenceModule(nnx.Module):
  """A mixer, a block, a stack or a whole model: `y, state = module(x, state, form=...)`."""

  causal: bool = True
  lookahead: int = (
    0  # tokens that an answer waits for, of a model that is not causal but has a state
  )
  state_is_constant: bool = True
  max_len: int | None = None  # tokens of a document that a state has room for; None: any number

  def init_state(self, batch_size: int, *, max_len: int | None = None) -> State:
    """The state before the first token. `max_len` sizes a cache, where there is one."""
    raise NotImplementedError

  def __call__(
    self,
    x: jax.Array,
    state: State | None = None,
    *,
    form: Form = "parallel",
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> tuple[jax.Array, State]:
    """Maps a piece of a sequence, of any length, and the state before it.

    Args:
      x: inputs `[b, t, d]`, or token ids `[b, t]` for a language model.
      state: what an earlier call returned; `None` is `init_state`.
      form: the algorithm; see the module's docstring.
      reset: bool `[b, t]`, true at the first token of a document. State, convolution tails
        and positions start afresh before that token.
      mask: bool `[b, t]`, false at padding or an idle slot. Such a token leaves the state bit
        for bit as it was, nothing real depends on it, its own `reset` is ignored, and its
        output is finite and unspecified.
      rngs: given means training: dropout is drawn from it, and batch statistics are used and
        updated. `None` means evaluation, which is deterministic.

    Returns:
      The outputs, and the state after the last token: same structure, shapes and dtypes.
    """
    raise NotImplementedError


def copy_traits(module: SequenceModule, *parts: SequenceModule) -> None:
  """Gives a module what can be said of all its parts."""
  module.causal = all(part.causal for part in parts)
  module.lookahead = sum(part.lookahead for part in parts)
  module.state_is_constant = all(part.state_is_constant for part in parts)
  module.max_len = min((part.max_len for part in parts if part.max_len is not None), default=None)


def sees_all(module: SequenceModule) -> bool:
  """Whether a module sees whole sequences and keeps no state."""
  return not module.causal and not module.lookahead


def check_call(x: jax.Array, form: str, reset: Any, mask: Any) -> None:
  """Raises `ValueError` for arguments that no module accepts."""
  if form not in FORMS:
    raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
  if not hasattr(x, "shape"):
    raise ValueError(f"x is a {type(x).__name__}, expected an array")
  if jnp.ndim(x) < 2 or x.shape[1] == 0:
    raise ValueError(f"x has shape {list(x.shape)}, expected [batch, time, ...] with time > 0")
  for name, flags in (("reset", reset), ("mask", mask)):
    if flags is None:
      continue
    if not hasattr(flags, "dtype"):
      raise ValueError(f"{name} is a {type(flags).__name__}, expected an array of bool")
    if jnp.shape(flags) != x.shape[:2] or flags.dtype != bool:
      raise ValueError(
        f"{name} is {flags.dtype}{list(flags.shape)}, expected bool{list(x.shape[:2])} "
        f"for x of shape {list(x.shape)}"
      )


def state_dtype(dtype: Any) -> jnp.dtype:
  """Dtype of accumulators for a compute dtype: at least float32."""
  return jnp.promote_types(dtype, jnp.float32)


def take_rows(state: State, index: jax.Array) -> State:
  """The rows `index` of a state, as a state of that batch size."""
  return _map_rows(lambda axis, a: jnp.take(a, index, axis=axis), state)


def put_rows(state: State, index: jax.Array, rows: State) -> State:
  """`state` with its rows `index` replaced by `rows`."""

  def put(axis, a, new):
    return jnp.asarray(a).at[(slice(None),) * axis + (index,)].set(new)

  return _map_rows(put, state, rows)


def restart_rows(state: State, first: State, rows: jax.Array) -> State:
  """`state` with the `rows` `bool[b]` as they are in `first`."""

  def choose(axis, a, new):
    shape = [1] * jnp.ndim(a)
    shape[axis] = -1
    return jnp.where(rows.reshape(shape), new, a)

  return _map_rows(choose, state, first)


def _map_rows(f, *states: State) -> State:
  def visit(node, *others):
    if isinstance(node, Scanned):
      return jax.tree.map(lambda *a: f(1, *a), node, *others)
    return f(0, node, *others)

  return jax.tree.map(visit, *states, is_leaf=lambda node: isinstance(node, Scanned))


def state_bytes(state: State) -> int:
  """Memory a state takes."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
