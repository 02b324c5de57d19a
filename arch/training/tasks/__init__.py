"""What runs can learn: the next token of a text, or the class of a sequence.

The loop, checkpoints, the mesh and metrics know of a run's task only what `task.Task` says.
"""

from ...models.registry import find
from .classification import Classification
from .language import Language
from .task import Task

__all__ = ["Task", "task_of"]

_TASKS: dict[str, type[Task]] = {"classification": Classification, "language": Language}


def task_of(architecture: str) -> type[Task]:
  """The task that models of `architecture` are trained for."""
  return _TASKS[find(architecture).task]
