"""MNIST's files: as they were published, compressed, called otherwise, or spoilt."""

import gzip

import numpy as np
import pytest
from toy_classifier import write_idx, write_mnist

from triform.arch.data.mnist import Mnist, read_idx


@pytest.fixture
def folder(tmp_path):
  return write_mnist(tmp_path / "mnist", train=20, test=7)


def stacked(examples):
  rows = [examples[i] for i in range(len(examples))]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_splits_are_the_files_in_their_order(folder):
  images = read_idx(folder / "train-images-idx3-ubyte", 3)
  classes = read_idx(folder / "train-labels-idx1-ubyte", 1)
  data = Mnist(str(folder), held_out=6)
  train, validation, test = (
    stacked(data.examples(split)) for split in ("train", "validation", "test")
  )
  assert (len(train["targets"]), len(validation["targets"]), len(test["targets"])) == (14, 6, 7)
  assert train["inputs"].shape == (14, data.length, 1)
  assert train["inputs"].dtype == np.float32 and train["targets"].dtype == np.int32
  inputs = np.concatenate([train["inputs"], validation["inputs"]])[..., 0]
  np.testing.assert_allclose(inputs, images.reshape(20, -1) / 255, rtol=1e-6)
  assert inputs.min() >= 0 and inputs.max() == 1
  targets = np.concatenate([train["targets"], validation["targets"]])
  np.testing.assert_array_equal(targets, classes)
  assert train["loss_mask"].all() and data.labels[targets[0]] == str(classes[0])


def test_one_order_for_all_that_the_seed_tells(folder):
  plain, zero, again, one = (
    stacked(Mnist(folder, held_out=6, permutation_seed=seed).examples("test"))["inputs"][..., 0]
    for seed in (None, 0, 0, 1)
  )
  order = np.random.RandomState(0).permutation(784)
  np.testing.assert_array_equal(zero, plain[:, order])
  np.testing.assert_array_equal(zero, again)
  assert order[:8].tolist() == [693, 85, 647, 392, 765, 14, 299, 711]  # for all time
  assert (zero != one).any()


def test_files_may_be_compressed_or_have_a_dot(folder, tmp_path):
  expected = stacked(Mnist(folder, held_out=6).examples("train"))
  dotted = write_mnist(tmp_path / "dotted", train=20, test=7, name="{}.{}")
  packed = tmp_path / "packed"
  packed.mkdir()
  for path in folder.iterdir():
    (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
  for other in (dotted, packed):
    found = stacked(Mnist(other, held_out=6).examples("train"))
    for name, array in expected.items():
      np.testing.assert_array_equal(found[name], array)


def test_the_test_files_are_read_only_when_asked_for(folder):
  (folder / "t10k-images-idx3-ubyte").unlink()
  data = Mnist(folder, held_out=6)
  assert len(data.examples("train")) == 14
  with pytest.raises(ValueError, match=r"no file of MNIST's t10k-images: expected one of t10k-im"):
    data.examples("test")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"path": None}, "data.path is None, expected the folder with the four files of MNIST"),
    ({"path": "nowhere"}, "data.path is nowhere, expected the folder"),
    ({"held_out": 0}, "data.held_out is 0, expected at least 1"),
    ({"held_out": 20}, "data.held_out is 20, expected less than the 20 digits of .*train-images"),
    ({"permutation_seed": -1}, r"data.permutation_seed is -1, expected 0 to 2\*\*32 - 1"),
  ],
)
def test_bad_options_are_refused(folder, options, message):
  with pytest.raises(ValueError, match=message):
    Mnist(**{"path": str(folder), "held_out": 6, **options}).examples("train")


def spoil(folder, name, change):
  path = folder / name
  path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("images-idx3-ubyte", lambda b: b[:-1], r"15679 bytes of numbers, expected 15680 for 20 x 28"),
    ("images-idx3-ubyte", lambda b: b + b"x", r"15681 bytes of numbers, expected 15680"),
    ("images-idx3-ubyte", lambda b: b[:10], "has 10 bytes, expected 16 before its numbers"),
    ("images-idx3-ubyte", lambda b: b"", "begins with the bytes , expected 00000803"),
    (
      "labels-idx1-ubyte",
      lambda b: b"\x1f" + b[1:],
      "begins with the bytes 1f000801, expected 0000",
    ),
    ("labels-idx1-ubyte", lambda b: b[:8] + b"\x0a" + b[9:], "has the label 10, expected 0 to 9"),
  ],
)
def test_a_spoilt_file_is_named(folder, name, change, message):
  spoil(folder, f"train-{name}", change)
  with pytest.raises(ValueError, match=rf"train-{name} .*{message}"):
    Mnist(folder, held_out=6).examples("train")


def test_files_that_do_not_belong_together_are_refused(folder):
  write_idx(folder / "train-labels-idx1-ubyte", np.zeros(19, np.uint8))
  with pytest.raises(ValueError, match=r"has 19 labels, expected the 20 of .*train-images"):
    Mnist(folder, held_out=6).examples("train")
  write_idx(folder / "train-images-idx3-ubyte", np.zeros((19, 20, 28), np.uint8))
  with pytest.raises(ValueError, match="has 20 x 28 pixels, expected 28 x 28"):
    Mnist(folder, held_out=6).examples("train")


def test_a_damaged_archive_is_named(folder):
  path = folder / "train-images-idx3-ubyte"
  damaged = gzip.compress(path.read_bytes())[:-20]
  path.unlink()
  (folder / "train-images-idx3-ubyte.gz").write_bytes(damaged)
  with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz cannot be read: "):
    Mnist(folder, held_out=6).examples("train")
