"""Cache files: named by content, and either absent or whole."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


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
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
