import logging
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from triform.arch.training.checkpoints import (
  Checkpoints,
  UnreadableError,
  has_checkpoint,
  restore,
)


def make_tree(seed=0):
  key = jax.random.key(seed)
  params = {
    "layers": {i: {"w": jax.random.normal(jax.random.fold_in(key, i), (8, 16))} for i in range(3)},
    "head": jax.random.normal(key, (300, 300)).astype(jnp.bfloat16),
  }
  return {
    "params": params,
    "optimizer": optax.adamw(1e-3).init(params),
    "position": np.arange(5, dtype=np.int32) + seed,
    "step": jnp.uint32(seed),
  }


# Reads or writes of several arrays that fail together outlive orbax's event loop, and disturb
# later tests with their tracebacks. This tree has one array.
LARGE = {"w": np.random.default_rng(0).normal(size=(300, 300))}


def abstract(tree):
  return jax.eval_shape(lambda: tree)


def assert_equal(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
    assert isinstance(a, jax.Array) and a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def contents(folder):
  return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def step_folders(folder):
  return sorted(path.name for path in Path(folder).iterdir())


def save_steps(folder, *steps):
  with Checkpoints(folder, keep=10) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_tree(step))


def test_round_trip_and_kept_steps(tmp_path):
  assert not has_checkpoint(tmp_path / "nowhere")
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert not has_checkpoint(tmp_path)
    assert checkpoints.restore_latest(abstract(make_tree())) is None
    for step in (2, 4, 5):
      checkpoints.save(step, make_tree(step))
    checkpoints.wait()
    assert has_checkpoint(tmp_path)
    step, tree = checkpoints.restore_latest(abstract(make_tree()))
  assert step == 5
  assert_equal(tree, make_tree(5))
  assert step_folders(tmp_path) == ["4", "5"]


def test_a_saved_step_stays_as_it_is(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(3, make_tree(3))
    checkpoints.save(3, make_tree(4))
  step, tree = restore(tmp_path, abstract(make_tree()))
  assert step == 3
  assert_equal(tree, make_tree(3))


def test_restores_to_the_dtype_and_sharding_of_the_target(tmp_path):
  save_steps(tmp_path, 1)
  sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P("data"))
  target = abstract(make_tree())
  target["params"]["head"] = jax.ShapeDtypeStruct((300, 300), jnp.float32, sharding=sharding)
  head = restore(tmp_path, target)[1]["params"]["head"]
  assert head.dtype == jnp.float32 and head.sharding == sharding
  np.testing.assert_array_equal(head, make_tree(1)["params"]["head"].astype(jnp.float32))


def test_arrays_may_be_donated_or_overwritten_after_save(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  with Checkpoints(tmp_path, keep=10) as checkpoints:
    for step in range(5):
      tree = {str(i): jnp.full((500, 500), step + 10.0 * i) for i in range(10)}
      numpy_array = np.full((500, 500), float(step))
      checkpoints.save(step, tree | {"numpy": numpy_array})
      numpy_array[:] = -1
      for _ in range(3):
        tree = jax.tree.map(overwrite, tree)
      jax.block_until_ready(tree)
  target = dict.fromkeys([*map(str, range(10)), "numpy"], jax.ShapeDtypeStruct((500, 500), "f4"))
  for step in range(5):
    saved = restore(tmp_path, target, step)[1]
    assert all((saved[str(i)] == step + 10.0 * i).all() for i in range(10))
    assert (saved["numpy"] == step).all()


def test_any_truncated_file_falls_back_to_the_step_before(tmp_path, caplog):
  save_steps(tmp_path / "good", 1, 2)
  checkpoint = tmp_path / "good" / "2" / "default"
  files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
  files.remove(Path("commit_success.txt"))  # nothing reads it
  assert len(files) > 5
  target = abstract(make_tree())
  for file in files:
    for damage in ("missing", "empty", "cut"):
      folder = tmp_path / "damaged"
      shutil.copytree(tmp_path / "good", folder)
      path = folder / "2" / "default" / file
      size = path.stat().st_size
      path.unlink() if damage == "missing" else os.truncate(path, size // 2 * (damage == "cut"))
      before = contents(folder)
      caplog.clear()
      step, tree = restore(folder, target)
      assert step == 1, (file, damage)
      assert contents(folder) == before
      [warning] = caplog.records
      assert warning.levelno == logging.WARNING and "\n" not in warning.getMessage()
      assert f"{folder / '2'} cannot be read" in warning.getMessage()
      shutil.rmtree(folder)
  assert_equal(tree, make_tree(1))


def test_damaged_data_of_the_right_size(tmp_path):
  with Checkpoints(tmp_path, keep=10) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, LARGE)
  data = max((tmp_path / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
  data.write_bytes(bytes(data.stat().st_size))
  assert restore(tmp_path, abstract(LARGE))[0] == 1


def test_damaged_step_can_be_saved_again(tmp_path):
  save_steps(tmp_path, 1, 2, 3)
  for step in "23":
    os.truncate(tmp_path / step / "default" / "manifest.ocdbt", 1)
  for _ in range(2):
    with Checkpoints(tmp_path, keep=10) as checkpoints:
      assert checkpoints.restore_latest(abstract(make_tree()))[0] == 1
      checkpoints.save(2, make_tree(22))
      checkpoints.wait()
      assert_equal(checkpoints.restore_latest(abstract(make_tree()))[1], make_tree(22))
    assert step_folders(tmp_path) == ["1", "2", "2.unreadable", "3.unreadable"]
    os.truncate(tmp_path / "2" / "default" / "manifest.ocdbt", 1)


def test_no_readable_checkpoint_is_an_error_and_moves_nothing(tmp_path):
  save_steps(tmp_path, 1, 2)
  for step in "12":
    os.truncate(tmp_path / step / "default" / "manifest.ocdbt", 1)
  with (
    Checkpoints(tmp_path, keep=10) as checkpoints,
    pytest.raises(UnreadableError, match=r"none of the checkpoints \[1, 2\].*manifest.ocdbt has"),
  ):
    checkpoints.restore_latest(abstract(make_tree()))
  assert step_folders(tmp_path) == ["1", "2"]


def test_mismatch_names_the_keys(tmp_path):
  save_steps(tmp_path, 1, 2)
  target = abstract(make_tree())
  target["params"]["extra"] = target["params"]["layers"].pop(1)["w"]
  target["params"]["head"] = jax.ShapeDtypeStruct((300, 30), jnp.bfloat16)
  with (
    Checkpoints(tmp_path, keep=10) as checkpoints,
    pytest.raises(ValueError, match="another model") as error,
  ):
    checkpoints.restore_latest(target)
  assert str(error.value).splitlines()[1:] == [
    "  params.extra: saved <absent>, expected (8, 16)",
    "  params.head: saved (300, 300), expected (300, 30)",
    "  params.layers.1.w: saved (8, 16), expected <absent>",
  ]
  assert step_folders(tmp_path) == ["1", "2"]


def test_restore_of_absent_checkpoints(tmp_path):
  with pytest.raises(ValueError, match="expected any checkpoint"):
    restore(tmp_path / "nowhere", {})
  assert not (tmp_path / "nowhere").exists()
  save_steps(tmp_path, 1, 2)
  with pytest.raises(ValueError, match=r"checkpoint of step 3 .* found steps \[1, 2\]"):
    restore(tmp_path, {}, step=3)


def test_what_to_restore_can_be_chosen_from_what_there_is(tmp_path):
  save_steps(tmp_path, 1)

  def choose(saved):
    assert saved["params"]["head"] == jax.ShapeDtypeStruct((300, 300), ml_dtypes.bfloat16)
    assert saved["optimizer"][0]["mu"]["layers"]["2"]["w"].shape == (8, 16)
    return {"step": saved["step"]}

  assert restore(tmp_path, choose) == (1, {"step": 1})


@pytest.fixture
def full_disk():
  """A disk that takes no file beyond 64 kB."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("next_call", ["wait", "save_another", "save_again", "close"])
def test_error_of_a_background_save_is_raised_later(tmp_path, full_disk, next_call):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(2, LARGE)
  while next_call == "save_again" and checkpoints._manager.is_saving_in_progress():
    pass
  calls = {
    "wait": checkpoints.wait,
    "save_another": lambda: checkpoints.save(4, LARGE),
    "save_again": lambda: checkpoints.save(2, LARGE),
    "close": checkpoints.close,
  }
  with pytest.raises(Exception, match="File too large"):
    calls[next_call]()
  checkpoints.close()
  assert not has_checkpoint(tmp_path)


def test_context_manager_raises_the_error_of_the_last_save(tmp_path, full_disk):
  with (
    pytest.raises(Exception, match="File too large"),
    Checkpoints(tmp_path, keep=2) as checkpoints,
  ):
    checkpoints.save(1, LARGE)


def test_saving_is_quiet(tmp_path, caplog):
  with caplog.at_level(logging.INFO, logger="absl"):
    save_steps(tmp_path, 1, 2, 3)
    restore(tmp_path, abstract(make_tree()))
  assert not [record for record in caplog.records if record.name == "absl"]


def test_something_must_be_kept(tmp_path):
  with pytest.raises(ValueError, match="keep is 0: expected at least 1"):
    Checkpoints(tmp_path, keep=0)
