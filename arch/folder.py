"""The exported folder: a trained model in files that need neither optimizer nor orbax.

    FOLDER/config.json         format version, configuration, digest of every tensor and file
    FOLDER/model.safetensors   parameters and statistics, named and stacked as in `arch.layout`
    FOLDER/tokenizer/          of a language model
    FOLDER/labels.json         of a classifier, in the place of a tokenizer; see `arch.vocabulary`

Models of more than `tensors.SHARD_BYTES` are in several safetensors files with their index.
Nothing here is ever unpickled.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from .models import complete
from .tensors import Tensor, open_tensors, save_tensors
from .training.config_json import decode_config, encode_config
from .vocabulary import Vocabulary, load_vocabulary, save_vocabulary

FORMAT, VERSION = "triform", 1
_FIELDS = {
  "version": int,
  "triform": str,
  "step": int,
  "config": dict,
  "tensors": dict,
  "files": dict,
}


class Saved(NamedTuple):
  """A trained model as it was found, not read yet."""

  config: Mapping[str, Any]  # of the run; `model` at least
  step: int | None
  tensors: dict[str, Any]  # array-likes by name, see `arch.layout`
  vocabulary: Vocabulary | None


def is_folder(path: Path) -> bool:
  """Whether `path` is an exported folder, readable or not."""
  try:
    return json.loads((path / "config.json").read_text()).get("format") == FORMAT
  except (OSError, ValueError, AttributeError):
    return False


def write_folder(
  folder: str | os.PathLike,
  *,
  config: ConfigDict,
  tensors: Mapping[str, Any],
  vocabulary: Vocabulary,
  step: int,
) -> None:
  """Writes an exported folder, which appears under its name only once it is whole.

  Args:
    folder: where to; an exported folder that is there is replaced, anything else refused.
    config: the whole configuration of the run; `config.model` is completed with the defaults.
    tensors: array-likes by name, see `arch.layout`. One file's worth is in memory at a time.
    vocabulary: the run's tokenizer, or the labels of a classifier.
    step: after how many steps.

  Raises:
    ValueError: if `folder` holds something that is not an exported folder.
  """
  folder = Path(folder).resolve()
  check_replaceable(folder)
  config = ConfigDict(config).copy_and_resolve_references()
  config.model = ConfigDict(complete(config.model))
  partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
  partial.mkdir(parents=True)
  try:
    digests: dict[str, dict] = {}
    save_tensors(
      partial, {name: _recorded(name, tensor, digests) for name, tensor in tensors.items()}
    )
    weights = {path.name for path in partial.iterdir()}
    save_vocabulary(partial, vocabulary)
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
      files[path.relative_to(partial).as_posix()] = {"size": path.stat().st_size} | (
        {} if path.name in weights else {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
      )
    description = {
      "format": FORMAT,
      "version": VERSION,
      "triform": importlib.metadata.version("triform"),
      "step": step,
      "config": encode_config(config),
      "tensors": digests,
      "files": files,
    }
    (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    for path in [*partial.rglob("*"), partial]:  # or the new name may reach the disk before them
      _sync(path)
    _put_in_place(partial, folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def read_folder(folder: str | os.PathLike) -> Saved:
  """Opens an exported folder; its tensors are read, and their digests checked, when asked for.

  Raises:
    ValueError: if it was written by a newer version, or a file or tensor in it is missing, left
      over, cut short, or not the one that was written.
  """
  folder = Path(folder)
  description = _description(folder)
  for name, recorded in description["files"].items():
    _check_file(folder, name, recorded)
  held, recorded = open_tensors(folder), description["tensors"]
  tensors = {}
  for name in sorted(held.keys() | recorded.keys()):
    if name not in recorded or name not in held:
      where = "its files" if name in held else "config.json"
      raise ValueError(f"{folder}: tensor {name} is in {where} alone")
    tensors[name] = _checked(folder, name, held[name], recorded[name])
  config = decode_config(description["config"])
  return Saved(config, description["step"], tensors, load_vocabulary(folder))


def read_config(folder: str | os.PathLike) -> ConfigDict:
  """The configuration in an exported folder, without a look at its tensors."""
  return decode_config(_description(Path(folder))["config"])


def check_replaceable(folder: Path) -> None:
  """Raises `ValueError` if an exported folder may not be written to `folder`."""
  if folder.exists() and not is_folder(folder) and not _is_empty(folder):
    raise ValueError(
      f"{folder} exists and is not an exported folder: expected one, or a new or empty folder"
    )


def _is_empty(folder: Path) -> bool:
  return folder.is_dir() and not any(folder.iterdir())


def _put_in_place(partial: Path, folder: Path) -> None:
  if folder.exists():
    replaced = folder.with_name(f"{partial.name}.replaced")
    folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced)
  else:
    partial.rename(folder)
  _sync(folder.parent)


def _sync(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.asarray(array, order="C").reshape(-1).view(np.uint8)).hexdigest()


def _recorded(name: str, tensor: Any, digests: dict[str, dict]) -> Tensor:
  """`tensor`, whose description enters `digests` when it is read."""

  def read() -> np.ndarray:
    array = np.asarray(tensor)
    digests[name] = {
      "shape": list(array.shape),
      "dtype": array.dtype.name,
      "sha256": _digest(array),
    }
    return array

  return Tensor(tensor.shape, tensor.dtype, read)


def _checked(folder: Path, name: str, tensor: Tensor, recorded: Any) -> Tensor:
  """`tensor`, which is compared to what was recorded: its contents when it is read."""
  place = f"{folder}: tensor {name}"
  try:
    shape, dtype, digest = (recorded[field] for field in ("shape", "dtype", "sha256"))
  except (KeyError, TypeError) as error:
    raise ValueError(f"{place} is described by {recorded} in config.json") from error
  if [tensor.dtype.name, list(tensor.shape)] != [dtype, shape]:
    raise ValueError(f"{place} is {tensor.dtype}{list(tensor.shape)}, expected {dtype}{shape}")

  def read() -> np.ndarray:
    array = np.asarray(tensor)
    found = _digest(array)
    if found != digest:
      raise ValueError(f"{place} is damaged: its sha256 is {found}, expected {digest}")
    return array

  return Tensor(tensor.shape, tensor.dtype, read)


def _check_file(folder: Path, name: str, recorded: Any) -> None:
  path = folder / name
  inside = not Path(name).is_absolute() and ".." not in Path(name).parts
  if not inside or not isinstance(recorded, dict) or "size" not in recorded:
    raise ValueError(f"{folder / 'config.json'} names {name!r} with {recorded}")
  if not path.is_file():
    raise ValueError(f"{path} is missing")
  size = path.stat().st_size
  if size != recorded["size"]:
    raise ValueError(f"{path} has {size} bytes, expected {recorded['size']}")
  if "sha256" in recorded:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != recorded["sha256"]:
      raise ValueError(f"{path} is damaged: its sha256 is {found}, expected {recorded['sha256']}")


def _description(folder: Path) -> dict[str, Any]:
  path = folder / "config.json"
  try:
    description = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if not isinstance(description, dict) or description.get("format") != FORMAT:
    raise ValueError(f"{path} is not that of an exported folder: it has no format {FORMAT!r}")
  version = description.get("version")
  if isinstance(version, int) and version > VERSION:
    raise ValueError(
      f"{folder} has folder version {version}, written by triform "
      f"{description.get('triform', 'unknown')}; this triform reads versions up to {VERSION}"
    )
  for field, kind in _FIELDS.items():
    if not isinstance(description.get(field), kind):
      found = description.get(field)
      raise ValueError(f"{path}: {field} is {found!r}, expected {kind.__name__}")
  if not isinstance(description["config"].get("model"), dict):
    raise ValueError(f"{path}: config has no model")
  return description
