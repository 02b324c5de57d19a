"""Checkpoints: asynchronous saves, and restores that survive a damaged newest checkpoint.

    FOLDER/<step>/default/             an orbax checkpoint
    FOLDER/<step>/default/sizes.json   the size of each of its files
    FOLDER/<step>.unreadable/          a damaged checkpoint that a restore has moved aside

Nothing else in the library imports orbax.
"""

import dataclasses
import json
import logging as python_logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from .. import hosts

ITEM = "default"
SIZES = "sizes.json"


class UnreadableError(OSError):
  """There are checkpoints, but none of them can be read."""


class Checkpoints:
  """Saves and restores the state of one training run. A context manager.

  A save copies the arrays to the host before it returns, so that they may be donated or
  overwritten at once, and writes them in the background. A checkpoint appears under its final
  name only when it is complete. An error in the background is raised by the next call of any
  method once it is known, at the latest by `close`.

  Args:
    folder: where checkpoints are kept; created if need be. Only one run may save there, and of
      several processes all make the same calls.
    keep: how many of the newest checkpoints stay; older ones are deleted.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int):
    if keep < 1:
      raise ValueError(f"keep is {keep}: expected at least 1")
    self._folder = Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_handlers=_Handler(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def save(self, step: int, tree: Any) -> None:
    """Starts to save `tree`, a pytree of arrays and numbers, unless `step` is saved already.

    Waits for the save before, if that is still under way.
    """
    if not self._manager.is_saving_in_progress():
      self.wait()
    if step not in self._manager.all_steps():
      self._manager.save(step, args=_Tree(tree), force=True)

  def restore_latest(self, abstract_tree: Any) -> tuple[int, Any] | None:
    """Restores the newest checkpoint that can be read.

    Damaged checkpoints that are newer are reported and moved aside, so that their steps can be
    saved again. They are not deleted: what failed may have been the reading. For the same reason
    nothing is moved if no checkpoint can be read.

    Args:
      abstract_tree: `jax.ShapeDtypeStruct`s in the structure of the saved tree. Arrays come back
        in their dtypes and shardings, on the default device where there is no sharding.

    Returns:
      Step and tree, or `None` if there are no checkpoints.

    Raises:
      ValueError: if names or shapes in the checkpoint differ from those of `abstract_tree`.
      UnreadableError: if there are checkpoints but none can be read.
    """
    self.wait()
    steps = _steps(self._folder)
    if not steps:
      return None
    step, tree = _restore_newest(self._folder, steps, abstract_tree)
    if hosts.is_first():
      for damaged in (s for s in steps if s > step):
        aside = self._folder / f"{damaged}.unreadable"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(damaged)).rename(aside)
    hosts.wait()
    self._manager.reload()
    return step, tree

  def wait(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is on disk and ends the background threads."""
    self._manager.close()


def restore(
  folder: str | os.PathLike, abstract_tree: Any, step: int | None = None
) -> tuple[int, Any]:
  """Restores a checkpoint without changing anything in `folder`; a run may be saving to it.

  Arguments, result and errors are those of `Checkpoints.restore_latest`, except that the
  checkpoint may hold more than `abstract_tree` asks for (an optimizer's state, which then is not
  read), that `abstract_tree` may be a function that chooses from what a checkpoint holds (nested
  dictionaries and lists of `jax.ShapeDtypeStruct`), that with a `step` only that checkpoint is
  tried, and that it is a ValueError if there is none.
  """
  folder = Path(folder).absolute()
  return _restore_newest(folder, _existing_steps(folder, step), abstract_tree, partial=True)


def has_checkpoint(folder: str | os.PathLike) -> bool:
  """Whether `folder`, which need not exist, holds a complete checkpoint, readable or not."""
  return bool(_steps(Path(folder).absolute()))


class _Handler(ocp.StandardCheckpointHandler):
  """Adds to a checkpoint, before it is committed, the sizes of its files."""

  def finalize(self, directory) -> None:
    super().finalize(directory)
    directory = Path(directory)
    files = [path for path in directory.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    (directory / SIZES).write_text(json.dumps(sizes, indent=2))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Tree(ocp.args.StandardSave):
  """What to save, for `_Handler`."""


class _DamagedError(Exception):
  """A checkpoint that cannot be read."""


def _steps(folder: Path) -> list[int]:
  return ocp.utils.checkpoint_steps(folder)


def _existing_steps(folder: Path, step: int | None) -> list[int]:
  steps = sorted(_steps(folder))
  if not steps or step not in (None, *steps):
    wanted = "any checkpoint" if step is None else f"a checkpoint of step {step}"
    raise ValueError(f"expected {wanted} in {folder}, found steps {steps}")
  return steps if step is None else [step]


def _restore_newest(
  folder: Path, steps: list[int], abstract_tree: Any, *, partial: bool = False
) -> tuple[int, Any]:
  for step in sorted(steps, reverse=True):
    try:
      return step, _read(folder / str(step) / ITEM, abstract_tree, partial)
    except _DamagedError as error:
      logging.warning("checkpoint %s cannot be read: %s", folder / str(step), error)
      damage = error
  raise UnreadableError(
    f"none of the checkpoints {sorted(steps)} in {folder} can be read; the oldest: {damage}"
  ) from damage


def _read(path: Path, abstract_tree: Any, partial: bool) -> Any:
  try:
    _check_sizes(path)
    held = _read_abstract(path)
  except Exception as error:  # orbax and tensorstore raise anything at damaged files
    raise _DamagedError(_one_line(error)) from error
  if callable(abstract_tree):
    abstract_tree = abstract_tree(held)
  saved = _shapes(held)
  wanted = _shapes(abstract_tree)
  if partial:
    saved = {name: shape for name, shape in saved.items() if name in wanted}
  _check_target(path, saved, wanted)
  target = jax.tree.map(_with_sharding, abstract_tree)
  request = ocp.args.PyTreeRestore(
    item=target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=partial,
  )
  try:
    return ocp.PyTreeCheckpointHandler().restore(path, args=request)
  except Exception as error:
    raise _DamagedError(_one_line(error)) from error


def _check_sizes(path: Path) -> None:
  # Orbax also notices a truncated file, but at the cost of pages of tracebacks from its threads.
  for name, expected in json.loads((path / SIZES).read_text()).items():
    size = (path / name).stat().st_size
    if size != expected:
      raise ValueError(f"{name} has {size} bytes of {expected}")


def _check_target(path: Path, saved: dict[str, tuple], target: dict[str, tuple]) -> None:
  differing = [
    f"  {name}: saved {saved.get(name, '<absent>')}, expected {target.get(name, '<absent>')}"
    for name in sorted(saved.keys() | target.keys())
    if saved.get(name) != target.get(name)
  ]
  if differing:
    raise ValueError(
      f"checkpoint {path.parent} is of another model or optimizer; names and shapes differ:\n"
      + "\n".join(differing)
    )


def _read_abstract(path: Path) -> Any:
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _Handler().metadata(path).tree
  )


def _shapes(tree: Any) -> dict[str, tuple]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _with_sharding(leaf: Any) -> Any:
  # Without one, orbax takes that of the file, whose devices may not exist here.
  if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=default)
  return leaf


def _one_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0]


def _is_no_orbax_chatter(record: python_logging.LogRecord) -> bool:
  return record.levelno >= python_logging.WARNING or "orbax" not in Path(record.pathname).parts


# Orbax tells dozens of lines a save through absl's one logger, where a trainer tells its own.
logging.get_absl_logger().addFilter(_is_no_orbax_chatter)
