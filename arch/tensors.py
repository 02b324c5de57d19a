"""Tensors in safetensors files, each read when it is asked for."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the most that a file holds, and that writing holds in memory

_DTYPES = {
  "BOOL": "bool",
  "U8": "uint8",
  "I8": "int8",
  "U16": "uint16",
  "I16": "int16",
  "F16": "float16",
  "BF16": "bfloat16",
  "U32": "uint32",
  "I32": "int32",
  "F32": "float32",
  "U64": "uint64",
  "I64": "int64",
  "F64": "float64",
}


class Tensor:
  """An array that is read, or computed from what is read, whenever `np.asarray` asks for it.

  A model larger than memory allows twice is converted one of these at a time.
  """

  def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
    self.shape, self.dtype, self._read = tuple(shape), jnp.dtype(dtype), read

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self._read(), dtype)

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def open_tensors(folder: Path) -> dict[str, Tensor]:
  """What `model.safetensors` in `folder` holds, or the files that its index lists.

  Raises:
    ValueError: if a file is missing, cut short or not a safetensors file, names the same tensor
      as another, or is not what the index says.
  """
  index = folder / INDEX
  if not index.exists():
    return _open_file(folder / FILE)
  try:
    placed = json.loads(index.read_text())["weight_map"]
    files = sorted(set(placed.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index} is no index of safetensors files: {error!r}") from error
  tensors: dict[str, Tensor] = {}
  for file in files:
    if Path(file).name != file:
      raise ValueError(f"{index} names {file!r}, expected a file in the same folder")
    held = _open_file(folder / file)
    twice = tensors.keys() & held.keys()
    missing = {name for name, place in placed.items() if place == file} - held.keys()
    if twice or missing:
      problem = "holds again" if twice else "does not hold"
      raise ValueError(f"{folder / file} {problem} {', '.join(sorted(twice or missing))}")
    tensors |= held
  return tensors


def save_tensors(
  folder: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
  """Writes array-likes to `model.safetensors` in `folder`, or to several files and their index.

  The tensors of one file, at most `SHARD_BYTES` unless one alone is larger, are in memory at once.
  """
  shards = list(_shards(tensors))
  if len(shards) == 1:
    files = [FILE]
  else:
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  for file, names in zip(files, shards, strict=True):
    # In C order: the library writes an array's memory as it lies.
    arrays = {name: np.asarray(tensors[name], order="C") for name in names}
    save_file(arrays, folder / file, metadata=metadata)


def _shards(tensors: Mapping[str, Any]) -> Iterator[list[str]]:
  names: list[str] = []
  size = 0
  for name, tensor in tensors.items():
    if names and size + tensor.nbytes > SHARD_BYTES:
      yield names
      names, size = [], 0
    names.append(name)
    size += tensor.nbytes
  yield names


def _open_file(path: Path) -> dict[str, Tensor]:
  try:
    file = safe_open(path, framework="numpy")
    names = file.keys()
    return {name: _tensor(file, name, path) for name in names}
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _tensor(file: Any, name: str, path: Path) -> Tensor:
  description = file.get_slice(name)
  dtype = description.get_dtype()
  if dtype not in _DTYPES:
    raise ValueError(f"{name} in {path} is {dtype}, expected one of {', '.join(_DTYPES)}")

  def read() -> np.ndarray:
    try:
      return file.get_tensor(name)
    except SafetensorError as error:
      raise ValueError(f"{name} in {path} cannot be read: {error}") from error

  return Tensor(description.get_shape(), _DTYPES[dtype], read)
