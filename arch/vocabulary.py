"""What a model's numbers stand for, kept beside it in work directories and exported folders.

    FOLDER/tokenizer/    of a language model: what `load_tokenizer` reads
    FOLDER/labels.json   of a classifier: the names of its classes, in the order of its logits

Nothing else knows where they lie.
"""

import json
from pathlib import Path

from .data.files import atomic_write
from .data.tokenizers import Tokenizer, load_tokenizer

_TOKENIZER, _LABELS = "tokenizer", "labels.json"

Vocabulary = Tokenizer | tuple[str, ...]


def save_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
  """Writes a tokenizer or labels into `folder`."""
  if isinstance(vocabulary, tuple):
    with atomic_write(folder / _LABELS) as file:
      file.write(json.dumps(vocabulary).encode() + b"\n")
  else:
    vocabulary.save(folder / _TOKENIZER)


def load_vocabulary(folder: Path) -> Vocabulary:
  """Reads what `save_vocabulary` wrote.

  Raises:
    ValueError: if there is neither, or it cannot be read.
  """
  path = folder / _LABELS
  if not path.exists():
    return load_tokenizer(folder / _TOKENIZER)
  try:
    labels = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
    raise ValueError(f"{path} holds {labels!r}, expected a list of texts")
  return tuple(labels)
