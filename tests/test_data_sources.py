"""Text files, records and TFDS sets, alone and mixed."""

import gzip
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from tfds_builders import prepare

from triform.arch.data import documents as documents_module
from triform.arch.data import text_files
from triform.arch.data.documents import choose_fields, is_held_out
from triform.arch.data.packing import PackedWindows
from triform.arch.data.sources import parse_mixture
from triform.arch.data.text import documents_from_path, load_text
from triform.arch.data.text_files import PathSource
from triform.arch.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def load(folder, vocab_size=257, **config):
  defaults = {"name": "python_stdlib", "tokenizer": "bytes", "dir": str(folder / "data")}
  return load_text({**defaults, **config}, vocab_size)


def texts_of(documents):
  return [BYTES.decode(part) for part in np.split(documents.tokens, documents.ends[:-1])]


def splits_of(data):
  return [texts_of(documents) for documents in (*data.train, data.validation)]


def write(file, data):
  file.parent.mkdir(parents=True, exist_ok=True)
  data = data.encode() if isinstance(data, str) else data
  file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
  return file


def write_records(file, records):
  return write(file, "".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_is_cut_near_its_end(tmp_path, name):
  lines = [f"line {i} \u00e9\r\n" for i in range(200)]
  file = write(tmp_path / name, "".join(lines))
  (train,), (validation,) = splits_of(load(tmp_path, path=str(file)))
  assert train + validation == "".join(lines)
  assert validation.startswith("line ") and train.endswith("\n")
  assert len(validation) == pytest.approx(len(train) / 15, rel=0.1)


@given(text=st.text(min_size=1, max_size=60), piece=st.integers(4, 20))
def test_pieces_and_cuts_lose_nothing(tmp_path_factory, text, piece):
  file = write(tmp_path_factory.mktemp("text") / "a.txt", text)
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(text_files, "PIECE_BYTES", piece)
    patched.setattr(documents_module, "PIECE_BYTES", piece)
    source = PathSource(file)
    whole, cut = list(source.pieces()), list(source.pieces(cut=True))
  assert "".join(p.text for p in whole) == "".join(p.text for p in cut) == text
  assert all(p.text and len(p.text.encode()) <= 2 * piece for p in whole + cut)
  assert [p.last for p in whole] == [False] * (len(whole) - 1) + [True]
  assert [p.tail for p in cut] == sorted(p.tail for p in cut)
  for tail in (False, True):
    part = [p.last for p in cut if p.tail == tail]
    assert part in ([], [False] * (len(part) - 1) + [True])


def test_files_of_a_large_folder_are_held_out_by_name(tmp_path):
  texts = {f"sub{i % 3}/{i}.txt": f"text {i}" for i in range(100)}
  for path, text in texts.items():
    write(tmp_path / "corpus" / path, text)
  train, validation = splits_of(load(tmp_path, path=str(tmp_path / "corpus")))
  assert set(validation) == {text for path, text in texts.items() if is_held_out(path)}
  assert sorted(train + validation) == sorted(texts.values())


def test_a_validation_path(tmp_path):
  train, validation = write(tmp_path / "a.txt", "abc"), write(tmp_path / "b.txt", "de")
  data = load(tmp_path, path=str(train), validation=str(validation))
  assert splits_of(data) == [["abc"], ["de"]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json"])
def test_records_are_documents(tmp_path, name):
  records = [{"id": i, "text": f"text {i}\n"} for i in range(100)]
  data = load(tmp_path, path=str(write_records(tmp_path / name, records)))
  train, validation = splits_of(data)
  assert sorted(train + validation) == sorted(record["text"] for record in records)
  assert 0 < len(validation) < 30 and data.validation.trained is None
  copied = write_records(tmp_path / f"b{name}", records * 2)
  again = splits_of(load(tmp_path, path=str(copied)))
  assert set(again[1]) == set(validation)  # a copy of a held-out record is held out


def test_a_json_file_of_many_lines_is_text(tmp_path):
  text = json.dumps({"text": "a"}, indent=2) + "\n"
  assert texts_of(documents_from_path(write(tmp_path / "a.json", text), BYTES)) == [text]


@pytest.mark.parametrize(
  ("fields", "config"),
  [(("prompt", "completion"), {}), (("q", "a"), {"prompt_field": "q", "text_field": "a"})],
)
def test_prompts_are_read_and_not_trained_on(tmp_path, fields, config):
  records = [dict(zip(fields, (f"ask {i}:", f"say {i}"), strict=True)) for i in range(64)]
  data = load(tmp_path, path=str(write_records(tmp_path / "a.jsonl", records)), **config)
  for documents in (*data.train, data.validation):
    windows = PackedWindows(documents, bos_id=256, eos_id=256, seq_len=len(documents.tokens) + 999)
    window = windows[0]
    read, trained = (
      bytes(window["targets"][window[mask]].clip(max=255).astype(np.uint8)).split(b"\xff")[:-1]
      for mask in ("mask", "loss_mask")
    )
    assert [b":" + t for t in trained] == [r[r.index(b":") :] for r in read]
    assert all(r.startswith(b"ask ") for r in read)
  if not config:
    in_memory = documents_from_path(tmp_path / "a.jsonl", BYTES)
    assert in_memory.trained.sum() == sum(len(r["completion"]) for r in records)


@pytest.mark.parametrize(
  ("names", "expected"),
  [
    (["title", "text"], ("text", None)),
    (["book_text", "title"], ("book_text", None)),
    (["article"], ("article", None)),
    (["prompt", "completion", "source"], ("completion", "prompt")),
    (["prompt", "text"], ("text", None)),
  ],
)
def test_the_field_with_the_text_is_found(names, expected):
  assert choose_fields(names, None, None, "it") == expected


def test_a_tfds_set(tmp_path):
  records = [(f"text {i}",) for i in range(100)]
  prepare(tmp_path / "data/tfds", "with_two", {"train": records, "validation": [("v",)]})
  data = load(tmp_path, tfds="with_two")
  assert sorted(splits_of(data)[0]) == sorted(text for (text,) in records)
  assert splits_of(data)[1] == ["v"]
  part = load(tmp_path, tfds="with_two", split="train[:10%]")
  assert len(part.train[0]) == 10 and splits_of(part)[1] == ["v"]
  assert splits_of(part) == splits_of(load(tmp_path, tfds="with_two@train[:10%]"))
  # What is trained on is not evaluated on.
  own = splits_of(load(tmp_path, tfds="with_two", split="train+validation"))
  assert sorted(own[0] + own[1]) == sorted([*(text for (text,) in records), "v"])


def test_a_tfds_set_without_a_validation_split(tmp_path):
  records = [(f"text {i}", "title") for i in range(100)]
  splits = {"train": records, "test": [("t", "")]}
  prepare(tmp_path / "data/tfds", "with_test", splits, fields=("book_text", "title"))
  train, validation = splits_of(load(tmp_path, tfds="with_test"))
  assert sorted(train + validation) == sorted(text for text, _ in records) and validation
  titles = splits_of(load(tmp_path, tfds="with_test", text_field="title", validation="train"))
  assert titles == [["title"] * 100] * 2
  assert splits_of(load(tmp_path, tfds="with_test", validation="test"))[1] == ["t"]


class PreparedOnDemand(tfds.core.GeneratorBasedBuilder):
  """Registered, as the sets that come with TFDS are."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = Path(__file__)
  pkg_dir_path = Path(__file__).parent

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    return {"train": ((i, {"text": f"text {i}"}) for i in range(40))}

  def _generate_examples(self):
    raise NotImplementedError


def test_a_known_tfds_set_is_prepared(tmp_path, capsys):
  for _ in range(2):
    train, validation = splits_of(load(tmp_path, tfds="prepared_on_demand"))
    assert len(train) + len(validation) == 40
  out, err = capsys.readouterr()
  assert not out and err.count("preparing the TFDS set prepared_on_demand") == 1
  assert list((tmp_path / "data/tfds/prepared_on_demand/1.0.0").glob("*.array_record*"))


def test_tfds_data_dir_is_looked_into(tmp_path):
  prepare(tmp_path / "elsewhere", "prepared_elsewhere", {"train": [("abc",)] * 3})
  program = f"""if True:
    from triform.arch.data.text import load_text
    config = dict(name="python_stdlib", tokenizer="bytes", dir={str(tmp_path / "data")!r})
    config |= dict(tfds="prepared_elsewhere:1.0.0", validation="train")
    print(len(load_text(config, 257).train[0]))
  """
  done = subprocess.run(
    [sys.executable, "-c", program],
    env={"TFDS_DATA_DIR": str(tmp_path / "elsewhere"), "PATH": "", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.stdout == "3\n", done.stderr


def test_a_rebuilt_tfds_set_is_another_corpus(tmp_path):
  for i in range(2):
    prepare(tmp_path / str(i) / "tfds", "rebuilt", {"train": [(f"abc{i}",)] * 3})
  texts = [
    splits_of(load(tmp_path, tfds="rebuilt", validation="train", dir=str(tmp_path / str(i))))
    for i in range(2)
  ]
  assert [text[0][0] for text in texts] == ["abc0", "abc1"]


def test_a_mixture(tmp_path):
  prepare(tmp_path / "data/tfds", "mixed_set", {"train": [(f"set {i}",) for i in range(50)]})
  file = write(tmp_path / "notes.txt", "".join(f"note {i}\n" for i in range(300)))
  data = load(tmp_path, mixture=f"tfds:mixed_set@train[:40]=3,path:{file}=1")
  assert data.weights == (3.0, 1.0)
  assert all(text.startswith("set ") for text in texts_of(data.train[0]))
  assert texts_of(data.train[1])[0].startswith("note 0\n")
  validation = texts_of(data.validation)
  assert {text[:4] for text in validation} == {"set ", "note"}
  batches = data.batches(seq_len=16, batch_size=4, seed=0)
  rows = np.concatenate([batches[step]["targets"] for step in range(20)])
  notes = sum(b"note" in bytes(row.clip(max=255).astype(np.uint8)) for row in rows)
  assert notes == len(rows) / 4
  elsewhere = write(tmp_path / "held.txt", "held out")
  one = load(tmp_path, mixture=f"tfds:mixed_set,path:{file}", validation=f"path:{elsewhere}")
  assert texts_of(one.validation) == ["held out"] and one.weights == (1.0, 1.0)


def test_mixed_validation_begins_with_every_source(tmp_path):
  for name, count in (("a", 1000), ("b", 100)):
    write_records(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
  data = load(tmp_path, mixture=f"path:{tmp_path}/a.jsonl,path:{tmp_path}/b.jsonl")
  separate = [texts_of(load(tmp_path, path=f"{tmp_path}/{name}.jsonl").validation) for name in "ab"]
  mixed = texts_of(data.validation)
  assert [[t for t in mixed if t[0] == name] for name in "ab"] == separate
  half = Counter(text[0] for text in mixed[: len(mixed) // 2])
  assert half["b"] == pytest.approx(len(separate[1]) / 2, abs=1)


def test_mixtures_are_parsed():
  assert parse_mixture("tfds:c4/en@train[:1%]=0.7, path:~/a=b/c=0.3,python_stdlib") == {
    "tfds:c4/en@train[:1%]": 0.7,
    "path:~/a=b/c": 0.3,
    "python_stdlib": 1.0,
  }


def test_content_names_the_cache(tmp_path):
  def folders():
    return {folder.name for folder in (tmp_path / "data/tokens").glob("path-*")}

  file = write(tmp_path / "a.txt", "abc\n" * 100)
  load(tmp_path, path=str(file))
  (first,) = folders()
  file.touch()
  load(tmp_path, path=str(file))
  assert folders() == {first}
  write(file, "abd\n" * 100)
  data = load(tmp_path, path=str(file))
  assert len(folders()) == 2 and "abd" in texts_of(data.train[0])[0]


def test_a_file_that_has_not_changed_is_not_read(tmp_path, monkeypatch):
  file = write(tmp_path / "a.txt", "abc\n" * 100)
  load(tmp_path, path=str(file))
  reads = itertools.count()
  original = text_files.hashlib.file_digest
  monkeypatch.setattr(
    text_files.hashlib, "file_digest", lambda *args: next(reads) or original(*args)
  )
  load(tmp_path, path=str(file))
  assert next(reads) == 0
