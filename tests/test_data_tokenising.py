"""Large corpora: worker processes, bounded memory, caches that are whole or absent."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from tfds_builders import prepare

from triform.arch.data import processes, tokenising
from triform.arch.data.files import ArrayWriter, prepared_folder
from triform.arch.data.packing import Documents
from triform.arch.data.text_files import PathSource
from triform.arch.data.tfds_sets import TfdsSource, prepared_builder
from triform.arch.data.tokenising import sampled_texts, tokenised
from triform.arch.data.tokenizers import ByteTokenizer, train_sentencepiece

LINES = [f"name{i} = {i * i} # comment {i % 7}\n" for i in range(3000)]


@pytest.fixture
def source(tmp_path):
  for i in range(60):
    file = tmp_path / "corpus" / f"{i}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(LINES[50 * i : 50 * i + 50]))
  return PathSource(tmp_path / "corpus")


def test_worker_processes_give_what_one_process_gives(source, tmp_path, monkeypatch):
  tokenizer = train_sentencepiece(LINES, 400, tmp_path)
  alone = tokenised(source, tokenizer, tmp_path / "alone", hold_out=True)
  monkeypatch.setattr(tokenising, "_LARGE", 0)
  monkeypatch.setattr(tokenising, "PIECE_BYTES", 3000)  # several groups
  monkeypatch.setattr(tokenising, "available_processors", lambda: 2)
  started = []
  original = processes.ProcessPoolExecutor
  monkeypatch.setattr(
    processes, "ProcessPoolExecutor", lambda *a, **k: started.append(a) or original(*a, **k)
  )
  together = tokenised(source, tokenizer, tmp_path / "together", hold_out=True)
  assert started == [(2,)]
  for split in ("train", "validation"):
    np.testing.assert_array_equal(alone[split].tokens, together[split].tokens)
    np.testing.assert_array_equal(alone[split].ends, together[split].ends)


def fail_at_seven(shared, item):
  if item == 7:
    raise ValueError(f"{shared} {item}")
  return item


def kill_self(shared, item):
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error():
  with pytest.raises(ChildProcessError, match="enough memory"):
    list(processes.ordered_map(kill_self, None, range(5), 2))


def test_items_are_taken_as_they_are_needed():
  taken = []
  items = (taken.append(i) or i for i in range(10**9))
  results = processes.ordered_map(fail_at_seven, "item", items, 2)
  assert [next(results) for _ in range(7)] == list(range(7))
  assert len(taken) < 20
  with pytest.raises(ValueError, match="item 7"):
    next(results)


CHILD = """
  import sys, time
  from pathlib import Path
  from triform.arch.data.text_files import PathSource
  from triform.arch.data.tokenising import tokenised
  from triform.arch.data.tokenizers import ByteTokenizer

  class Slow(ByteTokenizer):
    def encode(self, text):
      print("encoding", flush=True)
      time.sleep(1000)

  source = PathSource(Path(sys.argv[1]))
  tokenised(source, Slow(), Path(sys.argv[2]), hold_out=True)
"""


def test_a_killed_process_leaves_no_cache(source, tmp_path):
  command = [sys.executable, "-c", textwrap.dedent(CHILD), source.name, str(tmp_path / "tokens")]
  child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert child.stdout.readline() == "encoding\n"
  child.send_signal(signal.SIGKILL)
  child.wait()
  assert not list((tmp_path / "tokens" / source.key).glob("[!.]*"))
  documents = tokenised(source, ByteTokenizer(), tmp_path / "tokens", hold_out=True)
  assert len(documents["train"]) + len(documents["validation"]) == 60
  assert sorted(f.name for f in (tmp_path / "tokens" / source.key).iterdir()) == [
    ".bytes-split.lock",
    "bytes-split",
  ]


def test_a_folder_is_prepared_once_and_whole(tmp_path):
  def fail(folder):
    (folder / "half").write_text("")
    raise KeyboardInterrupt

  folder = tmp_path / "a" / "b"
  with pytest.raises(KeyboardInterrupt):
    prepared_folder(folder, fail)
  assert [file.name for file in folder.parent.iterdir()] == [".b.lock"]
  assert prepared_folder(folder, lambda f: (f / "whole").write_text("x")) == folder
  assert prepared_folder(folder, fail) == folder
  assert os.listdir(folder) == ["whole"]


RACE = """
  import sys, time
  from pathlib import Path
  from triform.arch.data.files import prepared_folder

  def prepare(folder):
    print("prepared", flush=True)
    time.sleep(1)
    (folder / "file").write_text("x")

  prepared_folder(Path(sys.argv[1]), prepare)
"""


def test_of_two_processes_one_prepares(tmp_path):
  command = [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path / "folder")]
  children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
  output = [child.communicate(timeout=60)[0] for child in children]
  assert [child.returncode for child in children] == [0, 0]
  assert "".join(output) == "prepared\n"


MEMORY = """
  import resource, sys
  from pathlib import Path
  from triform.arch.data.text_files import PathSource
  from triform.arch.data.packing import PackedWindows
  from triform.arch.data.tokenising import tokenised
  from triform.arch.data.tokenizers import ByteTokenizer

  def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

  before = peak()
  source = PathSource(sys.argv[1])
  train = tokenised(source, ByteTokenizer(), Path(sys.argv[2]), hold_out=True)["train"]
  print(peak() - before, len(train.tokens) // 2**20)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
  with (tmp_path / "a.txt").open("w") as file:
    for _ in range(60):
      file.write("".join(LINES) * 10)
  size = (tmp_path / "a.txt").stat().st_size / 2**20
  command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
  done = subprocess.run(
    [*command, str(tmp_path / "a.txt"), str(tmp_path / "tokens")], capture_output=True, text=True
  )
  grown, tokens = map(int, done.stdout.split())
  assert size > 50 and tokens > 0.9 * size
  assert grown < size / 2


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 5], [100_000]])
def test_arrays_are_written_piece_by_piece(tmp_path, lengths):
  parts = [np.arange(n) for n in lengths]
  with ArrayWriter(tmp_path / "a.npy", np.uint16) as writer:
    for part in parts:
      writer.append(part)
  array = np.load(tmp_path / "a.npy", mmap_mode="r")
  expected = np.concatenate([np.zeros(0), *parts]).astype(np.uint16)
  np.testing.assert_array_equal(array, expected)
  assert array.dtype == np.uint16


def test_large_vocabularies_have_wider_files(source, tmp_path, monkeypatch):
  narrow = tokenised(source, ByteTokenizer(), tmp_path / "a", hold_out=False)["all"]
  monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
  wide = tokenised(source, ByteTokenizer(), tmp_path / "b", hold_out=False)["all"]
  assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.int32)
  np.testing.assert_array_equal(narrow.tokens, wide.tokens)
  assert isinstance(wide, Documents) and len(wide) == 60


def test_the_sample_is_bounded_and_always_the_same(source):
  everything = "".join(sampled_texts(source, 10**9, hold_out=False))
  assert len(everything) == source.size
  sample = list(sampled_texts(source, source.size // 4, hold_out=False))
  assert sample == list(sampled_texts(source, source.size // 4, hold_out=False))
  assert 0.1 * source.size < sum(map(len, sample)) <= source.size // 4
  assert len(sample) > 5  # from all over
  train = tokenised_texts(source)
  assert set(sampled_texts(source, 10**9, hold_out=True)) == train


def test_the_sample_of_a_tfds_set_is_read_alone(tmp_path, monkeypatch):
  prepare(tmp_path, "to_sample", {"train": [(f"text {i:04}",) for i in range(1000)]})
  source = TfdsSource("to_sample", prepared_builder("to_sample", tmp_path), "train")
  assert source.size > 0
  read = []
  original = type(source._records).__getitem__
  monkeypatch.setattr(
    type(source._records), "__getitem__", lambda self, i: read.append(i) or original(self, i)
  )
  sample = list(sampled_texts(source, source.size // 10, hold_out=False))
  assert 20 < len(sample) <= len(read) <= 101
  assert min(read) < 50 and max(read) > 900
  sample = set(sampled_texts(source, 10**9, hold_out=False))
  assert sample == {f"text {i:04}" for i in range(1000)}


def tokenised_texts(source):
  held_out, cut = tokenising.is_in_validation(source)
  return {piece.text for piece in source.pieces(cut=cut) if not held_out(piece)}


def test_a_named_text_is_not_read_again(tmp_path):
  def unread():
    raise AssertionError("read again")
    yield

  first = train_sentencepiece(LINES, 400, tmp_path, key="lines")
  assert train_sentencepiece(unread(), 400, tmp_path, key="lines").pieces == first.pieces
  with pytest.raises(AssertionError, match="read again"):
    train_sentencepiece(unread(), 400, tmp_path, key="other lines")
