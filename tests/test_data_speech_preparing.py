"""Preparation of spoken words: once, anew where files change, and by several processes."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from spoken_words import (
  RATE,
  SPEAKER,
  assert_same,
  contents,
  opener,
  rows,
  write_clip,
  write_twelve,
  write_words,
)

from triform.arch.data import speech_builder


@pytest.fixture
def opened(tmp_path):
  return opener(tmp_path)


def prepared(tmp_path) -> list[Path]:
  return sorted((tmp_path / "cache").glob("tfds/speech_clips/*/1.1.0"))


def test_clips_are_prepared_once(tmp_path, opened, monkeypatch):
  write_twelve(tmp_path / "data")
  first = opened()
  expected = rows(first, "train")
  assert len(prepared(tmp_path)) == 1
  monkeypatch.setattr(speech_builder, "read_audio", None)
  monkeypatch.setattr(speech_builder, "opened", None)
  assert_same(rows(opened(), "train"), expected)
  assert len(opened(classes="12", seed=3, on_bad="skip").examples("test")) == 12
  assert len(prepared(tmp_path)) == 1


def test_what_changed_is_prepared_anew(tmp_path, opened):
  folder = tmp_path / "data"
  write_words(folder, ("no", "yes"), {"train": 2, "test": 1})
  path = folder / "no" / f"{SPEAKER['train']}_nohash_0.wav"
  seen = [opened()]
  write_clip(path, np.full(RATE, 77))  # of the same size
  seen.append(opened())
  assert ("no", 77) in contents(seen[1], "train") and ("no", 77) not in contents(seen[0], "train")
  path.unlink()
  seen.append(opened())
  assert len(seen[2].examples("train")) == 3
  (folder / "testing_list.txt").write_text("")
  (folder / "validation_list.txt").write_text("")
  assert len(opened().examples("train")) == 5
  opened(seconds=0.5)
  opened(sample_rate=2000)
  assert len(prepared(tmp_path)) == 6


def test_a_failed_preparation_leaves_nothing(tmp_path, opened, monkeypatch):
  write_words(tmp_path / "data", ("no", "yes"), {"train": 2})
  calls = []

  def fail(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return read(*args, **kwargs)

  read = speech_builder.read_audio
  monkeypatch.setattr(speech_builder, "read_audio", fail)
  with pytest.raises(KeyboardInterrupt):
    opened()
  assert not prepared(tmp_path) and not list((tmp_path / "cache").rglob("*array_record*"))
  assert len(opened().examples("train")) == 4


KILLED = """
import os, signal, sys
from triform.arch.data import speech, speech_builder
speech_builder.read_audio = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
speech.SpeechCommands(sys.argv[1], sample_rate=int(sys.argv[2]), dir=sys.argv[3])
"""


def test_what_a_killed_preparation_left_is_removed(tmp_path, opened):
  write_words(tmp_path / "data", ("no", "yes"), {"train": 2})
  arguments = [str(tmp_path / "data"), str(RATE), str(tmp_path / "cache")]
  process = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
  assert process.returncode == -signal.SIGKILL, process.stderr
  folder = tmp_path / "cache" / "tfds" / "speech_clips"
  assert ".1.1.0.partial" in {path.name for path in folder.glob("*/*")}
  assert not prepared(tmp_path)
  assert len(opened().examples("train")) == 4
  assert {path.name for path in folder.glob("*/*")} == {"1.1.0", ".1.1.0.lock"}
