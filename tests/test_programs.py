"""train.py and eval.py as a user runs them, and README's own blocks."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import run_program, tiny_config, use_corpus, write_corpus

from triform.arch import load
from triform.arch.data import python_stdlib
from triform.arch.data.text import documents_from_path
from triform.arch.evaluation import evaluate
from triform.arch.interface import FORMS
from triform.arch.training.loop import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = """
from triform.arch.training.config import default_config


def get_config(layers):
  config = default_config(
    architecture="retnet", vocab_size=257, d_model=8, num_layers=int(layers), num_heads=2,
    value_dim=8, ffn_dim=8,
  )
  config.data.tokenizer = "bytes"
  config.seq_len, config.batch_size = 16, 2
  config.total_steps, config.log_every_steps = 1_000_000, 1
  config.checkpoint.every_steps = config.eval.every_steps = 1_000_000
  config.compilation_cache = False
  config.peak_flops = 1e12
  return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a trained model in runs/retnet_tiny, as README leaves it."""
  folder = tmp_path_factory.mktemp("user")
  write_corpus(folder / "stdlib")
  before = python_stdlib.stdlib_root
  use_corpus(folder / "stdlib")
  changes = {"total_steps": 60, "optimizer.learning_rate": 1e-2, "eval.every_steps": 60}
  train(tiny_config(folder, **changes), folder / "runs" / "retnet_tiny")
  python_stdlib.stdlib_root = before
  (folder / "README.md").write_text(README)
  (folder / "configs").symlink_to(ROOT / "configs")
  return folder


def run(folder, program, *arguments, **options):
  return run_program(folder, str(ROOT / program), *arguments, **options)


def test_the_three_forms_agree_on_a_trained_model(folder):
  model, tokenizer = load(folder / "runs" / "retnet_tiny")
  documents = documents_from_path(folder / "stdlib", tokenizer)
  losses = [
    evaluate(model, documents, tokenizer, form=form, seq_len=48, batch_size=4, max_tokens=1500)
    for form in FORMS
  ]
  for result in losses:
    assert result["loss"] == pytest.approx(losses[0]["loss"], rel=1e-4)
    assert result["tokens"] == 1500
    assert result["bits_per_byte"] < 4  # trained: the text has few distinct bytes


def test_eval_writes_its_result(folder):
  done = run(
    folder, "eval.py", "--workdir=runs/retnet_tiny", "--form=recurrent", "--json=out.json",
    "--text=stdlib", "--config.eval.max_tokens=200", "--step=56",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads((folder / "out.json").read_text())
  assert result["tokens"] == 200 and result["form"] == "recurrent"
  assert {"loss", "perplexity", "bits_per_byte"} <= result.keys()
  assert "bits_per_byte" in done.stdout


def test_eval_writes_losses_by_position(folder):
  done = run(
    folder, "eval.py", "--workdir=runs/retnet_tiny", "--task=positions", "--json=positions.json",
    "--text=README.md", "--config.eval.max_tokens=1600",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads((folder / "positions.json").read_text())
  assert result["window"] == 16  # of training
  assert result["tokens"] == sum(row["tokens"] for row in result["positions"]) == 1600
  assert result["positions"][-1]["last"] == 1599 and result["form"] == "chunkwise"
  assert "1,024 to 1,599" in done.stdout


def test_generate_continues_standard_input(folder):
  done = run(
    folder, "eval.py", "--workdir=runs/retnet_tiny", "--task=generate", "--prompt_file=-",
    "--max_new_tokens=20", "--temperature=0", input="name1 = ",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("name1 = ") and len(done.stdout) > len("name1 = \n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.batch_sise=3"], "no --config.batch_sise; the closest is --config.batch_size"),
    (["--config.batch_size=two"], "--config.batch_size=two: expected an int, such as 2"),
    (["--wrkdir=x"], "Did you mean: workdir"),
    (["--workdir=."], "expected a new or empty folder"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(folder, arguments, message):
  config = ROOT / "configs" / "retnet_tiny.py"
  done = run(folder, "train.py", f"--config={config}", *arguments)
  assert done.returncode == 1
  assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ("configs/retnet_tiny.py:big", "variant is 'big', expected one of torchscale"),
    ("configs/nowhere.py", "No such file or directory"),
  ],
)
def test_a_wrong_config_is_one_line(folder, config, message):
  done = run(folder, "train.py", f"--config={ROOT / config}")
  assert done.returncode == 1
  assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=nowhere"], "nowhere/config.json not found"),
    (["--config.eval.batch_sise=3"], "the closest is --config.eval.batch_size"),
    (["--step=7"], "expected a checkpoint of step 7"),
    (["--task=accuracy"], "runs/retnet_tiny, expected --task=loss or positions or generate"),
    (["--split=test"], "--split is not for a language model such as runs/retnet_tiny"),
    (["--task=generate", "--json=x"], "--json is for --task=loss or positions, not generate"),
    (["--task=generate", "--prompt_file=bad.txt"], "expected UTF-8 text in bad.txt: "),
  ],
)
def test_a_mistake_in_evaluation_is_one_line(folder, arguments, message):
  (folder / "bad.txt").write_bytes(b"\xff")
  done = run(folder, "eval.py", "--workdir=runs/retnet_tiny", *arguments)
  assert done.returncode == 1
  assert message in done.stderr and "Traceback" not in done.stderr


def test_generation_streams_and_stops_at_once(folder):
  """The beginning can be read while the rest is made; ctrl-C is no traceback."""
  command = [sys.executable, str(ROOT / "eval.py"), "--workdir=runs/retnet_tiny"]
  command += ["--task=generate", "--prompt=name1", "--max_new_tokens=1000000", "--temperature=1"]
  command += ["--top_k=5", "--top_p=0.9", "--seed=1"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  env = {**os.environ, "TRIFORM_DATA": str(folder / "data")}
  with subprocess.Popen(command, cwd=folder, env=env, preexec_fn=heed_interrupts, **pipes) as child:
    try:
      assert child.stdout.read(5) == b"name1"
      assert len(child.stdout.read(20)) == 20
      assert child.poll() is None
      child.send_signal(signal.SIGINT)
      errors = child.communicate(timeout=60)[1]
    finally:
      child.kill()
  assert child.returncode == 130 and b"Traceback" not in errors


def heed_interrupts():
  """For a child: tests that run in the background are told to ignore ctrl-C, which is inherited."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_train_has_a_default_workdir_and_says_that_it_was_stopped(folder, tmp_path):
  (tmp_path / "small.py").write_text(SMALL)
  data = folder / "stdlib"
  command = [sys.executable, str(ROOT / "train.py"), "--config=small.py:3"]
  command += [f"--config.data.path={data}", f"--config.data.dir={tmp_path / 'data'}"]
  command += ["--config.total_tokens=64_000_000"]  # the file gives steps, which these replace
  with subprocess.Popen(
    command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as child:
    try:
      assert child.stdout.readline().startswith("step 1/2000000")
      child.send_signal(signal.SIGINT)
      out, err = child.communicate(timeout=120)
    finally:
      child.kill()
  assert child.returncode == 0
  assert "stopped; what was done is in runs/small_3" in out
  assert "stopping after this step; again to stop at once" in err
  assert (tmp_path / "runs" / "small_3" / "metrics.jsonl").exists()


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python")[1:], ids=range(len(blocks("python")) - 1))
def test_readme_python(folder, monkeypatch, block):
  monkeypatch.chdir(folder)
  exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
def test_readme_programs(folder):
  lines = [line for block in blocks("bash") for line in block.splitlines()]
  commands = [line for line in lines if "eval.py" in line or "-m triform" in line]
  elsewhere = "mnist", "speech_commands"  # are not here
  commands = [line for line in commands if not any(name in line for name in elsewhere)]
  assert len(commands) == 8
  shortly = next(line for line in lines if "lmuformer_tones_tiny.py" in line)
  for command in (f"{shortly} --config.total_epochs=0.05", *commands):
    for program in ("train.py", "eval.py"):
      command = command.replace(f"python {program}", f"python {ROOT / program}")
    _, *arguments = shlex.split(command)
    done = run_program(folder, *arguments)
    assert done.returncode == 0, done.stderr
