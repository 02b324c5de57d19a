"""The configuration every file in `configs/` starts from."""

import dataclasses
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ..models import fields
from ..models.registry import find
from .augmentation import Augmentation

LENGTHS = ("total_steps", "total_epochs", "total_tokens")  # of a run, of which one is given


def default_config(data: str | None = None, **model) -> ConfigDict:
  """All fields of a run with their defaults.

  `model` names the architecture and its options; those it leaves out are added, so that they can be
  overridden. What the architecture is trained for decides which fields there are, and of a
  classifier its data set: `"mnist"`, `"speech"` or `"tones"`.
  """
  options = fields(model)
  architecture = find(model["architecture"])
  if architecture.task == "language":
    if data is not None:
      raise ValueError(f"data is {data!r}, expected none: {model['architecture']} models language")
    task = _language()
  else:
    task = _classification(data or "mnist")
  evaluation = task.pop("eval")
  return ConfigDict(
    {
      "model": options,
      **task,
      "init_from": placeholder(str),  # start from a run, an exported folder or published weights
      "seed": 0,  # of parameters, data order and dropout
      "batch_size": 8,  # windows, or examples, in a step, over all devices
      "accumulate": 1,  # parts a step's batch is computed in, one after another
      "form": "chunkwise",  # algorithm of the training step
      "total_steps": placeholder(int),  # or one of the other `LENGTHS`
      "total_epochs": placeholder(float),
      "log_every_steps": 10,
      # Of an average of the parameters, which then is used; at first (1 + step) / (10 + step).
      "average_decay": placeholder(float),
      "mesh": "fsdp=-1",  # devices, as in data=2,fsdp=4; -1 is all the rest
      # Parameter names (regular expressions) and mesh axes.
      "sharding_rules": architecture.sharding_rules,
      "optimizer": {
        "name": "adamw",  # or lion, adafactor
        "learning_rate": 1e-3,  # at its peak
        "schedule": "cosine",  # or linear, exponential, rsqrt
        "warmup_steps": 100,  # linear from 0; at most a tenth of all steps
        "final_fraction": 0.1,  # of the peak, where all but rsqrt end
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 1.0,  # of the whole gradient
        # By parameter name, the first regular expression that is found in it: matrices decay.
        "weight_decay_multipliers": ((r"(kernel|embedding)$", 1.0), (r"", 0.0)),
        "learning_rate_multipliers": ((r"", 1.0),),
      },
      "eval": {
        "form": "chunkwise",
        "every_steps": 500,  # and at the last step
        **evaluation,
      },
      "checkpoint": {
        "every_steps": 500,  # and at the last step
        "keep": 3,  # of the newest
        "best": False,  # keep that of the lowest evaluation loss too, in best/
      },
      "compilation_cache": True,  # beside prepared data; off: compile anew each time
      "peak_flops": placeholder(float),  # FLOP/s of a device, for MFU; default known or measured
    }
  )


def keep_lengths(config: ConfigDict, given: Collection[str]) -> None:
  """Leaves of a run's lengths those `given`, if any: a flag's takes the place of a file's."""
  if any(name in given for name in LENGTHS):
    for name in LENGTHS:
      if name in config and name not in given:
        config[name] = None


def _language() -> dict[str, Any]:
  """What only language models have."""
  return {
    "data": {
      "name": "python_stdlib",  # the corpus, unless one of the next three is given
      "path": placeholder(str),  # a file or folder of text; .jsonl and .gz as well
      "tfds": placeholder(str),  # a TFDS text data set, such as lm1b or c4/en
      "mixture": placeholder(str),  # such as tfds:pg19=0.7,path:~/notes=0.3, shares of the tokens
      "split": placeholder(str),  # of TFDS sets, such as train[:1%]; default train
      "validation": placeholder(str),  # a path or a TFDS split; default see load_text
      "text_field": placeholder(str),  # of records; default found by rule
      "prompt_field": placeholder(str),  # of records; prompts are read, not trained on
      "workers": 0,  # processes that read batches ahead; 0: threads
      "tokenizer": "sentencepiece",  # or "bytes"
      "dir": placeholder(str),  # prepared data; default see arch/caches.py
    },
    "seq_len": 512,  # tokens in a training window
    "total_tokens": placeholder(int),
    "z_loss": 0.0,  # weight of the squared log-partition function
    "eval": {
      "max_tokens": placeholder(int),  # of the held-out documents; default all
      "seq_len": 512,  # tokens in a piece; the state is carried from piece to piece
      "batch_size": 16,  # rows the held-out text is cut into
    },
  }


def _classification(data: str) -> dict[str, Any]:
  """What only classifiers of sequences have."""
  sections = {"mnist": _MNIST, "speech": _SPEECH, "tones": _TONES}
  if data not in sections:
    raise ValueError(f"data is {data!r}, expected one of {', '.join(sections)}")
  audio = {} if data == "mnist" else {"augment": dataclasses.asdict(Augmentation())}
  return {
    "data": {
      "name": data,
      **sections[data],
      "workers": 0,  # processes that read batches ahead; 0: threads
    },
    "objective": "softmax",  # or sigmoid: every class by itself; evaluation is of softmax always
    "label_smoothing": 0.0,  # share of the targets that is divided among all classes
    **audio,  # what is done to clips in training, see `Augmentation`
    "eval": {
      "batch_size": 100,
    },
  }


_MNIST = {
  "path": placeholder(str),  # the folder with the data set's files
  "held_out": 5000,  # examples at the end of those to train on that are evaluated on instead
  "permutation_seed": placeholder(int),  # of the order of the pixels; default row by row
}
_SPEECH = {
  "path": placeholder(str),  # a folder of folders, one a word, or Speech Commands' archive
  "tfds": placeholder(str),  # in its place a TFDS data set, speech_commands, if TensorFlow is there
  "classes": "all",  # or "12": ten words, silence and unknown ones
  "seconds": 1.0,  # of a clip
  "sample_rate": 16000,  # hertz; other files are converted
  "on_bad": "error",  # or skip: go on without files that cannot be used
  "seed": 0,  # of what is chosen for silence and unknown words, and cuts of noise
  "dir": placeholder(str),  # prepared data; default see arch/caches.py
}
_TONES = {
  "examples": 2000,  # clips to train on; a quarter as many each to evaluate on
  "noise": 0.0,  # the lowest ratio of a word to its noise, in decibels
  "seed": 0,
}
