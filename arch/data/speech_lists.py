"""Which clips of spoken words are to train on, to validate and to test with: lists and a hash."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from .audio_files import ENDINGS

SPLITS = ("train", "validation", "test")

_TSV = {"train_list.tsv": "train", "val_list.tsv": "validation", "test_list.tsv": "test"}
_OFFICIAL = {"validation_list.txt": "validation", "testing_list.txt": "test"}
_MOST_CLIPS = 2**27 - 1  # of a class, as the data set's authors took it


class Clip(NamedTuple):
  """A file among the clips, `label/name.wav`, and the class that it is of."""

  path: str
  label: str


def hash_split(path: str) -> str:
  """The split of a clip by the rule that came with Speech Commands.

  It looks at the speaker alone, the file's name up to `_nohash_`, so that all that one speaker said
  is in one split, which it stays in when clips are added: a tenth is for validation, another for
  test.
  """
  speaker = re.sub(r"_nohash_.*$", "", PurePosixPath(path).name)
  number = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (_MOST_CLIPS + 1)
  percent = number * (100.0 / _MOST_CLIPS)
  if percent < 10:
    return "validation"
  return "test" if percent < 20 else "train"


def is_list(name: str) -> bool:
  """Whether a file beside the clips' folders says what split they are of."""
  return name in _TSV or name.endswith(tuple(_OFFICIAL))


def split_clips(
  paths: Iterable[str], lists: Mapping[str, str], where: str
) -> dict[str, list[Clip]]:
  """The clips of every split, in the order of their paths.

  Lists decide, or else `hash_split`. `train_list.tsv`, `val_list.tsv` and `test_list.tsv` have a
  path, a tab and a class a line: clips are of that class, and those in no list are left out.
  Otherwise the official `validation_list.txt` and `testing_list.txt`, or such as
  `v0.01_testing_list.txt`, have a path a line: the other clips are to train on. What the official
  ones name beyond the clips does not matter, for many use a part of the data. Names are compared
  without their endings, for the lists say `.wav` whatever became of the files.

  Args:
    paths: of the clips, `label/name.wav` or `.flac`.
    lists: the texts of the lists by the names of their files.
    where: the clips and lists are, for messages.

  Raises:
    ValueError: if a list is wrong, or clips differ in their endings only.
  """
  by_stem: dict[str, str] = {}
  for path in sorted(paths):
    other = by_stem.setdefault(_stem(path), path)
    if other != path:
      raise ValueError(f"{where} has {other} and {path}, expected one file of that name")
  tables = {name: split for name, split in _TSV.items() if name in lists}
  if tables:
    return _from_tables(by_stem, {name: lists[name] for name in tables}, where)
  if lists:
    return _from_official(by_stem, lists, where)
  clips: dict[str, list[Clip]] = {split: [] for split in SPLITS}
  for path in by_stem.values():
    clips[hash_split(path)].append(Clip(path, _folder(path)))
  return clips


def _from_tables(
  by_stem: Mapping[str, str], tables: Mapping[str, str], where: str
) -> dict[str, list[Clip]]:
  clips: dict[str, list[Clip]] = {split: [] for split in SPLITS}
  listed: dict[str, str] = {}
  missing = []
  for name, text in tables.items():
    for number, line in _lines(text):
      path, _, label = (part.strip() for part in line.partition("\t"))
      if not path or not label or "\t" in label:
        raise ValueError(
          f"{where}/{name}, line {number}, is {line!r}, expected a path, a tab and a class"
        )
      stem = _stem(path)
      if stem in listed:
        raise ValueError(f"{where}/{name}, line {number}: {path} is in {listed[stem]} already")
      listed[stem] = name
      if stem in by_stem:
        clips[_TSV[name]].append(Clip(by_stem[stem], label))
      else:
        missing.append(f"{path} of {name}")
  if missing:
    raise ValueError(f"{where} has no {missing[0]}: {len(missing)} listed clips are missing")
  return {split: sorted(found) for split, found in clips.items()}


def _from_official(
  by_stem: Mapping[str, str], lists: Mapping[str, str], where: str
) -> dict[str, list[Clip]]:
  split_of: dict[str, str] = {}
  for ending, split in _OFFICIAL.items():
    names = sorted(name for name in lists if name.endswith(ending))
    if len(names) != 1:
      found = ", ".join(names) or "none, but the other one"
      raise ValueError(f"{where} has {found}, expected one {ending}")
    for number, line in _lines(lists[names[0]]):
      if split_of.setdefault(_stem(line), split) != split:
        raise ValueError(f"{where}/{names[0]}, line {number}: {line} is in the other list too")
  clips: dict[str, list[Clip]] = {split: [] for split in SPLITS}
  for stem, path in by_stem.items():
    clips[split_of.get(stem, "train")].append(Clip(path, _folder(path)))
  return clips


def _lines(text: str) -> list[tuple[int, str]]:
  """The lines that are not empty, with their numbers."""
  lines = text.removeprefix("\ufeff").splitlines()
  return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _stem(path: str) -> str:
  path = path.removeprefix("./")
  ending = PurePosixPath(path).suffix
  return path.removesuffix(ending) if ending.lower() in ENDINGS else path


def _folder(path: str) -> str:
  return path.partition("/")[0]
