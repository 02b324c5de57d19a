"""Classification: which of some classes a whole sequence is of."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from ml_collections import ConfigDict

from ... import flops
from ...data.batches import Rows, ShuffledBatches
from ...data.mnist import Mnist
from ...data.speech import SpeechCommands
from ...data.tones import Tones
from ...evaluation import evaluate_classifier
from ..augmentation import Augmentation
from ..losses import Objective, class_loss
from .task import Task

_DATA_SETS = {"mnist": Mnist, "speech": SpeechCommands, "tones": Tones}


class LabelledData(Protocol):
  """Sequences with their classes.

  A row of `examples` is `inputs` `[t, channels]`, or int16 samples `[t]`, `targets`, the number of
  its class, `loss_mask`, true, and where sequences are padded `mask` `[t]`; of those to train on,
  `noise` `[t]` where there are recordings of some, see `Augmentation`.

  Attributes:
    labels: the names of the classes, in their order.
    length: steps of a sequence.
  """

  labels: tuple[str, ...]
  length: int

  def examples(self, split: Literal["train", "validation", "test"]) -> Rows: ...


def load_examples(config: Mapping[str, Any], labels: tuple[str, ...] | None = None) -> LabelledData:
  """The data set that the `data` section of a configuration names.

  Args:
    config: `name` of the data set; the rest are its arguments, but for `workers`.
    labels: the classes that a trained model knows.

  Raises:
    ValueError: if there is no such data set, what it is read from is not as expected, or it has
      other classes.
  """
  options = {key: value for key, value in config.items() if key not in ("name", "workers")}
  if config["name"] not in _DATA_SETS:
    known = ", ".join(_DATA_SETS)
    raise ValueError(f"data.name is {config['name']!r}, expected one of {known}")
  data = _DATA_SETS[config["name"]](**options)
  if labels not in (None, data.labels):
    raise ValueError(
      f"the model knows the classes {', '.join(labels)}, expected those of the data, "
      f"{', '.join(data.labels)}"
    )
  return data


class Classification(Task):
  """The data is `LabelledData`; what is kept beside the model are the labels."""

  unit = "examples"
  evaluated = ("loss", "accuracy")

  def __init__(self, config, vocabulary=None):
    self._config = config
    self._data = load_examples(config.data, vocabulary)
    self.vocabulary = self._data.labels
    if config.model.num_classes != len(self.vocabulary):
      raise ValueError(
        f"model.num_classes is {config.model.num_classes}, expected that of {config.data.name}, "
        f"{len(self.vocabulary)}"
      )
    rate, wanted = config.data.get("sample_rate", 16000), _sample_frequency(config.model)
    if wanted is None and "augment" in config:
      raise ValueError(
        f"model.front_end is None, expected one for samples of {config.data.name}, such as fbank"
      )
    if wanted not in (None, rate):
      raise ValueError(
        f"model.front_end takes {wanted:g} samples a second, expected those of the data, {rate}"
      )
    self._train, self._validation = map(self._data.examples, ("train", "validation"))
    sizes = len(self._train), len(self._validation)
    self.identity = "the data", f"{self.vocabulary} {sizes}"

  @staticmethod
  def loss(config: ConfigDict, devices: int):
    if config.objective not in get_args(Objective):
      known = ", ".join(get_args(Objective))
      raise ValueError(f"objective is {config.objective!r}, expected one of {known}")
    augment = None if "augment" not in config else Augmentation(**config.augment)
    return functools.partial(
      class_loss,
      label_smoothing=config.label_smoothing,
      objective=config.objective,
      augment=augment,
    )

  def batches(self, host, num_hosts):
    return ShuffledBatches(
      [self._train],
      batch_size=self._config.batch_size,
      seed=self._config.seed,
      host=host,
      num_hosts=num_hosts,
      workers=self._config.data.workers,
    )

  def flops_per_unit(self):
    config, length = self._config, self._data.length
    return flops.train_flops_per_token(config.model, length, config.form) * length

  def measures(self, batch, metrics):
    return {name: metrics[name] for name in self.evaluated}

  def evaluate(self, model):
    options = {k: v for k, v in self._config.eval.items() if k != "every_steps"}
    return evaluate_classifier(model, self._validation, **options)


def _sample_frequency(model: ConfigDict) -> float | None:
  """Of a model of audio."""
  front_end = getattr(flops.abstract_model(model), "front_end", None)
  return None if front_end is None else front_end.analysis.sample_frequency
