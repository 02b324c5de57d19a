"""Which implementation of an operator runs: the fastest that fits, or the one asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import jax

Implementation = Literal["xla", "tpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def run(
  operator: str,
  implementation: Implementation | Sequence[Implementation] | None,
  functions: Mapping[Implementation, Callable],
  reasons: Mapping[Implementation, str | None],
  *arguments,
):
  """Calls one of an operator's implementations.

  Args:
    operator: its name, for errors.
    implementation: one, or several of which the first is taken that fits. `None`: when the program
      is compiled for a platform, that platform's kernel if it fits, else `"xla"`.
    functions: the implementations, `"xla"` among them.
    reasons: why each of them cannot take these arguments; `None` if it can.
    *arguments: what it is called with.

  Raises:
    ValueError: for an unknown implementation.
    NotImplementedError: if none of those asked for fits, with the reasons.
  """
  if implementation is None:
    kernels = {name: f for name, f in functions.items() if name != "xla" and reasons[name] is None}
    if not kernels:
      return functions["xla"](*arguments)
    return jax.lax.platform_dependent(*arguments, **kernels, default=functions["xla"])
  wanted = (implementation,) if isinstance(implementation, str) else tuple(implementation)
  for name in wanted:
    if name not in IMPLEMENTATIONS:
      raise ValueError(
        f"implementation is {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}, several or None"
      )
  for name in wanted:
    if reasons[name] is None:
      return functions[name](*arguments)
  told = "; ".join(f"{name}: {reasons[name]}" for name in wanted) or "none was asked for"
  raise NotImplementedError(f"no implementation of {operator} fits: {told}")
