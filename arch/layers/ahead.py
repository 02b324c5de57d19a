"""Answers about tokens that a state does not keep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def answer_ahead(
  call: Callable[..., tuple[jax.Array, Any]],
  ahead: int,
  state: Any,
  *tokens: jax.Array | None,  # [b, t, ...]
  again: bool = False,
) -> tuple[jax.Array, Any]:
  """`y, state = call(state, *tokens)`, but with the state before the last `ahead` tokens.

  A model with look-ahead tells what it would answer if nothing more came, and goes on from before.
  The tokens are called in two pieces. With `again`, `y` is of one call with all of them and the
  state of a second one with those before: cheaper where a call is small, or no state is asked for.
  """
  if not ahead:
    return call(state, *tokens)
  length = max(a.shape[1] for a in tokens if a is not None)
  if not 0 < ahead <= length:
    raise ValueError(f"ahead is {ahead}, expected 0 to {length}, the tokens that there are")
  kept = length - ahead
  if again and kept:
    y, _ = call(state, *tokens)
    return y, call(state, *(None if a is None else a[:, :kept] for a in tokens))[1]
  outputs = []
  if kept:
    y, state = call(state, *(None if a is None else a[:, :kept] for a in tokens))
    outputs.append(y)
  y, _ = call(state, *(None if a is None else a[:, kept:] for a in tokens))
  return jnp.concatenate([*outputs, y], axis=1), state
