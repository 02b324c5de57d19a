"""What happens to a work directory that is used again, or twice at once."""

import json

import numpy as np
import pytest
from tiny_run import tiny_config, use_corpus, write_corpus

from triform.arch.data import python_stdlib
from triform.arch.training.loop import train
from triform.arch.training.workdir import load_config, lock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  write_corpus(folder / "stdlib")
  return folder


@pytest.fixture(autouse=True)
def small_stdlib(folder, monkeypatch):
  monkeypatch.setattr(python_stdlib, "stdlib_root", python_stdlib.stdlib_root)
  use_corpus(folder / "stdlib")


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


@pytest.mark.slow
def test_a_run_goes_on_with_its_layers_scanned(folder, tmp_path, capsys):
  for name, scan in (("unrolled", False), ("scanned", True)):
    train(tiny_config(folder, total_steps=4), tmp_path / name)
    capsys.readouterr()
    changes = {"total_steps": 8, "model.scan_layers": scan, "log_every_steps": 1}
    assert train(tiny_config(folder, **changes), tmp_path / name)
    told = capsys.readouterr().out
    assert f"resuming {tmp_path / name} from step 4" in told
    assert "total_steps: 4 -> 8" in told and "log_every_steps: 2 -> 1" in told
    assert ("model.scan_layers: False -> True" in told) == scan
  unrolled, scanned = (losses(tmp_path / name) for name in ("unrolled", "scanned"))
  assert list(scanned) == list(unrolled) == [2, 4, 5, 6, 7, 8]
  np.testing.assert_allclose(list(scanned.values()), list(unrolled.values()), rtol=1e-4)


def test_a_shortened_run_is_left_alone(folder, tmp_path, capsys):
  train(tiny_config(folder, total_steps=6), tmp_path)
  assert train(tiny_config(folder, total_steps=4), tmp_path)
  assert "is trained to step 6 of 4" in capsys.readouterr().out
  assert load_config(tmp_path).total_steps == 6 and max(losses(tmp_path)) == 6


def test_a_refused_configuration_leaves_the_folder_to_the_next(folder, tmp_path):
  for change in ({"model.num_heads": 3}, {"data.path": str(tmp_path / "nowhere")}):
    with pytest.raises(ValueError):
      train(tiny_config(folder, **change), tmp_path / "run")
  assert train(tiny_config(folder, total_steps=1), tmp_path / "run")


def test_a_folder_in_use_is_refused(folder, tmp_path):
  with lock(tmp_path):
    with pytest.raises(ValueError, match="is in use by another process"):
      train(tiny_config(folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
