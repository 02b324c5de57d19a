"""MNIST as sequences of pixels, from the four files that it was published as.

    train-images-idx3-ubyte, train-labels-idx1-ubyte   60,000 digits of 28 x 28 pixels
    t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte     10,000 others

They lie in one folder, compressed (`.gz`) or not; some copies are called `train-images.idx3-ubyte`.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

_SIDE = 28
_UNSIGNED_BYTES = 8  # what an IDX file says of its numbers


class Mnist:
  """The data set in a folder.

  A sequence has one pixel a step, from 0 to 1, row by row from the top, or in one random order that
  is the same for all ("permuted sequential MNIST").

  Args:
    path: the folder.
    held_out: the last so many digits of the training files are "validation", not "train".
    permutation_seed: of the order, `numpy.random.RandomState(permutation_seed).permutation(784)`,
      which no version of NumPy changes; None: row by row.

  Raises:
    ValueError: for a folder or a number that cannot be; of the files, when they are read.
  """

  labels = tuple("0123456789")
  length = _SIDE**2

  def __init__(
    self, path: str | None, *, held_out: int = 5000, permutation_seed: int | None = None
  ):
    if path is None:
      raise ValueError("data.path is None, expected the folder with the four files of MNIST")
    self._folder = Path(path).expanduser()
    if not self._folder.is_dir():
      raise ValueError(f"data.path is {path}, expected the folder with the four files of MNIST")
    if held_out < 1:
      raise ValueError(f"data.held_out is {held_out}, expected at least 1")
    if permutation_seed is not None and not 0 <= permutation_seed < 2**32:
      raise ValueError(f"data.permutation_seed is {permutation_seed}, expected 0 to 2**32 - 1")
    self._held_out = held_out
    self._order = np.arange(self.length)
    if permutation_seed is not None:
      self._order = np.random.RandomState(permutation_seed).permutation(self.length)

  def examples(self, split: str) -> "Digits":
    """The digits of "train", "validation" or "test", read into memory."""
    name = "t10k" if split == "test" else "train"
    images_path = self._find(f"{name}-images", "idx3-ubyte")
    classes_path = self._find(f"{name}-labels", "idx1-ubyte")
    images, classes = read_idx(images_path, 3), read_idx(classes_path, 1)
    if images.shape[1:] != (_SIDE, _SIDE):
      height, width = images.shape[1:]
      raise ValueError(f"{images_path} has {height} x {width} pixels, expected {_SIDE} x {_SIDE}")
    if len(images) != len(classes):
      raise ValueError(
        f"{classes_path} has {len(classes)} labels, expected the {len(images)} of {images_path}"
      )
    if len(classes) and classes.max() >= len(self.labels):
      raise ValueError(f"{classes_path} has the label {classes.max()}, expected 0 to 9")
    images = images.reshape(-1, self.length)
    if split != "test":
      if len(images) <= self._held_out:
        raise ValueError(
          f"data.held_out is {self._held_out}, expected less than the {len(images)} digits of "
          f"{images_path}"
        )
      part = slice(-self._held_out) if split == "train" else slice(-self._held_out, None)
      images, classes = images[part], classes[part]
    return Digits(images, classes, self._order)

  def _find(self, name: str, kind: str) -> Path:
    paths = [self._folder / f"{name}{mark}{kind}{end}" for mark in "-." for end in ("", ".gz")]
    for path in paths:
      if path.is_file():
        return path
    names = ", ".join(path.name for path in paths)
    raise ValueError(f"{self._folder} has no file of MNIST's {name}: expected one of {names}")


class Digits:
  """Digits by number, each a row of a batch: see `training.tasks.classification.LabelledData`."""

  def __init__(self, images: np.ndarray, classes: np.ndarray, order: np.ndarray):
    self.images = images  # uint8[n, pixels]
    self.classes = classes  # uint8[n]
    self._order = order  # int[pixels]

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    pixels = self.images[index][self._order].astype(np.float32) / 255
    return {
      "inputs": pixels[:, None],
      "targets": self.classes[index].astype(np.int32),
      "loss_mask": np.bool_(True),
    }


def read_idx(path: Path, dimensions: int) -> np.ndarray:
  """The array `uint8[...]` in an IDX file, compressed if its name ends in `.gz`.

  Raises:
    ValueError: if the file cannot be read, is no IDX file of unsigned bytes in so many dimensions,
      or has another size than it says.
  """
  try:
    data = path.read_bytes()
    if path.suffix == ".gz":
      data = gzip.decompress(data)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  magic = bytes([0, 0, _UNSIGNED_BYTES, dimensions])
  if data[:4] != magic:
    raise ValueError(
      f"{path} begins with the bytes {data[:4].hex()}, expected {magic.hex()}: an IDX file of "
      f"unsigned bytes in {dimensions} dimensions"
    )
  start = 4 + 4 * dimensions
  if len(data) < start:
    raise ValueError(f"{path} has {len(data)} bytes, expected {start} before its numbers")
  shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
  expected = int(np.prod(shape, dtype=object))
  if len(data) - start != expected:
    sizes = " x ".join(map(str, shape))
    raise ValueError(
      f"{path} has {len(data) - start} bytes of numbers, expected {expected} for {sizes}"
    )
  return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
