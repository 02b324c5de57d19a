"""Runs of two processes, started as a user would, which talk through sockets."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_corpus

from triform.arch import hosts
from triform.arch.training.workdir import lock

TESTS = Path(__file__).parent
STEPS = 200
CONFIG = f"""
from tiny_run import tiny_config

def get_config():
  changes = {{"eval.every_steps": 1000, "checkpoint.every_steps": 1000, "checkpoint.best": True}}
  return tiny_config(None, total_steps={STEPS}, average_decay=0.9, **changes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  write_corpus(folder / "corpus")
  (folder / "tiny.py").write_text(CONFIG)
  return folder


@pytest.fixture
def start(folder):
  """Starts `train.py` on one device, or two, of the CPU."""
  started = []
  paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
  environment = os.environ | {"PYTHONPATH": paths, "TRIFORM_DATA": str(folder / "data")}

  def start(workdir, *arguments, devices=1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    common = ["--config=tiny.py", "--config.data.path=corpus", f"--workdir={workdir}"]
    process = subprocess.Popen(
      [sys.executable, str(TESTS.parent / "train.py"), *common, *arguments],
      cwd=folder,
      env=environment | {"XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()


@pytest.fixture
def pair(start):
  def pair(workdir, *arguments, second=()):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
      start(workdir, f"--processes={address},2,{i}", *arguments, *(second if i else ()))
      for i in range(2)
    ]

  return pair


def ended(processes):
  """Exit code, what it printed and what it complained of, of each."""
  results = []
  for process in processes:
    printed, errors = process.communicate(timeout=300)
    printed = [line for line in printed.splitlines() if not line.startswith("[Gloo]")]
    results.append((process.returncode, "\n".join(printed), errors))
  return results


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  kept = ("loss", "bits_per_byte", "eval_loss", "eval_bits_per_byte")
  return {(name, row["step"]): row[name] for row in rows for name in kept if name in row}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_two_processes_train_stop_and_resume_like_one(folder, start, pair, axis):
  one, two, mesh = f"one-{axis}", f"two-{axis}", f"--config.mesh={axis}=2"
  whole = start(one, mesh, devices=2)
  first, second = pair(two, mesh)
  for line in first.stdout:
    if line.startswith("step 10/"):
      second.send_signal(signal.SIGTERM)  # one is asked, both stop
      break
  (code, printed, errors), (second_code, *nothing) = ended([first, second])
  assert code == second_code == 0, errors
  assert f"stopped; what was done is in {two}, and the same" in printed
  assert nothing[0] == ""
  (code, printed, errors), (second_code, *nothing) = ended(pair(two, mesh))
  assert code == second_code == 0, errors
  assert printed.startswith(f"resuming {two} from step ")
  assert nothing[0] == ""
  assert ended([whole])[0][0] == 0
  expected, got = losses(folder / one), losses(folder / two)
  assert got.keys() == expected.keys()
  names, step = zip(*got, strict=True)
  assert "eval_loss" in names and max(step) == STEPS
  np.testing.assert_allclose([got[k] for k in got], [expected[k] for k in got], rtol=1e-4)
  kept = {path.name for path in (folder / one).iterdir()}
  assert {path.name for path in (folder / two).iterdir()} == kept


def test_what_one_process_refuses_ends_both(folder, pair):
  with lock(folder / "taken"):
    for code, printed, errors in ended(pair("taken")):
      assert code == 1 and printed == ""
      assert errors.splitlines()[-1].startswith("error: workdir taken is in use by another process")


@pytest.mark.slow
def test_processes_of_different_runs_are_told(folder, pair):
  for code, printed, errors in ended(pair("unlike", second=["--config.seed=1"])):
    assert code == 1 and printed == ""
    assert errors.splitlines()[-1] == (
      "error: the configuration of process 1 differs from that of process 0: expected the same"
    )
  assert not (folder / "unlike").exists()


@pytest.mark.parametrize("spec", ["2", "host,2,0", "host:1,2,2", "host:1,2", "host:1,two,0"])
def test_a_place_among_processes_that_cannot_be_read_is_refused(spec):
  with pytest.raises(ValueError, match="expected auto or HOST:PORT,COUNT,INDEX"):
    hosts.start(spec)


def test_auto_where_nothing_is_known_is_refused():
  known = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_")
  done = subprocess.run(  # JAX asks that nothing was computed before
    [sys.executable, "-c", "from triform.arch import hosts; hosts.start('auto')"],
    env={name: value for name, value in os.environ.items() if not name.startswith(known)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert re.search(r"ValueError: .*JAX knows no other process here .*HOST:PORT,COUNT", done.stderr)


def test_one_process_agrees_with_itself():
  hosts.check_same("anything", "x")
  hosts.wait()
  assert hosts.is_first() and hosts.total(3) == 3
  with pytest.raises(OSError, match="as it was"), hosts.together():
    raise OSError("as it was")
