"""RetNet models of flash-linear-attention in Hugging Face folders."""

import json
import os
from pathlib import Path
from typing import Any

from ..models.retnet import RetNet
from ..tensors import FILE, INDEX, Tensor, open_tensors, save_tensors
from . import fla

CONFIG = "config.json"


def load_fla(path: str | os.PathLike, **options) -> RetNet:
  """The language model in the Hugging Face folder `path`, or in the Hub repository of that name.

      model = load_fla("fla-hub/retnet-1.3B-100B", dtype="bfloat16")
      logits, state = model(ids, form="chunkwise")

  Reads `config.json` and `model.safetensors`, or the files that `model.safetensors.index.json`
  lists, tensor by tensor. A repository is downloaded by `huggingface_hub`, where that is installed
  (`pip install triform[hub]`). See `from_fla` for `options` and what is refused.
  """
  return fla.from_fla(*read_folder(_find(path)), **options)


def save_fla(model: RetNet, path: str | os.PathLike) -> None:
  """Writes `model` as a Hugging Face folder that fla loads, in the dtype of its parameters.

  Raises `ValueError` if `path` is there already and not empty, or for a model that fla's RetNet
  cannot be, naming the option.
  """
  path = Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path} exists, expected a new or empty folder")
  config, params = fla.write(model)
  path.mkdir(parents=True, exist_ok=True)
  save_tensors(path, params, metadata={"format": "pt"})  # without it transformers refuses the file
  (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The configuration of an fla RetNet and its parameters, not read yet."""
  config = read_config(folder)
  if config.get("model_type") != "retnet":
    raise ValueError(
      f"{folder / CONFIG} has model_type {config.get('model_type')!r}, expected 'retnet'"
    )
  if not (folder / FILE).exists() and not (folder / INDEX).exists():
    raise ValueError(f"{folder} has neither {FILE} nor {INDEX}: only safetensors are read")
  return config, open_tensors(folder)


def read_config(folder: Path) -> dict[str, Any]:
  """The options in a checkpoint's `config.json`."""
  path = folder / CONFIG
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path} is {config!r}, expected an object")
  return config


def _find(path: str | os.PathLike) -> Path:
  """`path`, or where the Hub repository of that name has been downloaded to."""
  if Path(path).exists():
    return Path(path)
  owner, slash, name = str(path).partition("/")
  if not (slash and owner and name) or "/" in name or owner in (".", "..", "~"):
    raise ValueError(f"{path} not found: expected a folder, or a Hub repository 'owner/name'")
  try:
    from huggingface_hub import snapshot_download
  except ImportError as error:
    raise ValueError(
      f"{path} is no folder here; to read it from the Hub, pip install 'triform[hub]'"
    ) from error
  try:
    patterns = [CONFIG, "*.safetensors", INDEX, "tokenizer.model"]
    return Path(snapshot_download(str(path), allow_patterns=patterns))
  except (OSError, ValueError) as error:  # its own errors are among these
    reason = str(error).strip().splitlines()[0]
    raise ValueError(
      f"{path} is no folder here and cannot be had from the Hub: {reason}"
    ) from error
