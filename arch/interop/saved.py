"""Published checkpoints on disk, as runs may start from them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..folder import Saved
from ..tensors import FILE, INDEX, open_tensors
from . import fla, torchscale
from .huggingface import CONFIG, read_config, read_folder
from .tokenizer import read_tokenizer

ARRAYS = "model.npz"


def open_published(folder: Path) -> Saved | None:
  """The checkpoint in `folder`, not read yet, or `None` if it is not another library's.

  Of flash-linear-attention a Hugging Face folder; of torchscale its options in `config.json`
  beside the state dict in `model.safetensors` or `model.npz`.
  """
  if not (folder / CONFIG).exists():
    return None
  config = read_config(folder)
  if "model_type" in config:
    model, leaves = fla.read(*read_folder(folder))
    return Saved({"model": model}, None, leaves, read_tokenizer(folder, model["vocab_size"]))
  if any(name.startswith("decoder_") for name in config):
    model, leaves = torchscale.read(config, _state_dict(folder))
    return Saved({"model": model}, None, leaves, None)
  return None


def _state_dict(folder: Path) -> Mapping[str, Any]:
  if (folder / FILE).exists() or (folder / INDEX).exists():
    return open_tensors(folder)
  path = folder / ARRAYS
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
