"""The checkpoint of the lowest evaluation loss."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..layout import to_stacked
from .checkpoints import Checkpoints, has_checkpoint, restore


class Best:
  """Keeps in `folder` one checkpoint, that of the lowest loss it was offered. A context manager.

  A run that is resumed goes on with the lowest loss it had.
  """

  def __init__(self, folder: Path, *, enabled: bool):
    self._checkpoints = Checkpoints(folder, keep=1) if enabled else None
    self._loss = math.inf
    if enabled and has_checkpoint(folder):
      like = {"evaluation_loss": jax.ShapeDtypeStruct((), np.float64)}
      self._loss = float(restore(folder, like)[1]["evaluation_loss"])

  def __enter__(self) -> "Best":
    return self

  def __exit__(self, *exc_info) -> None:
    if self._checkpoints is not None:
      self._checkpoints.close()

  def offer(self, step: int, loss: float, state: Any) -> None:
    if self._checkpoints is not None and loss < self._loss:
      self._loss = loss
      leaves = to_stacked(state)
      self._checkpoints.save(step, {"evaluation_loss": np.float64(loss), **leaves})
