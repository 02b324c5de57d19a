"""What the programs say about mistakes on their command lines."""

import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from tiny_run import MODEL

from triform.arch import cli
from triform.arch.training.config import default_config


def make_config():
  return default_config(**MODEL)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.batch_sise=3", "no --config.batch_sise; the closest is --config.batch_size"),
    ("--config.model.heads=3", "the closest is --config.model.num_heads"),
    ("--config.learning_rate=3", "the closest is --config.optimizer.learning_rate"),
    ("--config.checkpoint.foo=3", "config.checkpoint has best, every_steps, keep"),
    ("--config.foo.bar=3", "there is no --config.foo.bar; config has accumulate, "),
    ("--config.seed.bar=3", "there is no --config.seed.bar; config has accumulate, "),
    ("--noconfig.foo", "there is no --config.foo; config has accumulate, "),
    ("--config.batch_size=x", "--config.batch_size=x: expected an int, such as 8"),
    ("--config.batch_size=1.5", "--config.batch_size=1.5: expected an int, such as 8"),
    ("--config.z_loss=x", "--config.z_loss=x: expected a float, such as 0.0"),
    ("--config.compilation_cache=maybe", "expected a bool, such as True"),
    ("--config.eval.max_tokens=all", "--config.eval.max_tokens=all: expected an int, such as 8"),
    ("--config.model.num_kv_heads=x", "--config.model.num_kv_heads=x: expected an int, such as 8"),
    ("--config.checkpoint=3", "expected one of its fields, best, every_steps, keep"),
  ],
)
def test_a_mistake_is_explained(monkeypatch, argument, message):
  monkeypatch.setattr(sys, "argv", ["program", argument])
  values = flags.FlagValues()
  with pytest.raises(cli._PARSING_ERRORS) as caught:
    config_flags.DEFINE_config_dict("config", make_config(), flag_values=values)
    values(sys.argv)
  explanation = cli._explain(caught.value, sys.argv, make_config())
  assert message in explanation and "\n" not in explanation


@pytest.mark.parametrize(
  ("arguments", "value"),
  [
    (["--workdir=a"], "a"),
    (["-workdir", "a"], "a"),
    (["--workdir=a", "--workdir", "b", "--other=c"], "b"),  # absl takes the last one too
    (["--workdirs=a", "--", "--workdir=b"], None),
    (["--workdir"], None),
  ],
)
def test_early_flag(monkeypatch, arguments, value):
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  assert cli.early_flag("workdir") == value


@pytest.mark.parametrize(
  ("error", "code", "says"),
  [
    (ValueError("too short"), 1, "error: too short\n"),
    (FileNotFoundError("no such file"), 1, "error: no such file\n"),
    (FloatingPointError("step 3: loss nan"), 1, "error: step 3: loss nan\n"),
    (KeyboardInterrupt(), 130, "\n"),
  ],
)
def test_exit_codes(capsys, error, code, says):
  def main():
    raise error

  try:
    assert cli._guarded(main) == code
  except SystemExit as ended:
    assert ended.code == code
  assert capsys.readouterr().err == says


def test_an_error_of_the_program_keeps_its_traceback():
  def main():
    raise RuntimeError("a bug")

  with pytest.raises(RuntimeError, match="a bug"):
    cli._guarded(main)


ENDLESS = """
from triform.arch import cli

def main():
  while True:
    print("x" * 1000)

cli.run(main)
"""


def test_a_reader_that_has_had_enough_ends_the_program():
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with subprocess.Popen([sys.executable, "-c", ENDLESS], **pipes) as child:
    assert child.stdout.read(10) == b"x" * 10
    child.stdout.close()
    assert child.wait(60) == 0
    assert child.stderr.read() == b""
