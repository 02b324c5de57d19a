import hashlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from triform.arch.data import python_stdlib
from triform.arch.data.python_stdlib import PythonStdlib
from triform.arch.data.text import documents_from_path, load_text
from triform.arch.data.tokenizers import ByteTokenizer

SOURCES = {
  **{f"module{i}.py": f"def call{i}(x):\n\treturn x * {i}\r\n\n" * (1 + i % 3) for i in range(60)},
  "package/__init__.py": "# \u00fcber \U0001f600\n",
  "package/testing.py": "# not a test folder\n",
}
LEFT_OUT = {
  "test/test_a.py": b"a",
  "package/tests/b.py": b"b",
  "idlelib/idle_test/c.py": b"c",
  "site-packages/d.py": b"d",
  "dist-packages/e.py": b"e",
  "__pycache__/f.py": b"f",
  "empty.py": b"",
  "latin.py": b"# \xe9\n",
  "data.txt": b"not source",
}


def write(root, path, data):
  file = root / path
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(data)


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
  root = tmp_path / "stdlib"
  for path, text in SOURCES.items():
    write(root, path, text.encode("utf-8"))
  for path, data in LEFT_OUT.items():
    write(root, path, data)
  monkeypatch.setattr(python_stdlib, "stdlib_root", lambda: root)
  tfds.disable_progress_bar()
  return root


def read_back(folder):
  builder = PythonStdlib(data_dir=folder)
  builder.download_and_prepare()
  return {
    split: {r["path"].decode(): r["text"].decode() for r in builder.as_data_source(split)}
    for split in ("train", "validation")
  }


def config(folder, tokenizer="bytes", name="python_stdlib"):
  return {"name": name, "tokenizer": tokenizer, "dir": str(folder)}


def texts_of(documents, tokenizer):
  parts = np.split(documents.tokens, documents.ends[:-1])
  return [tokenizer.decode(part) for part in parts]


def test_stdlib_holds_every_source_file_once(stdlib, tmp_path):
  splits = read_back(tmp_path / "data")
  assert {**splits["train"], **splits["validation"]} == SOURCES
  assert not splits["train"].keys() & splits["validation"].keys()


def test_stdlib_split_depends_on_the_path_alone(stdlib, tmp_path):
  validation = read_back(tmp_path / "data")["validation"].keys()
  assert validation == {
    path for path in SOURCES if hashlib.sha256(path.encode()).hexdigest()[1] == "0"
  }
  assert 0 < len(validation) < len(SOURCES) / 4
  for path, text in SOURCES.items():
    write(stdlib, path, text.encode("utf-8") + b"# changed\n")
  assert read_back(tmp_path / "data")["validation"].keys() == validation


def test_stdlib_config_names_the_content(stdlib, tmp_path):
  def name():
    return PythonStdlib(data_dir=tmp_path).builder_config.name

  first = name()
  assert first.startswith(f"py3.{sys.version_info.minor}-")
  write(stdlib, "test/test_a.py", b"changed, but left out")
  assert name() == first
  write(stdlib, "module1.py", b"changed")
  changed = name()
  (stdlib / "module1.py").rename(stdlib / "module1-.py")  # at the same place in the order
  assert len({first, changed, name()}) == 3


def test_stdlib_without_sources_is_refused(stdlib, tmp_path, monkeypatch):
  monkeypatch.setattr(python_stdlib, "stdlib_root", lambda: tmp_path / "nowhere")
  with pytest.raises(ValueError, match="nowhere"):
    PythonStdlib(data_dir=tmp_path)


def test_the_running_python_has_a_standard_library():
  assert (python_stdlib.stdlib_root() / "hashlib.py").is_file()


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("bytes", 257), ("sentencepiece", 300)])
def test_load_text(stdlib, tmp_path, tokenizer, vocab_size):
  data = load_text(config(tmp_path / "data", tokenizer), vocab_size)
  assert data.tokenizer.vocab_size == vocab_size
  splits = read_back(tmp_path / "data")
  for split in ("train", "validation"):
    documents = data.validation if split == "validation" else data.train[0]
    assert sorted(texts_of(documents, data.tokenizer)) == sorted(splits[split].values())
  assert data.weights == (1.0,)
  assert "tensorflow" not in sys.modules


def test_tokenizers_share_a_folder(stdlib, tmp_path):
  in_bytes, in_pieces = (
    load_text(config(tmp_path, tokenizer), 300) for tokenizer in ("bytes", "sentencepiece")
  )
  assert texts_of(in_bytes.train[0], in_bytes.tokenizer) == texts_of(
    in_pieces.train[0], in_pieces.tokenizer
  )


def test_sentencepiece_is_trained_on_the_train_split_only(stdlib, tmp_path):
  first = load_text(config(tmp_path / "a", "sentencepiece"), 300).tokenizer
  validation = next(iter(read_back(tmp_path / "a")["validation"]))
  write(stdlib, validation, b"zqzqzqzq" * 1000)
  second = load_text(config(tmp_path / "b", "sentencepiece"), 300).tokenizer
  assert first.fingerprint == second.fingerprint


def test_load_text_reads_back_what_it_prepared(stdlib, tmp_path, monkeypatch):
  folder = tmp_path / "data"
  first = load_text(config(folder), 257)
  stored = {file: file.read_bytes() for file in folder.rglob("*.npy")}
  assert len(stored) == 4

  def fail(*_):
    raise AssertionError("tokenised again")

  with monkeypatch.context() as patched:
    patched.setattr(ByteTokenizer, "encode", fail)
    second = load_text(config(folder), 257)
  for a, b in ((first.train[0], second.train[0]), (first.validation, second.validation)):
    for name in ("tokens", "ends"):
      assert isinstance(getattr(b, name).base, np.memmap)
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  assert {file: file.read_bytes() for file in folder.rglob("*.npy")} == stored

  write(stdlib, "module1.py", b"changed")
  changed = load_text(config(folder), 257)
  assert "changed" in texts_of(changed.train[0], changed.tokenizer)


def test_folder_comes_from_the_environment(stdlib, tmp_path, monkeypatch):
  monkeypatch.setenv("TRIFORM_DATA", str(tmp_path / "environment"))
  load_text({**config(""), "dir": None}, 257)
  assert (tmp_path / "environment" / "tfds" / "python_stdlib").is_dir()


def test_losing_a_race_to_build_is_no_error(stdlib, tmp_path, monkeypatch):
  build = PythonStdlib.download_and_prepare

  def build_and_lose(self, **options):
    build(self, **options)
    raise OSError("Directory not empty")

  monkeypatch.setattr(PythonStdlib, "download_and_prepare", build_and_lose)
  assert len(load_text(config(tmp_path / "a"), 257).train[0]) > 0

  def fail(self):
    raise OSError("disk full")

  monkeypatch.setattr(PythonStdlib, "download_and_prepare", fail)
  with pytest.raises(OSError, match="disk full"):
    load_text(config(tmp_path / "b"), 257)


@pytest.mark.parametrize(
  ("changes", "vocab_size", "message"),
  [
    ({"name": "wikipedia"}, 300, "python_stdlib, got 'wikipedia'"),
    ({"tokenizer": "words"}, 300, "bytes, sentencepiece, got 'words'"),
    ({"tokenizer": "bytes"}, 256, "257, got 256"),
    ({"tokenizer": "sentencepiece"}, 100_000, "vocab_size=100000"),
  ],
)
def test_load_text_refuses(stdlib, tmp_path, changes, vocab_size, message):
  with pytest.raises(ValueError, match=message):
    load_text({**config(tmp_path), **changes}, vocab_size)


def test_documents_from_a_file(tmp_path):
  write(tmp_path, "a.txt", b"one\r\ntwo")
  documents = documents_from_path(tmp_path / "a.txt", ByteTokenizer())
  assert texts_of(documents, ByteTokenizer()) == ["one\r\ntwo"]


def test_documents_from_a_folder(tmp_path):
  root = tmp_path / ".hidden above the folder does not count"
  for path in ("b.txt", "a/z.txt", "a/empty", ".hidden", ".git/config", "a/.cache/x"):
    write(root, path, b"" if path == "a/empty" else path.encode())
  documents = documents_from_path(str(root), ByteTokenizer())
  assert texts_of(documents, ByteTokenizer()) == ["a/z.txt", "b.txt"]


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("missing", "missing does not exist"),
    ("empty.txt", "empty.txt, but it is empty"),
    ("hidden", "hidden, but it is empty"),
    ("latin.txt", "UTF-8 text in .*latin.txt"),
  ],
)
def test_documents_from_path_refuses(tmp_path, path, message):
  write(tmp_path, "empty.txt", b"")
  write(tmp_path, "hidden/.a", b"a")
  write(tmp_path, "latin.txt", b"\xe9")
  with pytest.raises(ValueError, match=message):
    documents_from_path(tmp_path / path, ByteTokenizer())
