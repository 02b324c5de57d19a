"""Which name was meant."""

import difflib
from collections.abc import Iterable

_LIKE = 0.7  # how alike names must be for one to be a guess at the other


def closest(name: str, known: Iterable[str]) -> str | None:
  """The name in `known` most like `name`, or `None` if none is like it.

  Names may be dotted. Their last parts are compared first, where the initials or a whole word are
  as good as a typing mistake; among those, the section decides: `optimizer.lr` and `learning_rate`
  are `optimizer.learning_rate`.
  """
  section, _, last = name.rpartition(".")

  def likeness(candidate: str) -> float:
    its_section, _, its_last = candidate.rpartition(".")
    return _likeness(last, its_last) + 0.1 * _ratio(section, its_section)

  alike = [n for n in known if _likeness(last, n.rpartition(".")[2]) >= _LIKE]
  return max(alike, key=likeness, default=None)


def _likeness(name: str, candidate: str) -> float:
  words = candidate.split("_")
  if len(words) > 1 and name == "".join(word[0] for word in words if word):
    return 0.9
  shared = set(name.split("_")) & set(words)
  whole = 0.8 * bool(shared) + 0.2 * sum(map(len, shared)) / max(len(name), len(candidate))
  return max(whole - 0.1, _ratio(name, candidate))


def _ratio(a: str, b: str) -> float:
  return 1.0 if a == b else difflib.SequenceMatcher(None, a, b).ratio()
