"""The work directory of a run: its configuration, the versions it ran with, its parameters.

    WORKDIR/config.json      the configuration of the latest start, see `load_config`
    WORKDIR/versions.json    packages, device and git revision of the latest start
    WORKDIR/parameters.txt   name, shape, dtype and size of every parameter
    WORKDIR/lock             held by the process that trains there

Files are replaced as a whole or not at all, so that a killed run leaves no half-written one.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ..data.files import atomic_write
from ..models import complete
from ..models.registry import FREE_OPTIONS, find
from .config_json import decode_config, encode_config, flatten

# What the parameters depend on, with every option of the model that is not free: a run cannot be
# resumed with another value of any of these.
_FIXED = frozenset(
  f"data.{name}"
  for name in (
    "name", "path", "tfds", "mixture", "split", "text_field", "prompt_field", "tokenizer",
    "held_out", "permutation_seed", "classes", "seconds", "sample_rate", "on_bad", "seed",
    "examples", "noise",
  )
)  # fmt: skip
_LOCK = "lock"
ABSENT = "<absent>"


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Keeps `workdir`, created if need be, to this process until the block or the process ends.

  A folder in which nothing was written meanwhile is removed again.

  Raises:
    ValueError: if another process holds it, or the folder cannot be written.
  """
  path = Path(workdir) / _LOCK
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
  except OSError as error:
    raise ValueError(f"workdir {workdir} cannot be used: {error}") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f"workdir {workdir} is in use by another process: expected that to end first, or another "
        "workdir"
      ) from error
    try:
      yield
    finally:
      if os.listdir(path.parent) == [_LOCK]:
        path.unlink()
        path.parent.rmdir()


def check(workdir: str | os.PathLike, config: ConfigDict) -> list[str]:
  """Checks that a run with `config` can begin in `workdir`, or go on there; writes nothing.

  Args:
    workdir: a folder that is new, empty, or that `prepare` has prepared before.
    config: the whole configuration. To resume a run, the corpus, the tokenizer and all of `model`
      but its free options (see `models.registry`) must be what they were, where leaving an option
      out, or `None`, is its default; the rest may change.

  Returns:
    What changes in a run that is resumed, a line each, such as `batch_size: 8 -> 16`.

  Raises:
    ValueError: if the folder holds something else, cannot be read, or belongs to a run with
      another model or data; the message names every differing key with both values.
  """
  workdir = Path(workdir)
  try:
    if (workdir / "config.json").exists():
      saved = load_config(workdir)
      _check_resumable(workdir, saved, config)
      return _changes(saved, config)
    if workdir.exists() and not all(map(_is_ours, workdir.iterdir())):
      raise ValueError(
        f"workdir {workdir} is not empty and has no config.json: expected a new or empty folder, "
        "or that of an earlier run"
      )
  except OSError as error:
    raise ValueError(f"workdir {workdir} cannot be used: {error}") from error
  return []


def prepare(workdir: str | os.PathLike, config: ConfigDict) -> list[str]:
  """Creates `workdir` for a run with `config`, or records anew what it goes on with.

  Returns the changes that `check` tells.

  Raises:
    ValueError: as `check` does, or if the folder cannot be written.
  """
  workdir = Path(workdir)
  text = json.dumps(encode_config(config), indent=2) + "\n"
  changes = check(workdir, config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", text)
    write_atomically(workdir / "versions.json", json.dumps(versions(), indent=2) + "\n")
  except OSError as error:
    raise ValueError(f"workdir {workdir} cannot be used: {error}") from error
  return changes


def load_config(workdir: str | os.PathLike) -> ConfigDict:
  """Reads the configuration that `prepare` saved, equal to the original.

  Tuples are tuples again, and a placeholder still takes a value of its type on override.
  """
  path = Path(workdir) / "config.json"
  if not path.exists():
    raise ValueError(f"{path} not found: expected the work directory of a run, or its export")
  try:
    return decode_config(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path} cannot be read: {error}") from error


def versions() -> dict[str, Any]:
  """Describes what a run depends on besides its configuration: packages, device, revision."""
  device = jax.devices()[0]
  return {
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _packages()},
    "platform": device.platform,
    "device_kind": device.device_kind,
    "device_count": jax.device_count(),
    "git": _git_state(Path(__file__)),
  }


def parameter_table(params: dict) -> str:
  """Lists the parameters, one a line (name, shape, dtype, count), and their total.

  Args:
    params: nested dictionaries, with strings or integers as keys, of arrays or
      `jax.ShapeDtypeStruct`.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  rows = [("name", "shape", "dtype", "count")]
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    rows.append((name, shape, str(leaf.dtype), f"{leaf.size:,}"))
  rows.append(("total", "", "", f"{sum(leaf.size for _, leaf in leaves):,}"))
  name, shape, dtype, count = (max(map(len, column)) for column in zip(*rows, strict=True))
  return "".join(
    f"{row[0]:<{name}}  {row[1]:<{shape}}  {row[2]:<{dtype}}  {row[3]:>{count}}\n" for row in rows
  )


def write_parameter_table(workdir: str | os.PathLike, params: dict) -> None:
  """Writes `parameter_table(params)` to `parameters.txt` in `workdir`."""
  write_atomically(Path(workdir) / "parameters.txt", parameter_table(params))


def write_atomically(path: Path, text: str) -> None:
  """Replaces the file at `path` by `text`; whenever the process dies, one of the two is there."""
  with atomic_write(path) as file:
    file.write(text.encode())


def _is_ours(path: Path) -> bool:
  """Whether a run that was killed before it had a configuration may have left `path`."""
  return path.name == _LOCK or (path.is_dir() and not any(path.iterdir()))


def _check_resumable(workdir: Path, saved: ConfigDict, given: ConfigDict) -> None:
  saved, given = _fixed_values(saved), _fixed_values(given)
  differing = [
    f"  {key}: saved {saved.get(key, ABSENT)!r}, given {given.get(key, ABSENT)!r}"
    for key in sorted(saved.keys() | given.keys())
    if saved.get(key) != given.get(key)
  ]
  if differing:
    raise ValueError(
      f"workdir {workdir} belongs to a run with another configuration:\n"
      + "\n".join(differing)
      + "\nexpected the saved values, or another workdir"
    )


def _fixed_values(config: ConfigDict) -> dict[str, Any]:
  fields = flatten(config)
  options = FREE_OPTIONS
  if "model.architecture" in fields:
    options = find(config.model.architecture).free_options
    fields |= {f"model.{name}": value for name, value in complete(config.model).items()}
  free = {f"model.{name}" for name in options}
  return {
    key: value
    for key, value in fields.items()
    if value is not None and (key in _FIXED or (key.startswith("model.") and key not in free))
  }


def _changes(saved: ConfigDict, given: ConfigDict) -> list[str]:
  # A field that only one side knows comes from another version, not from the user.
  saved, given = flatten(saved), flatten(given)
  return [
    f"{key}: {saved[key]!r} -> {given[key]!r}"
    for key in sorted(saved.keys() & given.keys())
    if saved[key] != given[key]
  ]


def _packages() -> list[str]:
  """The distributions that are installed with this one, and it."""
  requirements = importlib.metadata.requires("triform") or []
  required = [re.match(r"[\w.-]+", r)[0] for r in requirements if "extra ==" not in r]
  return ["triform", "jaxlib", *(name.replace("_", "-") for name in required)]


def _git_state(source: Path) -> dict[str, Any] | None:
  """Commit and dirty flag of the repository that tracks `source`, `None` if none does."""

  def git(*args: str) -> str:
    command = ["git", "-C", str(source.parent), *args]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

  try:
    # A package installed below somebody else's repository is not described by its revision.
    git("ls-files", "--error-unmatch", source.name)
    return {
      "revision": git("rev-parse", "HEAD"),
      "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
  except (OSError, subprocess.CalledProcessError):
    return None
