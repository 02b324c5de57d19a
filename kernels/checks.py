"""What every operator demands of its arguments."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

Form = Literal["parallel", "chunkwise", "recurrent"]
FORMS: tuple[Form, ...] = get_args(Form)


def check_heads(**arrays: Any) -> None:
  """Raises `ValueError` for an array that is not `[batch, time, heads, size]`."""
  for name, array in arrays.items():
    if jnp.ndim(array) != 4:
      raise ValueError(f"{name} has shape {list(array.shape)}, expected [batch, time, heads, size]")


def check_shapes(given: str, expected: Mapping[str, tuple[Any, set[tuple[int, ...]]]]) -> None:
  """Raises `ValueError` for an array that is there and has none of the shapes beside it."""
  for name, (array, shapes) in expected.items():
    if array is not None and jnp.shape(array) not in shapes:
      wanted = " or ".join(str(list(shape)) for shape in sorted(shapes, key=len))
      raise ValueError(f"{name} has shape {list(jnp.shape(array))}, expected {wanted} for {given}")


def check_form(operator: str, length: int, form: str, chunk_size: int) -> None:
  """Raises `ValueError` for no tokens, or a form or chunks that there are not."""
  if length == 0:
    raise ValueError(f"{operator} needs at least one token, got length 0")
  if chunk_size < 1:
    raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
  if form not in FORMS:
    raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
