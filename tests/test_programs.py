"""train.py and eval.py as a user runs them, and README's own blocks."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_config, use_corpus, write_corpus

from triform.arch import load
from triform.arch.data import python_stdlib
from triform.arch.data.text import documents_from_path
from triform.arch.evaluation import evaluate
from triform.arch.interface import FORMS
from triform.arch.training.loop import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
  return folder


def run(folder, *arguments, **options):
  program, *rest = arguments
  return subprocess.run(
    [sys.executable, str(ROOT / program), *rest],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "TRIFORM_DATA": str(folder / "data")},
    **options,
  )


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
    "--text=stdlib", "--config.eval.max_tokens=200",
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
    (["--config.model.num_heads=two"], "invalid literal for int() with base 10: 'two'"),
    (["--wrkdir=x"], "Did you mean: workdir"),
    (["--workdir=."], "expected a new or empty folder"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(folder, arguments, message):
  config = ROOT / "configs" / "retnet_tiny.py"
  done = run(folder, "train.py", f"--config={config}", *arguments)
  assert done.returncode == 1
  assert message in done.stderr and "Traceback" not in done.stderr


def test_eval_of_nothing_is_one_line(folder):
  done = run(folder, "eval.py", "--workdir=nowhere")
  assert done.returncode == 1
  assert "nowhere/config.json not found" in done.stderr and "Traceback" not in done.stderr


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", blocks("python")[1:], ids=range(len(blocks("python")) - 1))
def test_readme_python(folder, monkeypatch, block):
  monkeypatch.chdir(folder)
  exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
def test_readme_programs(folder):
  commands = [line for block in blocks("bash") for line in block.splitlines() if "eval.py" in line]
  assert len(commands) == 3
  for command in commands:
    _, *arguments = shlex.split(command)
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
