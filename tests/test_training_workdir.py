import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from triform.arch.training import workdir as workdir_module
from triform.arch.training.workdir import (
  check,
  load_config,
  lock,
  parameter_table,
  prepare,
  versions,
  write_atomically,
  write_parameter_table,
)


def make_config():
  config = ConfigDict({"model": {"width": 64, "layers": ("retention", "attention")}})
  config.model.hidden = 4 * config.model.get_ref("width")
  config.model.dropout = placeholder(float)
  config.data = ConfigDict({"name": "text", "tokenizer": "bytes", "batch": 8})
  config.optimizer = ConfigDict(
    {
      "betas": (0.9, 0.99),
      "rules": (("kernel", 1.0), (".*", 0.0)),
      "empty": (),
      "sizes": [1, (2,)],
      "rate": 1.0,
      "decay": False,
      "clip": None,
      "schedule": placeholder(str),
      "dims": placeholder(tuple),
    }
  )
  return config


def types_of(value):
  if isinstance(value, ConfigDict):
    return {k: (value.get_type(k), types_of(v)) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return type(value), [types_of(v) for v in value]
  return type(value)


def test_config_round_trip(tmp_path):
  prepare(tmp_path / "new" / "run", make_config())
  loaded = load_config(tmp_path / "new" / "run")
  assert loaded.to_dict() == make_config().to_dict()
  assert loaded == make_config().copy_and_resolve_references()
  assert types_of(loaded) == types_of(make_config())
  FrozenConfigDict(loaded)


def test_placeholders_still_take_their_type(tmp_path):
  prepare(tmp_path, make_config())
  loaded = load_config(tmp_path)
  loaded.model.dropout = 0.5
  loaded.optimizer.dims = (1, 2)
  with pytest.raises(TypeError):
    loaded.optimizer.schedule = 3
  prepare(tmp_path / "again", loaded)
  assert load_config(tmp_path / "again").model.dropout == 0.5


def test_unsupported_field_is_named(tmp_path):
  config = ConfigDict({"model": {"dtypes": (np.float32(1),)}})
  with pytest.raises(ValueError, match=r"field model.dtypes is .*float32: expected a bool"):
    prepare(tmp_path / "run", config)
  assert not (tmp_path / "run").exists()


def test_resuming_with_another_model_or_data_names_the_keys(tmp_path):
  prepare(tmp_path, make_config())
  before = (tmp_path / "config.json").read_text()
  config = make_config()
  config.model.width = 32
  config.model.layers = ("retention",)
  config.model.extra = "x"
  del config.model.hidden
  config.data.tokenizer = "sentencepiece"
  config.data.name = "code"
  config.data.batch = 16
  with pytest.raises(ValueError) as error:
    prepare(tmp_path, config)
  first, *keys, last = str(error.value).splitlines()
  assert first == f"workdir {tmp_path} belongs to a run with another configuration:"
  assert keys == [
    "  data.name: saved 'text', given 'code'",
    "  data.tokenizer: saved 'bytes', given 'sentencepiece'",
    "  model.extra: saved '<absent>', given 'x'",
    "  model.hidden: saved 256, given '<absent>'",
    "  model.layers: saved ('retention', 'attention'), given ('retention',)",
    "  model.width: saved 64, given 32",
  ]
  assert last == "expected the saved values, or another workdir"
  assert (tmp_path / "config.json").read_text() == before


def test_resuming_tells_and_records_other_changes(tmp_path):
  assert prepare(tmp_path, make_config()) == []
  config = make_config()
  config.data.batch = 16
  config.optimizer.rate = 0.5
  config.optimizer.schedule = "cosine"
  config.added = "by a later version"
  changes = [
    "data.batch: 8 -> 16",
    "optimizer.rate: 1.0 -> 0.5",
    "optimizer.schedule: None -> 'cosine'",
  ]
  assert check(tmp_path, config) == changes
  assert load_config(tmp_path).to_dict() == make_config().to_dict()
  assert prepare(tmp_path, config) == changes
  assert load_config(tmp_path).to_dict() == config.to_dict()
  assert prepare(tmp_path, config) == []


def test_only_what_shapes_the_model_is_fixed(tmp_path):
  """Old runs, whose configuration leaves defaults out, go on."""
  model = {
    "architecture": "retnet", "vocab_size": 9, "d_model": 8, "num_layers": 2, "num_heads": 2,
    "value_dim": 8, "ffn_dim": 8,
  }  # fmt: skip
  prepare(tmp_path, ConfigDict({"model": model}))
  defaults = {"eps": 1e-6, "decay": "fixed", "num_kv_heads": None}
  free = {"scan_layers": True, "chunk_size": 16, "dropout": 0.1, "dtype": "bfloat16"}
  check(tmp_path, ConfigDict({"model": {**model, **defaults, **free}}))
  with pytest.raises(ValueError, match=r"model\.decay: saved 'fixed', given 'gated'"):
    check(tmp_path, ConfigDict({"model": {**model, "decay": "gated"}}))


LOCKED = """
import sys
from triform.arch.training.workdir import lock
with lock(sys.argv[1]):
  print("locked", flush=True)
  sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
  workdir = tmp_path / "run"
  command = [sys.executable, "-c", LOCKED, str(workdir)]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match="run is in use by another process"), lock(workdir):
      pass
    other.kill()
  with lock(workdir):
    prepare(workdir, make_config())  # the lock does not count as somebody else's file
  (tmp_path / "file").touch()
  with (
    pytest.raises(ValueError, match=r"cannot be used: .*Not a directory"),
    lock(tmp_path / "file" / "run"),
  ):
    pass


def test_resuming_without_the_new_section(tmp_path):
  prepare(tmp_path, ConfigDict({"total_steps": 3}))
  with pytest.raises(ValueError, match=r"model\.width: saved '<absent>', given 64"):
    prepare(tmp_path, make_config())


def test_foreign_folders_are_refused(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=f"{tmp_path} is not empty and has no config.json"):
    prepare(tmp_path, make_config())
  with pytest.raises(ValueError, match=r"notes.txt cannot be used: .*Not a directory"):
    prepare(tmp_path / "notes.txt", make_config())
  with pytest.raises(ValueError, match=r"cannot be used: .*Not a directory"):
    prepare(tmp_path / "notes.txt" / "run", make_config())
  with pytest.raises(ValueError, match=r"config.json not found: expected the work directory"):
    load_config(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_versions(tmp_path):
  prepare(tmp_path, make_config())
  saved = json.loads((tmp_path / "versions.json").read_text())
  assert saved == versions()
  assert saved["jax"] == jax.__version__ and saved["platform"] == jax.default_backend()
  assert saved["python"] == ".".join(map(str, sys.version_info[:3]))
  required = {
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "sentencepiece",
    "array-record",
  }
  assert required | {"triform", "git"} < saved.keys() and "pytest" not in saved


def test_git_state(tmp_path):
  def git(*args):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

  source = tmp_path / "source.py"
  source.write_text("1")
  (tmp_path / "untracked.py").write_text("1")
  assert workdir_module._git_state(source) is None
  git("init")
  git("add", "source.py")
  git("commit", "-m", "first")
  state = workdir_module._git_state(source)
  assert len(state["revision"]) == 40 and state["dirty"] is False
  source.write_text("2")
  assert workdir_module._git_state(source) == state | {"dirty": True}
  assert workdir_module._git_state(tmp_path / "untracked.py") is None


def test_parameter_table(tmp_path):
  params = {
    "layers": {0: {"w": jnp.ones((1000, 20), jnp.bfloat16)}, 1: {"w": jnp.ones((3, 4))}},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
  }
  assert parameter_table(params).splitlines() == [
    "name        shape    dtype      count",
    "layers.0.w  1000x20  bfloat16  20,000",
    "layers.1.w  3x4      float32       12",
    "scale       scalar   float32        1",
    "total                          20,013",
  ]
  write_parameter_table(tmp_path, params)
  assert (tmp_path / "parameters.txt").read_text() == parameter_table(params)


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
  path = tmp_path / "file"
  write_atomically(path, "old")
  with pytest.raises(UnicodeEncodeError):
    write_atomically(path, "new \udc80")
  assert path.read_text() == "old"
  write_atomically(path, "new")
  assert path.read_text() == "new"
  assert list(tmp_path.iterdir()) == [path]
