"""The work directory of a run: its configuration, the versions it ran with, its parameters.

    WORKDIR/config.json      the configuration of the latest start, see `load_config`
    WORKDIR/versions.json    packages, device and git revision of the latest start
    WORKDIR/parameters.txt   name, shape, dtype and size of every parameter

Files are replaced as a whole or not at all, so that a killed run leaves no half-written one.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict, config_dict

PACKAGES = ("triform", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What the parameters depend on: a run cannot be resumed with another value of any of these.
FIXED = ("model", "data.name", "data.tokenizer")
# The same, of fields that configurations of 0.1.0 lack: there they count as unset.
_FIXED_LATER = tuple(
  f"data.{name}" for name in ("path", "tfds", "mixture", "split", "text_field", "prompt_field")
)
ABSENT = "<absent>"

_TUPLE = "__tuple__"
_PLACEHOLDER = "__placeholder__"
_PLACEHOLDER_TYPES = {t.__name__: t for t in (bool, int, float, str, tuple)}


def check(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Checks that a run with `config` can begin in `workdir`, or go on there; writes nothing.

  Args:
    workdir: a folder that is new, empty, or that `prepare` has prepared before.
    config: the whole configuration. To resume a run, everything under `model`, the corpus and the
      tokenizer must be what they were; the rest may change.

  Raises:
    ValueError: if the folder holds something else, cannot be read, or belongs to a run with
      another model or data; the message names every differing key with both values.
  """
  workdir = Path(workdir)
  try:
    if (workdir / "config.json").exists():
      _check_resumable(workdir, load_config(workdir), config)
    elif workdir.exists() and any(workdir.iterdir()):
      raise ValueError(
        f"workdir {workdir} is not empty and has no config.json: expected a new or empty folder, "
        "or that of an earlier run"
      )
  except OSError as error:
    raise ValueError(f"workdir {workdir} cannot be used: {error}") from error


def prepare(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Creates `workdir` for a run with `config`, or records anew what it goes on with.

  Raises:
    ValueError: as `check` does, or if the folder cannot be written.
  """
  workdir = Path(workdir)
  text = _to_json(config)
  check(workdir, config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", text)
    write_atomically(workdir / "versions.json", json.dumps(versions(), indent=2) + "\n")
  except OSError as error:
    raise ValueError(f"workdir {workdir} cannot be used: {error}") from error


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
    **{name: importlib.metadata.version(name) for name in PACKAGES},
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
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())  # or the rename may reach the disk before the contents
  temporary.replace(path)


def _check_resumable(workdir: Path, saved: ConfigDict, given: ConfigDict) -> None:
  saved, given = _fixed_values(saved), _fixed_values(given)
  differing = [
    f"  {key}: saved {saved.get(key, ABSENT)!r}, given {given.get(key, ABSENT)!r}"
    for key in sorted(saved.keys() | given.keys())
    if saved.get(key, ABSENT) != given.get(key, ABSENT)
  ]
  if differing:
    raise ValueError(
      f"workdir {workdir} belongs to a run with another configuration:\n"
      + "\n".join(differing)
      + "\nexpected the saved values, or another workdir"
    )


def _fixed_values(config: ConfigDict) -> dict[str, Any]:
  names = FIXED + _FIXED_LATER
  return dict.fromkeys(_FIXED_LATER) | {
    key: value
    for key, value in flatten(config).items()
    if any(key == fixed or key.startswith(fixed + ".") for fixed in names)
  }


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """The fields of a configuration by their dotted names."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _to_json(config: ConfigDict) -> str:
  return json.dumps(encode_config(config), indent=2) + "\n"


def encode_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """A configuration as JSON knows it; `prefix` is what fields are called in errors."""
  encoded = {}
  for key, value in config.items():
    kind = config.get_type(key)
    if isinstance(value, ConfigDict):
      encoded[key] = encode_config(value, f"{prefix}{key}.")
    elif value is None and kind.__name__ in _PLACEHOLDER_TYPES:
      encoded[key] = {_PLACEHOLDER: kind.__name__}
    else:
      encoded[key] = _encode_value(value, prefix + key)
  return encoded


def _encode_value(value: Any, name: str) -> Any:
  if isinstance(value, tuple):
    return {_TUPLE: [_encode_value(v, name) for v in value]}
  if isinstance(value, list):
    return [_encode_value(v, name) for v in value]
  if value is None or type(value) in (bool, int, float, str):
    return value
  raise ValueError(
    f"configuration field {name} is {value!r} of type {type(value).__name__}: expected a bool, "
    "int, float, str, None, or a tuple or list of these"
  )


def decode_config(value: Any) -> Any:
  """The inverse of `encode_config`."""
  if isinstance(value, list):
    return [decode_config(v) for v in value]
  if not isinstance(value, dict):
    return value
  if _TUPLE in value:
    return tuple(decode_config(v) for v in value[_TUPLE])
  if _PLACEHOLDER in value:
    return config_dict.placeholder(_PLACEHOLDER_TYPES[value[_PLACEHOLDER]])
  return ConfigDict({k: decode_config(v) for k, v in value.items()})


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
