"""Trained models from where they are kept: work directories, exported folders, published weights.

Imports inside functions keep `import triform.arch` free of orbax and sentencepiece.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from .assembly import check_leaves, expected_leaves, fill
from .interface import SequenceModule
from .models import build, complete, laid_out
from .models.registry import find

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from .folder import Saved
  from .vocabulary import Vocabulary


def load(
  path: str | os.PathLike,
  *,
  step: int | None = None,
  best: bool = False,
  config: Mapping[str, Any] | None = None,
) -> tuple[SequenceModule, "Vocabulary"]:
  """Returns a trained model and its tokenizer, `model, tokenizer = load(path)`.

  With a classifier come, instead of a tokenizer, the names of its classes, a tuple in the order of
  its logits: `model, labels = load(path)`.

  `path` is an exported folder or the work directory of a run. Of a run, the newest checkpoint (or
  that of `step`, or with `best` that of the lowest evaluation loss) is read without the optimizer,
  the averaged parameters where it kept an average.
  Layers are unrolled, which is how decoding is fast. `config` replaces the run's own, to change
  what does not shape the parameters (such as `config.model.dtype`).

  Raises:
    ValueError: if `path` is neither, has no such checkpoint, is damaged, was written by a newer
      version, or does not fit `config`; what is at fault is named.
  """
  saved = _open(Path(path), step, best)
  model = saved.config["model"] if config is None else config["model"]
  options = laid_out(model, scan_layers=False)
  check_leaves(path, saved.tensors, expected_leaves(options), dtypes=config is None)
  return fill(options, saved.tensors), saved.vocabulary


def load_config(path: str | os.PathLike) -> "ConfigDict":
  """The configuration of the run in a work directory, or that an exported folder came from."""
  from . import folder
  from .training import workdir

  path = Path(path)
  return folder.read_config(path) if folder.is_folder(path) else workdir.load_config(path)


class InitialParameters(NamedTuple):
  """Where a training run starts that does not start from random parameters."""

  leaves: dict[str, np.ndarray]  # by name as in `arch.layout`, under `params/` and `variables/`
  vocabulary: "Vocabulary | None"  # whose ids they know; None if it did not come with them


def initial_parameters(path: str | os.PathLike, model: Mapping[str, Any]) -> InitialParameters:
  """Reads the parameters, and statistics, from which to train the model of the section `model`.

  Args:
    path: a work directory (its newest checkpoint), an exported folder, the folder of a Hugging Face
      model of flash-linear-attention (with `tokenizer.model`, if it has one), or a torchscale state
      dict: a folder with torchscale's options in `config.json` beside `model.safetensors` or
      `model.npz`.
    model: the `model` section of the run's configuration. Options that say how a model is
      computed or trained are free; in all others it must be the function that was trained.

  Returns:
    Arrays in host memory, in the dtypes that `model` has, and the tokenizer or labels.

  Raises:
    ValueError: as `load` does, or listing every option, name and shape that differs.
  """
  from .interop.saved import open_published

  saved = open_published(Path(path)) or _open(Path(path))
  _check_options(path, saved.config["model"], model)
  expected = expected_leaves(model)
  check_leaves(path, saved.tensors, expected, dtypes=False)
  leaves = {name: np.asarray(saved.tensors[name], leaf.dtype) for name, leaf in expected.items()}
  return InitialParameters(leaves, saved.vocabulary)


def open_workdir(workdir: Path, step: int | None = None, best: bool = False) -> "Saved":
  """What is trained of a run, in host memory; averaged parameters are called `params/...` too."""
  from .folder import Saved
  from .training import workdir as workdirs
  from .training.checkpoints import restore
  from .vocabulary import load_vocabulary

  config = workdirs.load_config(workdir)
  if "model" not in config:
    raise ValueError(f"{workdir}/config.json has no model: expected a run or an exported folder")
  expected = expected_leaves(config.model)

  def wanted(saved: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    kept = "average/" if any(name.startswith("average/") for name in saved) else "params/"
    return {
      # Orbax restores to the host what it is shown as NumPy; this one takes no memory.
      name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
      for name, leaf in saved.items()
      if name.startswith(kept) or (name.startswith("variables/") and name in expected)
    }

  step, leaves = restore(workdir / ("best" if best else "checkpoints"), wanted, step)
  tensors = {name.replace("average/", "params/", 1): leaf for name, leaf in leaves.items()}
  return Saved(config, step, tensors, load_vocabulary(workdir))


def _open(path: Path, step: int | None = None, best: bool = False) -> "Saved":
  from .folder import is_folder, read_folder

  if not is_folder(path):
    return open_workdir(path, step, best)
  saved = read_folder(path)
  if step not in (None, saved.step):
    raise ValueError(f"{path} holds the model after step {saved.step}, not {step}")
  return saved


def _check_options(path: Any, trained: Mapping[str, Any], model: Mapping[str, Any]) -> None:
  """Raises `ValueError` listing the options by which two models are different functions."""
  free = find(model.get("architecture")).free_options
  kept = {name: option for name, option in model.items() if name in free}
  trained, model = complete({**trained, **kept}), complete(model)
  differing = {
    name: (trained.get(name), model.get(name))
    for name in sorted((trained.keys() | model.keys()) - free)
    if trained.get(name) != model.get(name)
  }
  if _structure(trained) == _structure(model):  # then None is but another way to say its default
    differing = {name: sides for name, sides in differing.items() if None not in sides}
  if differing:
    lines = [f"  model.{name}: {a!r}, given {b!r}" for name, (a, b) in differing.items()]
    raise ValueError(f"{path} is of another model; it has\n" + "\n".join(lines))


def _structure(model: Mapping[str, Any]) -> nnx.GraphDef:
  return nnx.graphdef(nnx.eval_shape(lambda: build(model, rngs=nnx.Rngs(0))))
