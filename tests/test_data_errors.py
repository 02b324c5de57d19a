"""Whatever is wrong with the data is one line and exit code 1, before anything is trained."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import tensorflow_datasets as tfds
from tfds_builders import prepare
from tiny_run import tiny_config

from triform.arch import cli
from triform.arch.data import tfds_sets
from triform.arch.data.text import load_text
from triform.arch.training.loop import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Bad input of every kind, and prepared TFDS sets under data/tfds."""
  folder = tmp_path_factory.mktemp("input")
  files = {
    "good.txt": b"some text\n" * 100,
    "short.txt": b"abc",
    "empty.txt": b"",
    "binary.bin": bytes(range(256)),
    "mixed/a.txt": b"text",
    "mixed/b.png": b"\x89PNG\r\n",
    "broken.txt.gz": gzip.compress(b"some text\n" * 100)[:-20],
    "notgzip.txt.gz": b"some text",
    "notjson.jsonl": b'{"text": "a"}\n{"text": \n',
    "notobject.jsonl": b"[1, 2]\n",
    "nofield.jsonl": b'{"text": "a"}\n{"txt": "b"}\n',
    "manyfields.jsonl": b'{"a": "x", "b": "y"}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "few.jsonl": b'{"text": "a"}\n{"text": "b"}\n',
    "blank.jsonl": b"\n\n",
  }
  for path, data in files.items():
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(data)
  for name in ("empty", "hidden/.git"):
    (folder / name).mkdir(parents=True)
  (folder / "hidden" / ".git" / "file").write_text("hidden")

  sets = folder / "data" / "tfds"
  records = [(f"text {i} " * 50, "title") for i in range(100)]
  prepare(sets, "good_set", {"train": records}, fields=("article", "title"))
  prepare(sets, "damaged_set", {"train": records}, fields=("text", "title"))
  (shard,) = (sets / "damaged_set").rglob("*array_record*")
  shard.write_bytes(shard.read_bytes()[:2000])
  prepare(sets, "flipped_set", {"train": records}, fields=("text", "title"))
  (shard,) = (sets / "flipped_set").rglob("*array_record*")
  data = bytearray(shard.read_bytes())
  data[200:240] = bytes(40)
  shard.write_bytes(data)
  prepare(sets, "old_set", {"train": records}, fields=("text", "title"))
  (info,) = (sets / "old_set").rglob("dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  return folder


CASES = {
  "missing path": ({"path": "{folder}/missing"}, "missing does not exist"),
  "empty file": ({"path": "{folder}/empty.txt"}, "empty.txt, but it is empty"),
  "empty folder": ({"path": "{folder}/empty"}, "empty, but it is empty"),
  "only hidden files": ({"path": "{folder}/hidden"}, "hidden, but it is empty"),
  "binary file": ({"path": "{folder}/binary.bin"}, "UTF-8 text in {folder}/binary.bin: byte 0x80"),
  "binary in a folder": ({"path": "{folder}/mixed"}, "UTF-8 text in {folder}/mixed/b.png"),
  "truncated gzip": ({"path": "{folder}/broken.txt.gz"}, "cannot read {folder}/broken.txt.gz"),
  "no gzip": ({"path": "{folder}/notgzip.txt.gz"}, "cannot read {folder}/notgzip.txt.gz"),
  "no JSON": ({"path": "{folder}/notjson.jsonl"}, "notjson.jsonl, line 2, is not JSON"),
  "no object": ({"path": "{folder}/notobject.jsonl"}, "line 1, is not a JSON object but list"),
  "record without text": ({"path": "{folder}/nofield.jsonl"}, "line 2, has no text in 'text'"),
  "text in which field": ({"path": "{folder}/manyfields.jsonl"}, "the text fields a, b: expected"),
  "no such field": (
    {"path": "{folder}/few.jsonl", "text_field": "body"},
    "has no text field 'body': it has text",
  ),
  "fields of plain text": ({"path": "{folder}/good.txt", "text_field": "a"}, "no fields such as"),
  "lone surrogate": ({"path": "{folder}/surrogate.jsonl"}, "lone surrogate in 'text'"),
  "few records": ({"path": "{folder}/few.jsonl"}, "has 2 documents, too few to hold some out"),
  "no records": ({"path": "{folder}/blank.jsonl"}, "expected records in"),
  "short text": ({"path": "{folder}/short.txt"}, "no text to evaluate on"),
  "shorter than a sequence": (
    {"path": "{folder}/short.txt", "validation": "{folder}/good.txt"},
    "has 4 tokens, expected at least one sequence: seq_len is 16",
  ),
  "missing validation": (
    {"path": "{folder}/good.txt", "validation": "{folder}/missing"},
    "missing does not exist",
  ),
  "vocabulary": (
    {"path": "{folder}/good.txt", "tokenizer": "sentencepiece"},
    "vocab_size=500 on this text: Vocabulary size too high",
  ),
  "unknown corpus": ({"name": "wikipedia"}, "a corpus among python_stdlib, got 'wikipedia'"),
  "unknown tokenizer": ({"tokenizer": "words"}, "bytes, sentencepiece, got 'words'"),
  "unknown TFDS set": ({"tfds": "good_sed"}, "no TFDS set 'good_sed'; the closest is 'good_set'"),
  "misspelt TFDS set": ({"tfds": "lm1d"}, "the closest is 'lm1b'"),
  "no TFDS name": ({"tfds": "a b"}, "cannot use the TFDS set 'a b'"),
  "unknown version": (
    {"tfds": "imdb_reviews:0.0.1"},
    "cannot use the TFDS set 'imdb_reviews:0.0.1'",
  ),
  "unknown split": (
    {"tfds": "good_set", "split": "tran", "text_field": "title"},
    "Unknown split 'tran'",
  ),
  "no split": ({"tfds": "good_set", "split": "train[:x]", "text_field": "title"}, "'train[:x]'"),
  "split of a path": ({"path": "{folder}/good.txt", "split": "train"}, "there is no TFDS set"),
  "which feature": ({"tfds": "good_set"}, "the text fields article, title: expected one"),
  "unknown feature": (
    {"tfds": "good_set", "text_field": "articel"},
    "TFDS set good_set has no text field 'articel': it has article, title",
  ),
  "truncated shard": ({"tfds": "damaged_set"}, "TFDS set damaged_set/1.0.0, split train:"),
  "corrupt shard": ({"tfds": "flipped_set"}, "TFDS set flipped_set/1.0.0, split train:"),
  "tfrecord": ({"tfds": "old_set"}, "as tfrecord, which needs TensorFlow to read"),
  "two corpora": ({"tfds": "good_set", "path": "x"}, "config.data has path and tfds"),
  "negative weight": ({"mixture": "tfds:good_set=-1"}, "weight of 'tfds:good_set'"),
  "no number": ({"mixture": "path:x=much"}, "is 'much': expected > 0"),
  "infinite weight": ({"mixture": "path:x=inf"}, "is 'inf': expected > 0"),
  "twice": ({"mixture": "path:x=1,path:x=2"}, "names 'path:x' twice"),
  "no mixture": ({"mixture": " , "}, "expected SOURCE=WEIGHT"),
  "unknown source": ({"mixture": "file:x=1"}, "python_stdlib, path:FILE_OR_FOLDER, tfds:NAME"),
  "bare validation": (
    {"mixture": "path:x=1", "validation": "x"},
    "config.data.validation is 'x', expected path:FILE_OR_FOLDER",
  ),
  "workers": ({"path": "{folder}/good.txt", "workers": -1}, "workers >= 0, got -1"),
}


def refused(folder, capsys, workdir, data):
  """The line that `train.py` would print."""
  changes = {f"data.{name}": value for name, value in data.items()}
  config = tiny_config(folder, **{"model.vocab_size": 500, **changes})
  with pytest.raises(SystemExit) as raised:
    cli._guarded(lambda: train(config, workdir))
  assert raised.value.code == 1
  assert not workdir.exists()  # so the mistake can be mended and the same command given again
  *_, last = capsys.readouterr().err.strip().splitlines()
  assert last.startswith("error: ")
  return last


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, case):
  data, message = CASES[case]
  data = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in data.items()}
  assert message.format(folder=folder) in refused(folder, capsys, tmp_path / "run", data)


def test_no_network_is_one_line(folder, tmp_path, capsys, monkeypatch):
  def unreachable(*_, **__):
    raise requests.exceptions.ConnectionError("Failed to resolve 'www.statmt.org'")

  monkeypatch.setattr(requests.Session, "get", unreachable)
  line = refused(folder, capsys, tmp_path / "run", {"tfds": "imdb_reviews"})
  assert "cannot download and prepare the TFDS set 'imdb_reviews' (is there no network?)" in line
  assert "Failed to resolve" in line


@pytest.mark.parametrize(
  ("name", "needed"), [("lm1b", "tensorflow"), ("pg19", "tensorflow"), ("c4/en", "apache_beam")]
)
def test_what_tfds_cannot_prepare_is_one_line(folder, tmp_path, capsys, monkeypatch, name, needed):
  find_spec = importlib.util.find_spec

  def without_tensorflow(module, *rest):
    return None if module == "tensorflow" else find_spec(module, *rest)

  def needs_beam(*_, **__):
    raise ModuleNotFoundError("No module named 'apache_beam'", name="apache_beam")

  monkeypatch.setattr(importlib.util, "find_spec", without_tensorflow)
  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", needs_beam)
  line = refused(folder, capsys, tmp_path / "run", {"tfds": name})
  assert f"TFDS set {name!r}: TFDS needs {needed} to prepare it" in line
  assert "`tfds build --file_format=array_record`" in line


def test_another_error_of_tfds_is_one_line():
  with (
    pytest.raises(ValueError, match=r"^cannot do it: TypeError: two lines$"),
    tfds_sets.explained("cannot do it"),
  ):
    raise TypeError("two\n lines")


def test_a_damaged_cache_is_named(folder, tmp_path, capsys):
  data = {"path": str(folder / "good.txt"), "dir": str(tmp_path / "data")}
  load_text({"name": "python_stdlib", "tokenizer": "bytes", **data}, 257)
  (file,) = (tmp_path / "data").rglob("train/tokens.npy")
  file.write_bytes(file.read_bytes()[:-10])
  line = refused(folder, capsys, tmp_path / "run", data)
  assert f"{file.parent} is damaged, remove it to have it prepared again" in line


def test_a_resumed_run_keeps_its_corpus(folder, tmp_path):
  for name in ("a", "b"):
    (tmp_path / f"{name}.txt").write_text("some text\n" * 100)
  changes = {"total_steps": 1, "eval.every_steps": 9, "data.path": str(tmp_path / "a.txt")}
  assert train(tiny_config(folder, **changes), tmp_path / "run")
  for other in ({"data.path": str(tmp_path / "b.txt")}, {"data.mixture": "path:x=1"}):
    with pytest.raises(ValueError, match="belongs to a run with another configuration"):
      train(tiny_config(folder, **{**changes, **other}), tmp_path / "run")
  # A work directory of the version that knew no other corpora.
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  for name in ("tfds", "mixture", "split", "text_field", "prompt_field"):
    del saved["data"][name]
  (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
  assert train(tiny_config(folder, **{**changes, "total_steps": 2}), tmp_path / "run")


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (["--config.data.path=mixed"], "UTF-8 text in mixed/b.png"),
    (["--config.data.tfds=good_sed"], "the closest is 'good_set'"),
    (["--config.data.pth=x"], "there is no --config.data.pth; the closest is --config.data.path"),
  ],
)
def test_a_mistake_on_the_command_line(folder, data, message):
  config = ROOT / "configs" / "retnet_tiny.py"
  done = subprocess.run(
    [sys.executable, str(ROOT / "train.py"), f"--config={config}", *data, "--workdir=run"],
    cwd=folder,
    capture_output=True,
    text=True,
    env={**os.environ, "TRIFORM_DATA": str(folder / "data")},
  )
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ") and message in line
  assert not (folder / "run").exists()
