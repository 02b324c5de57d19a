"""The files of a data set of spoken words: a folder for every word, or an archive of such folders.

    yes/0a7c2a8d_nohash_0.wav     a clip of a word, WAV or FLAC
    _background_noise_/*.wav      long recordings without words
    testing_list.txt, ...         what is in which split, see `speech_lists`

All else that lies there, such as a licence, is left alone.
"""

import contextlib
import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from .audio_files import ENDINGS, BadAudioError
from .files import content_hash
from .speech_lists import Clip, is_list, split_clips

NOISE = "_background_noise_"

_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_LONGEST_LIST = 2**28  # bytes


class Files(Protocol):
  """Files by their paths, `label/name` or `name`; `size` tells how many bytes one has."""

  name: str
  paths: list[str]

  def size(self, path: str) -> int: ...

  def read(self, path: str) -> bytes: ...


class Folder:
  """`Files` under a folder; hidden ones and those further down do not count."""

  def __init__(self, path: Path):
    self.name, self._path = str(path), path
    self._status = {}
    try:
      for entry in path.iterdir():
        if entry.name.startswith("."):
          continue
        inside = entry.iterdir() if entry.is_dir() else [entry]
        for file in inside:
          if not file.name.startswith(".") and file.is_file():
            self._status[file.relative_to(path).as_posix()] = file.stat()
    except OSError as error:
      raise ValueError(f"{path} cannot be listed: {error}") from error
    self.paths = sorted(self._status)

  def size(self, path: str) -> int:
    return self._status[path].st_size

  def stamps(self) -> Iterator[str]:
    """What changes when the files do."""
    for path in self.paths:
      status = self._status[path]
      yield f"{path} {status.st_size} {status.st_mtime_ns}"

  def read(self, path: str) -> bytes:
    try:
      return (self._path / path).read_bytes()
    except OSError as error:
      reason = error.strerror or error
      raise BadAudioError(f"{path} cannot be read: {reason}", "unreadable") from error


class _Archive:
  """`Files` in an open, uncompressed archive, of which the last of one name counts."""

  def __init__(self, path: Path, tar: tarfile.TarFile):
    self.name, self._tar = str(path), tar
    self._members = {}
    for member in tar:
      name = member.name.removeprefix("./")
      parts = name.split("/")
      if member.isfile() and len(parts) <= 2 and not any(p.startswith(".") for p in parts):
        self._members[name] = member
    self.paths = sorted(self._members)

  def size(self, path: str) -> int:
    return self._members[path].size

  def read(self, path: str) -> bytes:
    try:
      return self._tar.extractfile(self._members[path]).read()
    except (OSError, EOFError, tarfile.TarError) as error:
      raise BadAudioError(f"{path} cannot be read: {error}", "unreadable") from error


def check_path(path: str | Path) -> Path:
  """The folder or archive that `path` names.

  Raises:
    ValueError: if it is neither.
  """
  found = Path(path).expanduser()
  if found.is_dir() or (found.is_file() and found.name.endswith(_ARCHIVES)):
    return found
  raise ValueError(
    f"data.path is {path}, expected a folder with a folder of clips for every word, or an archive "
    f"of that ({', '.join(_ARCHIVES)})"
  )


def identity(path: Path) -> str:
  """A hash of what changes with the folder or archive; it is not opened, where it may take long."""
  if path.is_dir():
    return content_hash(Folder(path).stamps())
  status = path.stat()
  return content_hash([path.name, str(status.st_size), str(status.st_mtime_ns)])


@contextlib.contextmanager
def opened(path: Path, scratch: Path) -> Iterator[Files]:
  """The files in a folder or archive.

  Args:
    path: of it.
    scratch: a folder with room for what a compressed archive holds, for as long as it is open.

  Raises:
    ValueError: if it cannot be read.
  """
  if path.is_dir():
    yield Folder(path)
    return
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(path.open("rb"))
      if file.read(2) == b"\x1f\x8b":
        # Uncompressed, members are found and read in any order.
        file.seek(0)
        plain = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        with gzip.GzipFile(fileobj=file) as content:
          shutil.copyfileobj(content, plain, 2**20)
        file = plain
      file.seek(0)
      archive = _Archive(path, stack.enter_context(tarfile.open(fileobj=file, mode="r:")))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
      raise ValueError(f"{path} cannot be read: {error}") from error
    yield archive


def find_clips(files: Files) -> tuple[dict[str, list[Clip]], list[str]]:
  """The clips of every split, and the paths of the recordings of noise.

  Raises:
    ValueError: if there are no clips, or lists are wrong.
  """
  lists, clips, noise = {}, [], []
  for path in files.paths:
    folder, slash, name = path.rpartition("/")
    if not slash:
      if is_list(name):
        lists[name] = _text(files, path)
    elif name.lower().endswith(ENDINGS):
      (noise if folder == NOISE else clips).append(path)
  if not clips:
    raise ValueError(
      f"{files.name} has no clips, expected files such as yes/0a7c2a8d_nohash_0.wav or .flac"
    )
  return split_clips(clips, lists, files.name), noise


def _text(files: Files, path: str) -> str:
  if files.size(path) > _LONGEST_LIST:
    raise ValueError(
      f"{files.name}/{path} has {files.size(path)} bytes, expected {_LONGEST_LIST} at most"
    )
  try:
    return files.read(path).decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{files.name}/{path} is not UTF-8: {error}") from error
