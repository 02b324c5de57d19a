"""Text corpora as tokenised documents."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from .files import atomic_write
from .packing import Documents
from .python_stdlib import PythonStdlib
from .tokenizers import ByteTokenizer, Tokenizer, train_sentencepiece

_CORPORA = {"python_stdlib": PythonStdlib}
_TOKENIZERS = ("bytes", "sentencepiece")


@dataclass(frozen=True)
class TextData:
  """A tokenised corpus and the tokenizer that made it."""

  tokenizer: Tokenizer
  train: Documents
  validation: Documents


def load_text(
  config: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer | None = None
) -> TextData:
  """Prepares a corpus, or reads it back if that was done before.

  Args:
    config: `name`, the corpus ("python_stdlib"); `tokenizer`, "sentencepiece" or "bytes"; `dir`,
      the folder for everything that is prepared, or None for the environment's `TRIFORM_DATA`, or
      else `~/.cache/triform`.
    vocab_size: that of the model. A sentencepiece tokenizer is trained on the train split to have
      exactly this size; the byte tokenizer needs 257.
    tokenizer: that of an earlier run, which then is used as it is.
  """
  _check_choice("corpus", config["name"], _CORPORA)
  _check_choice("tokenizer", config["tokenizer"], _TOKENIZERS)
  if config["tokenizer"] == "bytes" and vocab_size < ByteTokenizer().vocab_size:
    raise ValueError(f"the byte tokenizer needs vocab_size >= 257, got {vocab_size}")

  folder = config["dir"] or os.environ.get("TRIFORM_DATA") or "~/.cache/triform"
  folder = Path(folder).expanduser()
  builder = _prepared(_CORPORA[config["name"]], folder / "tfds")
  texts = {split: _texts(builder, split) for split in ("train", "validation")}
  if tokenizer is None and config["tokenizer"] == "bytes":
    tokenizer = ByteTokenizer()
  elif tokenizer is None:
    tokenizer = train_sentencepiece(texts["train"], vocab_size, folder / "tokenizers")
  tokens = folder / "tokens" / builder.info.full_name / tokenizer.fingerprint
  documents = {split: _tokenised(tokens / split, texts[split], tokenizer) for split in texts}
  return TextData(tokenizer, documents["train"], documents["validation"])


def documents_from_path(path: str | Path, tokenizer: Tokenizer) -> Documents:
  """Tokenises a UTF-8 text file, or every file of a folder, as one document each.

  A folder is read recursively and in the order of the paths; hidden files and folders are skipped.
  """
  path = Path(path)
  if path.is_dir():
    files = [
      file
      for file in sorted(path.rglob("*"))
      if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
  elif path.exists():
    files = [path]
  else:
    raise ValueError(f"expected a text file or a folder, but {path} does not exist")
  texts = [_read_utf8(file) for file in files]
  if not any(texts):
    raise ValueError(f"expected text in {path}, but it is empty")
  return Documents.from_arrays([tokenizer.encode(text) for text in texts])


def _read_utf8(file: Path) -> str:
  try:
    # `read_text` would turn CR LF into LF.
    return file.read_bytes().decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"expected UTF-8 text in {file}: {error}") from error


def _check_choice(kind: str, choice: str, known: Collection[str]) -> None:
  if choice not in known:
    raise ValueError(f"expected a {kind} among {', '.join(known)}, got {choice!r}")


def _prepared(builder_class: Callable, folder: Path):
  tfds.disable_progress_bar()
  builder = builder_class(data_dir=folder)
  try:
    builder.download_and_prepare()
  except OSError:
    # Of two processes that build at once, the second cannot rename its result into place.
    builder = builder_class(data_dir=folder)
    if not builder.is_prepared():
      raise
  return builder


def _texts(builder, split: str) -> list[str]:
  return [record["text"].decode("utf-8") for record in builder.as_data_source(split)]


def _tokenised(folder: Path, texts: Sequence[str], tokenizer: Tokenizer) -> Documents:
  """Tokenises `texts`, or maps the arrays of an earlier run into memory."""
  files = folder / "tokens.npy", folder / "ends.npy"
  if not all(file.exists() for file in files):
    documents = Documents.from_arrays([tokenizer.encode(text) for text in texts])
    for file, array in zip(files, (documents.tokens, documents.ends), strict=True):
      with atomic_write(file) as opened:
        np.save(opened, array)
  return Documents(*(np.load(file, mmap_mode="r") for file in files))
