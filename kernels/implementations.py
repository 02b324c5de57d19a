"""Which implementation of an operator runs: the fastest that fits, or the one asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import jax

Implementation = Literal["xla", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def run(
  operator: str,
  implementation: Implementation | Sequence[Implementation] | None,
  functions: Mapping[Implementation, Callable],
  reasons: Mapping[Implementation, Callable[[], str | None]],
  *arguments,
  automatic: Sequence[Implementation] = ("tpu",),
):
  """Calls one of an operator's implementations.

  Args:
    operator: its name, for errors.
    implementation: one, or several of which the first is taken that fits. `None`: when the program
      is compiled for a platform, that platform's kernel if it fits, else `"xla"`.
    functions: the implementations, `"xla"` among them.
    reasons: why each of the others cannot take these arguments; `None` if it can.
    *arguments: what it is called with.
    automatic: the kernels that `None` chooses from; a new one has to be asked for by name.

  Raises:
    ValueError: for an unknown implementation.
    NotImplementedError: if none of those asked for fits, with the reasons.
  """
  if implementation is None:
    kernels = {name: functions[name] for name in automatic if reasons[name]() is None}
    if not kernels:
      return functions["xla"](*arguments)
    return jax.lax.platform_dependent(*arguments, **kernels, default=functions["xla"])
  wanted = (implementation,) if isinstance(implementation, str) else tuple(implementation)
  for name in wanted:
    if name not in IMPLEMENTATIONS:
      raise ValueError(
        f"implementation is {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}, several or None"
      )
  told = []
  for name in wanted:
    reason = None if name == "xla" else reasons[name]()
    if reason is None:
      return functions[name](*arguments)
    told.append(f"{name}: {reason}")
  raise NotImplementedError(f"no implementation of {operator} fits: {'; '.join(told)}")
