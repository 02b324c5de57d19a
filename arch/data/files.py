"""Cache files and folders: named by content, and either absent or whole."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


def content_hash(texts: Iterable[str]) -> str:
  """A hash of the texts and of where each of them ends."""
  digest = hashlib.sha256()
  for text in texts:
    data = text.encode("utf-8")
    digest.update(len(data).to_bytes(8, "little") + data)
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
  """Opens a file that appears under `path` only once the block has finished.

  A process killed half-way leaves nothing under `path`, and of two processes writing the same file
  the last one wins whole. The folder is created if need be.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    with temporary.open("xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # or the name may reach the disk before the contents
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def prepared_folder(folder: Path, prepare: Callable[[Path], None]) -> Path:
  """Returns `folder`, after `prepare(temporary)` has filled it if it was not there.

  The folder appears when all of it is written. Of several processes one prepares and the others
  wait; what a killed one left behind is removed by the next.
  """
  if folder.is_dir():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with folder.with_name(f".{folder.name}.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it does
    if not folder.is_dir():
      temporary = folder.with_name(f".{folder.name}.partial")
      shutil.rmtree(temporary, ignore_errors=True)
      temporary.mkdir()
      try:
        prepare(temporary)
        temporary.rename(folder)
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
  return folder


class ArrayWriter:
  """Writes a one-dimensional `.npy` file piece by piece, without knowing its length."""

  def __init__(self, path: Path, dtype: np.dtype):
    self._dtype, self._count = np.dtype(dtype), 0
    self._file = path.open("wb")
    self._write_header()

  def append(self, values: np.ndarray) -> None:  # [n]
    self._file.write(values.astype(self._dtype, copy=False).tobytes())
    self._count += len(values)

  def close(self) -> None:
    self._file.seek(0)
    self._write_header()
    self._file.close()

  def __enter__(self) -> "ArrayWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _write_header(self) -> None:
    # NumPy pads headers so that the first axis can grow without moving the data.
    description = np.lib.format.dtype_to_descr(self._dtype)
    header = {"descr": description, "fortran_order": False, "shape": (self._count,)}
    np.lib.format.write_array_header_1_0(self._file, header)
