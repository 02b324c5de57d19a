"""The benchmark of retention's GPU kernel, with XLA's form in the kernel's place."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_numerics
import gpu_retention
import gpu_rivals
import jax
import jax.numpy as jnp
import pytest

from triform import kernels

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

SHAPE = gpu_rivals.Shape(1, 64, 2, 16, 16)
PACKED = gpu_numerics.Case("packed", 40, 2, 1, 8, 8, packed=True)
PER_TOKEN = gpu_numerics.Case("per token", 40, 2, 1, 8, 8, "[b, t, h]", packed=True)
CARD = gpu_retention.Card("a card", flops=989e12, bandwidth=3.35e12)


def chunkwise(arrays, reset, mask):
  *arrays, state = arrays
  return kernels.retention(*arrays, state=state, reset=reset, mask=mask, chunk_size=16)


def without_documents(arrays, reset, mask):
  return chunkwise(arrays, None, mask)


def with_other_decays(arrays, reset, mask):
  *heads, log_decay, state = arrays
  return chunkwise((*heads, 1.1 * log_decay, state), reset, mask)


def with_the_state_before(arrays, reset, mask):
  return chunkwise(arrays, reset, mask)[0], arrays[-1]


def of_no_numbers(arrays, reset, mask):
  return jax.tree.map(lambda a: a * jnp.nan, chunkwise(arrays, reset, mask))


def that_raises(arrays, reset, mask):
  raise NotImplementedError("no room\nfor it")


def ours(arrays, backward, implementation, **options):
  """As `gpu_rivals.ours`, on this processor."""
  return gpu_rivals.program(
    lambda *heads: kernels.retention(*heads, -jnp.ones(2) / 8, **options)[0], arrays, backward
  )


@pytest.mark.parametrize("case", [PACKED, PER_TOKEN])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_right_kernel_is_found_to_be(dtype, case):
  rows = list(gpu_numerics.check(dtype, chunkwise, [case]))
  assert [row["dtype"] for row in rows] == [dtype] * 7
  assert all(row["ok"] for row in rows)


@pytest.mark.parametrize(
  ("wrong", "result"),
  [
    (without_documents, "out"),
    (with_other_decays, "out"),
    (with_other_decays, "gradient of k"),
    (with_the_state_before, "final state"),
    (with_the_state_before, "gradient of state"),
    (of_no_numbers, "out"),
  ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_wrong_kernel_is_found(wrong, result, dtype, capsys):
  rows = gpu_numerics.show(gpu_numerics.check(dtype, wrong, [PACKED]))
  assert not next(row for row in rows if row["result"] == result)["ok"]
  assert re.search(f"{result} .*TOO LARGE", capsys.readouterr().out)
  assert "NaN" not in json.dumps(rows)


def test_what_a_kernel_raises_is_a_row_and_the_rest_is_known():
  rows = list(gpu_numerics.check("float32", that_raises, [PACKED, PER_TOKEN]))
  assert [row["case"] for row in rows] == ["packed", "per token"]
  assert {row["failed"] for row in rows} == {"NotImplementedError: no room"}
  assert not any(row["ok"] for row in rows)


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_errors_at_a_timed_shape(off):
  """Of a kernel whose gradient of k is too large."""

  def results(dtype, implementation):
    arrays = gpu_rivals.inputs(SHAPE, dtype)
    o, (d_q, d_k, d_v) = ours(arrays, True, None).start()
    scale = 1 + off * (implementation == "gpu")
    return o, (d_q, (scale * d_k).astype(d_k.dtype), d_v)

  rows = list(gpu_numerics.check_at_size("a shape", results))
  wrong = [row["result"] for row in rows if not row["ok"]]
  assert wrong == (["gradient of k"] if off else []) and len(rows) == 4


def test_bounds_are_those_by_hand():
  shape = gpu_rivals.Shape(4, 4096, 16, 128, 128)
  assert shape in gpu_retention.GOALS
  array = 4 * 4096 * 16 * 128 * 2  # bytes
  # q, k, v read and o written; then these read and d_o, and d_q, d_k, d_v written.
  slow, memory = CARD._replace(flops=1e9), CARD.bandwidth
  assert gpu_retention.bound(shape, False, CARD) == pytest.approx(4 * array / memory)
  assert gpu_retention.bound(shape, True, CARD) == pytest.approx((4 + 7) * array / memory)
  # Of a chunk and head: scores and outputs of pairs, outputs of the state and what is added to it.
  chunk = 2 * (64 * 65 / 2) * (128 + 128) + 2 * (2 * 64 * 128 * 128)
  products = 4 * 16 * (4096 / 64) * chunk
  assert gpu_retention.bound(shape, False, slow) == pytest.approx(products / 1e9)
  assert gpu_retention.bound(shape, True, slow) == pytest.approx(3 * products / 1e9)
  pairs = 4 * 16 * 2 * (4096 * 4097 / 2) * (128 + 128)
  assert gpu_retention.bound(shape, False, slow, attention=True) == pytest.approx(pairs / 1e9)


def test_goals_are_above_what_the_card_can_do():
  for shape, goals in gpu_retention.GOALS.items():
    for backward, goal in enumerate(goals):
      assert 1e3 * gpu_retention.bound(shape, bool(backward), CARD) < goal


def test_what_is_measured_where():
  installed = {"jla": "jax-linear-attention", "fla": "fla"}
  others = {name for module, name in installed.items() if importlib.util.find_spec(module)}
  ours = {"gpu", "xla 64", "xla 128"}
  equal, long = gpu_rivals.Shape(4, 4096, 16, 128, 128), gpu_rivals.Shape(1, 65536, 16, 128, 128)
  assert set(gpu_rivals.of(equal)) - others == ours | {"xla parallel", "attention (cudnn)"}
  assert set(gpu_rivals.of(long)) - others == ours | {"attention (cudnn)"}
  assert set(gpu_rivals.of(gpu_retention.specs.LONG)) - others == ours


@pytest.mark.parametrize("backward", [False, True])
def test_rows_tell_times_and_what_failed(backward):
  def broken(arrays, backward):
    raise MemoryError("too much")

  functions = {
    "gpu": functools.partial(ours, implementation="gpu"),
    "xla 64": functools.partial(ours, implementation="xla"),
    "other": broken,
  }
  gpu, xla, other = gpu_retention.measure(SHAPE, backward, CARD, functions)
  bound = 1e3 * gpu_retention.bound(SHAPE, backward, CARD)
  for row in (gpu, xla):
    assert 0 < row["ms"] < 1000 and row["ratio"] == pytest.approx(row["ms"] / bound)
  assert gpu["best_xla"] == "xla 64" and 0.05 < gpu["of_best_xla"] < 20
  assert other["failed"] == "MemoryError: too much" and "ms" not in other
  assert "too much" in gpu_retention.show(other)


@pytest.mark.parametrize("kernel", [chunkwise, with_other_decays])
def test_a_run_tells_all_and_ends_with_its_verdict(kernel, monkeypatch, tmp_path, capsys):
  file = tmp_path / "rows.json"
  check = functools.partial(gpu_numerics.check, retention=kernel, cases=[PACKED])
  monkeypatch.setattr(sys, "argv", ["gpu_retention.py", "--quick", f"--json={file}"])
  monkeypatch.setattr(gpu_retention, "is_hopper", lambda device: True)
  monkeypatch.setattr(gpu_retention, "card", lambda device: CARD)
  monkeypatch.setattr(gpu_retention, "GOALS", {SHAPE: (1.5, 2.5)})
  monkeypatch.setattr(gpu_retention, "ROUNDS", 2)
  monkeypatch.setattr(gpu_rivals, "ours", ours)
  functions = {"gpu": functools.partial(ours, implementation="gpu")}
  monkeypatch.setattr(gpu_rivals, "of", lambda shape: functions)
  monkeypatch.setattr(gpu_numerics, "check", check)
  status = gpu_retention.main()
  assert status == (0 if kernel is chunkwise else 1)
  kept = json.loads(file.read_text())
  assert {"jax", "driver", "device"} <= set(kept["environment"])
  goals = [row["goal"] for row in kept["rows"] if row.get("op") == "gpu"]
  assert goals == [1.5, 2.5]
  assert sum("error" in row for row in kept["rows"]) == 7 + 4 + 7
  assert "1,64,2,16,16" in capsys.readouterr().out


def test_without_a_gpu_it_ends_with_a_line():
  done = subprocess.run(
    [sys.executable, BENCHMARKS / "gpu_retention.py"], capture_output=True, text=True, check=False
  )
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr == "Retention's kernel needs a Hopper GPU, JAX has found: cpu.\n"


def test_the_training_step_of_the_docstring_is_a_configuration():
  command = gpu_retention.__doc__
  (file,) = re.findall(r"--config=(\S+)", command)
  spec = importlib.util.spec_from_file_location("config", ROOT / file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  for path, value in re.findall(r"--config\.(\S+)=(\S+)", command):
    section, _, field = path.rpartition(".")
    section = config[section] if section else config
    assert field in section, path
    section[field] = int(value) if value.isdigit() else value
  assert config.batch_size * config.seq_len == 65536
  assert (config.model.vocab_size, config.model.dtype) == (128256, "bfloat16")
