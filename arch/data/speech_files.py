"""The files of a data set of spoken words: a folder for every word, or an archive of such folders.

    yes/0a7c2a8d_nohash_0.wav     a clip of a word, WAV or FLAC
    _background_noise_/*.wav      long recordings without words
    testing_list.txt, ...         what is in which split, see `speech_lists`

A single folder around all of it is passed over. All else that lies there, such as a licence, is
left alone; `find_clips` tells of files beside the clips that are none.
"""

import contextlib
import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
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
    self.name, self._status = str(path), {}
    try:
      entries = _visible(path)
      if len(entries) == 1 and any(entry.is_dir() for entry in _visible(entries[0])):
        (path,) = entries
        entries = _visible(path)
      for entry in entries:
        for file in _visible(entry) or [entry]:
          if file.is_file():
            self._status[file.relative_to(path).as_posix()] = file.stat()
          elif file.is_symlink() and not file.exists():  # it cannot be read, which is told
            self._status[file.relative_to(path).as_posix()] = file.lstat()
    except OSError as error:
      raise ValueError(f"{path} cannot be listed: {error}") from error
    self._path = path
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
    members = {}
    for member in tar:
      name = member.name.removeprefix("./")
      if member.isfile() and not any(part.startswith(".") for part in name.split("/")):
        members[name] = member
    around = _folder_around(members)
    members = {name.removeprefix(around): member for name, member in members.items()}
    self._members = {name: m for name, m in members.items() if name.count("/") <= 1}
    self.paths = sorted(self._members)

  def size(self, path: str) -> int:
    return self._members[path].size

  def read(self, path: str) -> bytes:
    try:
      return self._tar.extractfile(self._members[path]).read()
    except (OSError, EOFError, tarfile.TarError) as error:
      raise BadAudioError(f"{path} cannot be read: {error}", "unreadable") from error


def _visible(path: Path) -> list[Path]:
  """What is in a folder, but for what is hidden; nothing is in a file."""
  inside = path.iterdir() if path.is_dir() else []
  return [entry for entry in inside if not entry.name.startswith(".")]


def _folder_around(names: Iterable[str]) -> str:
  """Of files at `around/label/name` the folder that all of them are in, if there is one."""
  names = list(names)
  tops = {name.partition("/")[0] for name in names}
  deep = any(name.count("/") == 2 for name in names)
  return f"{tops.pop()}/" if deep and len(tops) == 1 else ""


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


def find_clips(files: Files) -> tuple[dict[str, list[Clip]], list[str], dict[str, list[str]]]:
  """The clips of every split, the paths of the recordings of noise, and of what is not used.

  Not used are, by the reason, files beside the clips of a word that are no audio by their names,
  and clips that the lists leave out.

  Raises:
    ValueError: if there are no clips, or lists are wrong.
  """
  lists, clips, noise, other = {}, [], [], []
  for path in files.paths:
    folder, slash, name = path.rpartition("/")
    if not slash:
      if is_list(name):
        lists[name] = _text(files, path)
    elif name.lower().endswith(ENDINGS):
      (noise if folder == NOISE else clips).append(path)
    elif folder != NOISE:
      other.append(path)
  if not clips:
    raise ValueError(
      f"{files.name} has no clips, expected files such as yes/0a7c2a8d_nohash_0.wav or .flac"
    )
  splits = split_clips(clips, lists, files.name)
  listed = {clip.path for found in splits.values() for clip in found}
  unused = {
    f"neither {' nor '.join(ENDINGS)}": other,
    "in no list": [path for path in clips if path not in listed],
  }
  return splits, noise, {reason: paths for reason, paths in unused.items() if paths}


def _text(files: Files, path: str) -> str:
  if files.size(path) > _LONGEST_LIST:
    raise ValueError(
      f"{files.name}/{path} has {files.size(path)} bytes, expected {_LONGEST_LIST} at most"
    )
  try:
    return files.read(path).decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{files.name}/{path} is not UTF-8: {error}") from error
