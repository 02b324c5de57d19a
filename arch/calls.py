"""Options that are written as calls in Python, such as `retention(decay='gated'), attention`."""

import ast
from collections.abc import Collection
from typing import Any

from .closest import closest


def parse_calls(
  text: str, known: Collection[str], *, option: str, kind: str, example: str
) -> list[tuple[str, dict[str, Any]]]:
  """Names and their arguments, which are constants.

  Args:
    text: the value of an option.
    known: the names there are.
    option: what it is called, for messages.
    kind: what its names are of.
    example: of such text.

  Raises:
    ValueError: for any other text and for a name that there is not.
  """
  try:
    calls = ast.parse(f"[{text}]", mode="eval").body.elts
    parsed = [
      (call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords})
      if isinstance(call, ast.Call) and not call.args
      else (call.id, {})
      for call in calls
    ]
  except (SyntaxError, AttributeError, ValueError):
    parsed = []
  if not parsed:
    raise ValueError(f"{option} is {text!r}, expected text such as {example}")
  for name, _ in parsed:
    if name not in known:
      guess = closest(name, sorted(known))
      hint = f"did you mean {guess!r}?" if guess else f"expected one of {', '.join(known)}"
      raise ValueError(f"{option} {text!r} has the unknown {kind} {name!r}; {hint}")
  return parsed
