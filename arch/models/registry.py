"""The architectures there are: a file that registers one is all that a new one takes.

    @register("mine", small={"d_model": 8, ...})
    class Mine(LanguageModel): ...

Trainer, evaluator, generation, exported folders and configurations build models by that name; the
laws and the counter of operations are tested on `small`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from ..interface import SequenceModule
from ..sharding import RULES

Task = Literal["language", "classification"]

# How a model is computed and trained; any other option says which function it is.
FREE_OPTIONS = frozenset({"chunk_size", "dropout", "dtype", "param_dtype", "remat", "scan_layers"})


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A kind of model; see `register`."""

  model: type[SequenceModule]
  task: Task = "language"
  small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  free_options: frozenset[str] = FREE_OPTIONS
  sharding_rules: Sequence[tuple[str, Sequence[str | None]]] = RULES


ARCHITECTURES: dict[str, Architecture] = {}


def register(
  name: str,
  *,
  small: Mapping[str, Any],
  task: Task = "language",
  free_options: Iterable[str] = (),
  sharding_rules: Sequence[tuple[str, Sequence[str | None]]] = (),
) -> Callable[[type[SequenceModule]], type[SequenceModule]]:
  """Registers the model class that it decorates.

  Args:
    name: `architecture` in configurations.
    small: options of a model to test: two layers of width 8, 32 token ids, chunks of 4 tokens.
    task: what the trainer trains it for: "language", token ids `[b, t]` to logits of the next ones
      `[b, t, vocab_size]`; "classification", sequences `[b, t, channels]` to logits of the classes
      `[b, num_classes]`.
    free_options: options that change how, not what, is computed, beside `FREE_OPTIONS`.
    sharding_rules: of parameters with names of their own, before `sharding.RULES`.

  Raises:
    ValueError: for an unknown task, or if another class has that name.
  """
  if task not in get_args(Task):
    raise ValueError(f"task is {task!r}, expected one of {', '.join(get_args(Task))}")

  def add(model: type[SequenceModule]) -> type[SequenceModule]:
    known = ARCHITECTURES.get(name)
    if known is not None and known.model.__qualname__ != model.__qualname__:  # not a file run again
      raise ValueError(f"architecture {name!r} is {known.model.__qualname__} already")
    ARCHITECTURES[name] = Architecture(
      model, task, small, FREE_OPTIONS.union(free_options), (*sharding_rules, *RULES)
    )
    return model

  return add


def find(name: Any) -> Architecture:
  """Raises `ValueError` for a name that is not registered."""
  if name not in ARCHITECTURES:
    known = ", ".join(sorted(ARCHITECTURES))
    raise ValueError(f"architecture is {name!r}, expected one of {known}")
  return ARCHITECTURES[name]
