"""The program that prints words as they are said."""

import os
import re
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
from exported import random_folder
from ml_collections import ConfigDict
from test_programs import heed_interrupts
from test_recognition import LABELS, MODEL, make_model, noise
from tiny_run import run_program

from triform.arch.folder import write_folder
from triform.arch.layout import split_model, to_stacked
from triform.arch.recognition import Spotter
from triform.arch.streaming import listen, read_samples

PROGRAM = "-m", "triform.arch.streaming"
EAGER = "--threshold=0.34"  # of three classes: any that is a little likelier
LINE = r"\d+\.\d\d s  (yes|no|_silence_)  [01]\.\d\d"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With an exported model, which is random, a recording, and files that are none."""
  folder = tmp_path_factory.mktemp("user")
  model = make_model()
  _, params, variables = split_model(model)
  tensors = to_stacked({"params": params, "variables": variables})
  config = ConfigDict({"model": MODEL, "compilation_cache": False})
  write_folder(folder / "model", config=config, tensors=tensors, vocabulary=LABELS, step=7)
  random_folder(folder / "language")
  write_wav(folder / "clip.wav", samples(2345))
  write_wav(folder / "short.wav", samples(345))
  (folder / "bad.wav").write_bytes((folder / "clip.wav").read_bytes()[:30])
  (folder / "empty.raw").touch()
  return folder


def samples(n):
  return (noise(n) * 2**15).astype(np.int16)


def write_wav(path, samples, rate=1000):
  with wave.open(str(path), "wb") as file:
    file.setparams((1, 2, rate, 0, "NONE", ""))
    file.writeframes(samples.astype("<i2").tobytes())


def lines(decisions):
  return [f"{d.time:.2f} s  {d.label}  {d.posterior:.2f}" for d in decisions]


def test_words_in_a_file(folder):
  picture = folder / "words.png"
  done = run_program(
    folder, *PROGRAM, "--workdir", "model", "clip.wav", EAGER, "--picture=words.png"
  )
  assert done.returncode == 0, done.stderr
  spotter = Spotter(make_model(), LABELS, threshold=0.34)
  decided = lines(spotter.push(samples(2345)))
  *printed, end = done.stdout.splitlines()
  assert printed == decided and len(decided) >= 2
  posteriors = spotter.posteriors()
  label, posterior = LABELS[posteriors.argmax()], posteriors.max()
  assert end == f"end 2.35 s  {label}  {posterior:.2f}"
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_words_on_standard_input_while_they_are_said(folder):
  """What was heard is told before more comes; ctrl-C is no traceback."""
  command = [sys.executable, *PROGRAM, "--workdir=model", EAGER, "-"]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with subprocess.Popen(command, cwd=folder, preexec_fn=heed_interrupts, **pipes) as child:
    try:
      sound, got = samples(2345), []
      expected = lines(Spotter(make_model(), LABELS, threshold=0.34).push(sound))
      for piece in (sound[:1200], sound[1200:]):
        child.stdin.write(piece.tobytes())
        child.stdin.flush()
        got.append(child.stdout.readline().decode().strip())
      assert re.fullmatch(LINE, got[0]) and got == expected[:2]
      assert child.poll() is None
      child.send_signal(signal.SIGINT)
      errors = child.communicate(timeout=60)[1]
    finally:
      child.kill()
  assert child.returncode == 130 and b"Traceback" not in errors


def test_a_mistake_is_one_line(folder):
  done = run_program(folder, *PROGRAM, "--workdir=model", "clip.wav", "short.wav")
  assert done.returncode == 1
  assert "expected one FILE, or - for standard input, got clip.wav, short.wav" in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("model", "nowhere.wav"), "nowhere.wav cannot be read: No such file or directory"),
    (("model", "bad.wav"), "bad.wav is damaged"),
    (("language", "clip.wav"), "language: RetNet is no classifier of audio"),
    (("nowhere", "clip.wav"), "nowhere/config.json not found"),
    (("model", "clip.wav", {"threshold": 2.0}), "model: threshold is 2.0, expected more than 0"),
    (("model", "clip.wav", {"step": 8}), "holds the model after step 7, not 8"),
    (("model", "-", {"picture": "x.png"}), "a picture is of a file, not of standard input"),
  ],
)
def test_what_cannot_be_listened_to(folder, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(folder)
  workdir, file, *options = arguments
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    listen(workdir, file, **dict(*options))
  assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


def test_a_clip_of_another_rate_within_a_window(folder, capsys):
  """It is the same as the posterior of all."""
  write_wav(folder / "fast.wav", samples(345).repeat(2), rate=2000)
  for name in ("short.wav", "fast.wav"):
    listen(folder / "model", str(folder / name), threshold=1.0)
    out = capsys.readouterr().out
    assert re.fullmatch(f"end {LINE}\n", out) and out.startswith("end 0.3")
  spotter = Spotter(make_model(), LABELS)
  spotter.push(samples(345))
  listen(folder / "model", str(folder / "short.wav"), threshold=1.0)
  assert f"{spotter.posteriors().max():.2f}" in capsys.readouterr().out


def test_silence_on_standard_input_is_a_mistake(folder, monkeypatch):
  with (folder / "empty.raw").open() as file:
    monkeypatch.setattr(sys, "stdin", file)
    with pytest.raises(ValueError, match="there are no samples to hear"):
      listen(folder / "model", "-")


def test_samples_that_come_in_halves():
  read, write = os.pipe()
  sound, got = samples(10), []
  blocks = read_samples(read)
  data = sound.astype("<i2").tobytes() + b"\x01"
  for piece in (data[:5], data[5:6], data[6:]):
    os.write(write, piece)
    got.append(next(blocks))
  os.close(write)
  assert list(blocks) == []
  os.close(read)
  assert [len(block) for block in got] == [2, 1, 7]
  np.testing.assert_array_equal(np.concatenate(got), sound)


@pytest.mark.parametrize(("data", "kind"), [(b"RIFF____WAVEfmt ", "WAV"), (b"fLaC____", "FLAC")])
def test_a_file_on_standard_input_is_not_taken_for_samples(data, kind):
  read, write = os.pipe()
  os.write(write, data)
  os.close(write)
  with pytest.raises(ValueError, match=f"is a {kind} file, expected raw samples: give its path"):
    list(read_samples(read))
  os.close(read)
