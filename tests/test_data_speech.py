"""Spoken words: what is in which split, classes and noise."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from spoken_words import (
  RATE,
  SPEAKER,
  assert_same,
  contents,
  opener,
  rows,
  write_clip,
  write_noise,
  write_twelve,
  write_words,
)

from triform.arch.data.batches import ShuffledBatches
from triform.arch.data.speech import WORDS
from triform.arch.data.speech_lists import Clip, hash_split, split_clips

# Of the official lists of v0.01, and clips that are in none of the two; four are those closest to
# where a split ends.
PUBLISHED = {
  "eight/a7dd45cf_nohash_0.wav": "validation",
  "sheila/d9ae8983_nohash_0.wav": "validation",
  "zero/264f471d_nohash_0.wav": "validation",
  "wow/db43cd03_nohash_0.wav": "validation",
  "cat/eee9b9e2_nohash_0.wav": "validation",
  "happy/9d32f10a_nohash_4.wav": "validation",
  "bird/3bdf05d3_nohash_0.wav": "validation",
  "bed/ffb86d3c_nohash_0.wav": "test",
  "wow/6e916de8_nohash_3.wav": "test",
  "on/b97c9f77_nohash_4.wav": "test",
  "one/863880b7_nohash_1.wav": "test",
  "three/ad6a46f1_nohash_0.wav": "test",
  "no/5f449e17_nohash_0.wav": "test",
  "yes/94de6a6a_nohash_0.wav": "test",
  "go/0c40e715_nohash_0.wav": "test",
  "down/62ff07ef_nohash_0.wav": "test",
  "one/b87bdb22_nohash_1.wav": "train",
  "bed/dabf67d9_nohash_0.wav": "train",
  "happy/fac74f6a_nohash_1.wav": "train",
  "off/5fe4a278_nohash_0.wav": "train",
}


@pytest.fixture
def opened(tmp_path):
  return opener(tmp_path)


def test_the_hash_rule_is_the_published_one():
  assert len(PUBLISHED) == 20
  assert {path: hash_split(path) for path in PUBLISHED} == PUBLISHED
  assert hash_split("anything/a7dd45cf_nohash_12.flac") == "validation"  # the speaker alone


def test_without_lists_the_hash_decides(tmp_path, opened):
  data = tmp_path / "data"
  for i, path in enumerate(PUBLISHED):
    write_clip(data / path, [i])
  (data / "README.md").write_text("not a clip")
  (data / "bed" / "LICENSE").write_text("not a clip")
  write_clip(data / "bed" / "._b87bdb22_nohash_0.wav", [1])
  data = opened()
  assert data.labels == tuple(sorted({path.split("/")[0] for path in PUBLISHED}))
  for split in ("train", "validation", "test"):
    expected = sorted(
      (path.split("/")[0], i) for i, (path, its) in enumerate(PUBLISHED.items()) if its == split
    )
    assert contents(data, split) == expected


def test_official_lists_decide_whatever_the_endings(tmp_path, opened):
  data = tmp_path / "data"
  for i, name in enumerate(["no/a_nohash_0.wav", "no/b_nohash_0.wav", "yes/c_nohash_0.WAV"]):
    write_clip(data / name, [i])
  (data / "official_v0.01_testing_list.txt").write_text("no/b_nohash_0.flac\nno/gone.wav\n")
  (data / "validation_list.txt").write_bytes(b"\r\n./yes/c_nohash_0.wav\r\n")
  data = opened()
  assert contents(data, "train") == [("no", 0)]
  assert contents(data, "test") == [("no", 1)]
  assert contents(data, "validation") == [("yes", 2)]


def test_tables_decide_the_class_too():
  paths = ["cat/a.flac", "yes/b.flac", "yes/unlisted.flac"]
  tables = {
    "train_list.tsv": "cat/a.wav\t_unknown_\n\n",
    "test_list.tsv": "yes/b.flac\tyes",
    "testing_list.txt": "tables come first",
  }
  assert split_clips(paths, tables, "here") == {
    "train": [Clip("cat/a.flac", "_unknown_")],
    "validation": [],
    "test": [Clip("yes/b.flac", "yes")],
  }


@pytest.mark.parametrize(
  ("lists", "message"),
  [
    (
      {"train_list.tsv": "a/1.wav\ta\na/2.wav\ta", "val_list.tsv": "a/3.wav\ta"},
      "here has no a/2.wav of train_list.tsv: 2 listed clips are missing",
    ),
    ({"train_list.tsv": "\na/1.wav a"}, "here/train_list.tsv, line 2, is 'a/1.wav a', expected a"),
    ({"train_list.tsv": "a/1.wav\t"}, "train_list.tsv, line 1, is 'a/1.wav', expected a path, a"),
    (
      {"train_list.tsv": "a/1.wav\ta", "test_list.tsv": "a/1.flac\ta"},
      "test_list.tsv, line 1: a/1.flac is in train_list.tsv already",
    ),
    ({"testing_list.txt": ""}, "here has none, but the other one, expected one validation_list.tx"),
    (
      {"testing_list.txt": "", "v1_testing_list.txt": "", "validation_list.txt": ""},
      "here has testing_list.txt, v1_testing_list.txt, expected one testing_list.txt",
    ),
    (
      {"testing_list.txt": "a/1.wav", "validation_list.txt": "a/1.wav"},
      "testing_list.txt, line 1: a/1.wav is in the other list too",
    ),
  ],
)
def test_wrong_lists_are_refused(lists, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    split_clips(["a/1.wav"], lists, "here")


def test_two_endings_of_one_name_are_refused():
  with pytest.raises(ValueError, match=r"has a/1.flac and a/1.wav, expected one file of that name"):
    split_clips(["a/1.wav", "a/1.flac"], {}, "here")


def test_rows_are_cut_padded_and_typed(tmp_path, opened):
  random = np.random.RandomState(0)
  clips = {}
  for name, length in (("a", RATE), ("b", RATE - 300), ("c", RATE + 60)):
    path = tmp_path / "data" / name / f"{SPEAKER['train']}_nohash_0.wav"
    clips[name] = write_clip(path, random.randint(-32768, 32768, length))
  data = opened()
  assert data.length == RATE and data.labels == ("a", "b", "c")
  for row in rows(data, "train"):
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
      "inputs": ((RATE,), np.int16),
      "mask": ((RATE,), np.bool_),
      "targets": ((), np.int32),
      "loss_mask": ((), np.bool_),
    }
    label = data.labels[row["targets"]]
    clip = clips[label][30:-30] if label == "c" else clips[label]
    np.testing.assert_array_equal(row["inputs"][: len(clip)], clip)
    assert not row["inputs"][len(clip) :].any()
    np.testing.assert_array_equal(row["mask"], np.arange(RATE) < len(clip))
    assert row["loss_mask"]
  assert opened(seconds=0.25).examples("train")[0]["inputs"].shape == (250,)
  with pytest.raises(IndexError, match="row 3 of 3"):
    data.examples("train")[3]


def test_twelve_classes_are_made_as_in_the_paper(tmp_path, opened):
  folder = write_twelve(tmp_path / "data")
  data = opened(classes="12")
  assert data.labels == ("_silence_", "_unknown_", *WORDS)
  for split, count in (("train", 30), ("validation", 20), ("test", 10)):
    counts = np.bincount([row["targets"] for row in rows(data, split)], minlength=12)
    assert counts.tolist() == [count // 10] * 2 + [count // 10] * 10

  def numbers(data, *labels):
    return {number for label, number in contents(data, "train") if label in labels}

  others = numbers(opened(), "bed", "cat", "dog")
  chosen = [numbers(opened(classes="12", seed=s), "_unknown_") for s in (0, 0, 1, 2, 3)]
  assert all(len(some) == 3 and some <= others for some in chosen)
  assert chosen[0] == chosen[1] and any(chosen[0] != some for some in chosen[2:])
  # One clip more than ten makes one silence more.
  write_clip(folder / "yes" / f"{SPEAKER['test']}_nohash_9.wav", [9])
  targets = [row["targets"] for row in rows(opened(classes="12"), "test")]
  assert len(targets) == 11 + 2 + 2 and targets.count(0) == targets.count(1) == 2


def places(cuts):
  """Where in which recording the cuts of `write_noise` begin."""
  return [divmod(int(cut[0]) - 1000, 10000) for cut in cuts]


def test_noise_is_of_parts_that_no_two_splits_share(tmp_path, opened):
  write_twelve(tmp_path / "data")
  data = opened(classes="12", seed=5)
  train = data.examples("train")
  cuts = [train._noise.cut("noise", i) for i in range(300)]
  np.testing.assert_array_equal(train[7]["noise"], cuts[7])
  assert cuts[0].shape == (RATE,) and cuts[0].dtype == np.int16
  assert {recording for recording, _ in places(cuts)} == {0, 1}
  begins = np.array([place for _, place in places(cuts)])
  assert begins.min() < 500 and 7000 < begins.max() <= 7500  # halves: up to 16 s of 20, less a row
  for split, first in (("validation", 8000), ("test", 9000)):
    examples = data.examples(split)
    assert "noise" not in examples[0]
    held_out = places([examples._noise.cut("silence", i) for i in range(100)])
    assert all(first <= place <= first + 500 for _, place in held_out)
    assert len(set(held_out)) > 50
    parts = data.noise(split)
    assert places(parts) == [(0, first), (1, first)]
    assert [len(part) for part in parts] == [2 * RATE, 2 * RATE]


def test_silence_is_a_cut_at_some_volume(tmp_path, opened):
  write_twelve(tmp_path / "data")
  examples = opened(classes="12").examples("train")
  volumes = []
  for i in range(100):
    cut, silence = examples._noise.cut("silence", i), examples._noise.silence(i)
    volumes.append(silence[-1] / cut[-1])
    np.testing.assert_allclose(silence, cut * volumes[-1], atol=1.5)
  assert min(volumes) < 0.1 and max(volumes) > 0.9 and abs(np.mean(volumes) - 0.5) < 0.1
  row = examples[len(examples) - 1]
  assert row["targets"] == 0 and row["mask"].all() and row["inputs"].any()


def test_every_word_is_a_class_with_noise_beside_it(tmp_path, opened):
  write_twelve(tmp_path / "data")
  data = opened()
  assert data.labels == tuple(sorted((*WORDS, "bed", "cat", "dog")))
  assert len(data.examples("train")) == 39
  assert (data.examples("train")[0]["noise"] != opened(seed=1).examples("train")[0]["noise"]).any()
  assert "noise" not in data.examples("test")[0]


def test_silence_and_unknown_that_are_there_are_kept(tmp_path, opened):
  folder = tmp_path / "data"
  clips = write_words(folder, (*WORDS, "_silence_", "cat"), {"train": 2})
  lines = [f"{path}\t{path.split('/')[0].replace('cat', '_unknown_')}" for path in clips]
  (folder / "train_list.tsv").write_text("\n".join(lines))
  for classes, labels in (
    ("12", ("_silence_", "_unknown_", *WORDS)),
    ("all", tuple(sorted((*WORDS, "_silence_", "_unknown_")))),
  ):
    data = opened(classes=classes)
    assert data.labels == labels
    targets = [row["targets"] for row in rows(data, "train")]
    assert np.bincount(targets, minlength=12).tolist() == [2] * 12
    assert "noise" not in data.examples("train")[0]


def test_no_silence_is_made_up(tmp_path, opened):
  write_twelve(tmp_path / "data", noise=False)
  with pytest.raises(ValueError, match=r"classes is 12, expected recordings in _background_noise_"):
    opened(classes="12")


def test_twelve_classes_need_their_words_and_others(tmp_path, opened):
  write_words(tmp_path / "data", [w for w in WORDS if w not in ("go", "up")], {"train": 1})
  write_noise(tmp_path / "data")
  with pytest.raises(ValueError, match=r"its ten words, but .*data has none of up, go"):
    opened(classes="12")
  write_words(tmp_path / "data", ("go", "up"), {"train": 1})
  with pytest.raises(ValueError, match=r"other words for _unknown_, but .*data has none"):
    opened(classes="12")


def test_rows_may_go_to_other_threads_and_processes(tmp_path, opened):
  write_twelve(tmp_path / "data")
  examples = opened(classes="12").examples("train")
  expected = [examples[i] for i in range(len(examples))]
  pickled = pickle.dumps(examples)
  assert len(pickled) < 5000  # what was read stays behind
  copy = pickle.loads(pickled)
  with ThreadPoolExecutor(8) as pool:
    assert_same(list(pool.map(copy.__getitem__, range(len(copy)))), expected)
  batch = ShuffledBatches([copy], batch_size=len(copy), seed=0)[0]
  assert batch["inputs"].shape == batch["noise"].shape == (len(copy), RATE)
  assert sorted(batch["targets"]) == sorted(row["targets"] for row in expected)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"path": None}, "data.path is None and data.tfds is None, expected exactly one of them"),
    ({"tfds": "speech_commands"}, "data.tfds is speech_commands, expected exactly one of them"),
    ({"path": "/no/where"}, "data.path is /no/where, expected a folder with a folder of clips"),
    ({"classes": "35"}, "data.classes is '35', expected 'all' or '12'"),
    ({"on_bad": "ignore"}, "data.on_bad is 'ignore', expected 'error' or 'skip'"),
    ({"seconds": 0}, "data.seconds is 0, expected at least one sample"),
    ({"seconds": float("nan")}, "data.seconds is nan, expected at least one sample"),
    ({"sample_rate": 10}, "data.sample_rate is 10, expected 1000 to 399999 Hz"),
  ],
)
def test_bad_options_are_refused(tmp_path, opened, options, message):
  write_words(tmp_path / "data", ("no",), {"train": 1})
  with pytest.raises(ValueError, match=message):
    opened(**options)


def test_a_split_without_clips_is_refused_when_asked_for(tmp_path, opened):
  write_words(tmp_path / "data", ("no", "yes"), {"train": 1})
  data = opened()
  with pytest.raises(ValueError, match=r"data has no clips for the split 'test'"):
    data.examples("test")
  with pytest.raises(ValueError, match="the split is 'dev', expected one of train, validation, te"):
    data.examples("dev")


class Published(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Like TFDS's own data set, which needs TensorFlow."""

  VERSION = tfds.core.Version("0.0.3")
  name = "speech_commands"
  code_path = Path(__file__)
  pkg_dir_path = Path(__file__).parent

  def _info(self):
    audio = tfds.features.Tensor(shape=(None,), dtype=np.int64)
    label = tfds.features.ClassLabel(names=["up", "down", "_silence_"])
    features = tfds.features.FeaturesDict({"audio": audio, "label": label})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(4), "test": self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"audio": np.full(RATE if i else 10, -i - 1, np.int64), "label": i % 3}


def test_a_tfds_set_keeps_its_classes(tmp_path, opened):
  tfds.disable_progress_bar()
  Published(data_dir=tmp_path / "cache/tfds", file_format="array_record").download_and_prepare()
  data = opened(None, tfds="speech_commands", classes="12")
  assert data.labels == ("up", "down", "_silence_") and data.length == RATE
  assert contents(data, "train") == [("_silence_", -3), ("down", -2), ("up", -4), ("up", -1)]
  masks = sorted(int(row["mask"].sum()) for row in rows(data, "test"))
  assert masks == [10, RATE, RATE]
  assert {name: array.dtype.name for name, array in rows(data, "test")[0].items()} == {
    "inputs": "int16",
    "mask": "bool",
    "targets": "int32",
    "loss_mask": "bool",
  }
  with pytest.raises(
    ValueError, match="TFDS set speech_commands has no clips for the split 'valid"
  ):
    data.examples("validation")
