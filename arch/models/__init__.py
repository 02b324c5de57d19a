"""Models by name."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from flax import nnx

from ..interface import SequenceModule
from .retnet import RetNet

ARCHITECTURES = {"retnet": RetNet}


def build(config: Mapping[str, Any], *, rngs: nnx.Rngs) -> SequenceModule:
  """The model that `config` describes: `architecture` names it, the rest are its arguments.

  `config` is the `model` section of any file in `configs/`, complete by itself.
  Raises `ValueError` for an unknown architecture or option, naming the closest valid one.
  """
  options = dict(config)
  architecture = options.pop("architecture", None)
  if architecture not in ARCHITECTURES:
    known = ", ".join(ARCHITECTURES)
    raise ValueError(f"architecture is {architecture!r}, expected one of {known}")
  model = ARCHITECTURES[architecture]
  known = set(inspect.signature(model.__init__).parameters) - {"self", "rngs"}
  for name in set(options) - known:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"
    raise ValueError(f"model option {name!r} is unknown to {architecture}{hint}")
  return model(**options, rngs=rngs)
