"""All that is different between runs that learn different things."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ...data.batches import ShuffledBatches
from ...interface import SequenceModule
from ...vocabulary import Vocabulary
from ..losses import Sums


class Task:
  """The data of a run, its loss, and what is measured.

  Attributes:
    unit: what rates count, a row of `targets` in a batch: "tokens", "examples".
    evaluated: what is logged of an evaluation.
    vocabulary: what is kept beside the model.
    identity: of the data, for processes that have to agree: what it is of, and a text that differs
      where they do.

  Args:
    config: of the run.
    vocabulary: that of the run so far, or of the parameters it starts from, if there are any.

  Raises:
    ValueError: whatever is wrong with the data, before any work.
  """

  unit: str
  evaluated: tuple[str, ...]
  vocabulary: Vocabulary
  identity: tuple[str, str]

  def __init__(self, config: ConfigDict, vocabulary: Vocabulary | None = None):
    raise NotImplementedError

  @staticmethod
  def loss(config: ConfigDict, devices: int) -> Callable[..., Sums]:
    """The loss of the training step, see `losses`; needs no data."""
    raise NotImplementedError

  def batches(self, host: int, num_hosts: int) -> ShuffledBatches:
    """Batches to train on, each a function of the seed, the step and the host."""
    raise NotImplementedError

  def flops_per_unit(self) -> float:
    """Operations of a training step for each unit, see `flops.train_flops_per_token`."""
    raise NotImplementedError

  def measures(self, batch: dict[str, np.ndarray], metrics: dict[str, float]) -> dict[str, float]:
    """What is logged of a training step first, from this host's batch and the step's metrics."""
    raise NotImplementedError

  def evaluate(self, model: SequenceModule) -> dict[str, Any]:
    """`loss` and more of the model on examples that are not trained on."""
    raise NotImplementedError
