"""Text corpora as tokenised documents."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..caches import cache_folder
from .batches import TrainBatches
from .documents import Source
from .files import content_hash
from .packing import Documents
from .sources import Part, configured_parts
from .text_files import PathSource
from .tokenising import interleaved, sampled_texts, tokenised
from .tokenizers import ByteTokenizer, Tokenizer, train_sentencepiece

_TOKENIZERS = ("bytes", "sentencepiece")
_SAMPLE = 32 * 2**20  # characters of a corpus that a tokenizer is trained on at most
_OPTIONAL = ("path", "tfds", "mixture", "split", "validation", "text_field", "prompt_field")


@dataclass(frozen=True)
class TextData:
  """A tokenised corpus and the tokenizer that made it."""

  tokenizer: Tokenizer
  train: tuple[Documents, ...]  # one for each source
  weights: tuple[float, ...]  # of the sources, as shares of the tokens
  validation: Documents

  def batches(self, **options: Any) -> TrainBatches:
    """The training batches; `options` are those of `TrainBatches` that are not the corpus's."""
    return TrainBatches(
      self.train,
      weights=self.weights,
      bos_id=self.tokenizer.bos_id,
      eos_id=self.tokenizer.eos_id,
      **options,
    )


def load_text(
  config: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer | None = None
) -> TextData:
  """Prepares a corpus, or reads it back if that was done before.

  The text to evaluate on is `validation` if that is given; else the `validation` split of a TFDS
  set that has one; else one document in 16, by a hash of its path (a file of text) or of what it
  says (a record), or of a path with fewer than 32 files the last sixteenth of each file.

  Args:
    config: the `data` section of a configuration:
      `name`, the corpus where no other is named ("python_stdlib");
      `path`, a file or folder of text, see `text_files`;
      `tfds`, a TFDS data set, such as "lm1b", "c4/en" or "wiki40b/en:1.3.0";
      `mixture`, several sources with weights, see `sources`;
      `split` of TFDS sets, such as "train[:1%]", by default "train";
      `validation`, a path or a split, or a source as in a mixture;
      `text_field` and `prompt_field` of records, by default found by rule, see
      `documents.choose_fields`; prompts are read and not trained on;
      `tokenizer`, "sentencepiece" or "bytes";
      `dir`, the folder for everything that is prepared, or None for `caches.cache_folder()`.
    vocab_size: that of the model. A sentencepiece tokenizer is trained on (a sample of) the train
      split to have exactly this size; the byte tokenizer needs 257.
    tokenizer: that of an earlier run, which then is used as it is.

  Raises:
    ValueError: whatever is wrong with the configuration, the text, a data set or the network.
  """
  config = {**dict.fromkeys(_OPTIONAL), **config}
  _check_choice("corpus", config["name"], ("python_stdlib",))
  _check_choice("tokenizer", config["tokenizer"], _TOKENIZERS)
  if config["tokenizer"] == "bytes" and vocab_size < ByteTokenizer().vocab_size:
    raise ValueError(f"the byte tokenizer needs vocab_size >= 257, got {vocab_size}")
  if tokenizer is not None and tokenizer.vocab_size > vocab_size:
    raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, vocab_size is {vocab_size}")

  folder = Path(config["dir"] or cache_folder()).expanduser()
  parts = configured_parts(config, folder)
  if tokenizer is None and config["tokenizer"] == "bytes":
    tokenizer = ByteTokenizer()
  elif tokenizer is None:
    tokenizer = _trained_tokenizer(parts, vocab_size, folder / "tokenizers")

  train, validation = [], {}
  for part in parts:
    documents = _documents(part.source, tokenizer, folder, hold_out=part.validation is None)
    if part.validation is None:
      train.append(documents["train"])
      validation[part.source.key] = documents["validation"]
    else:
      train.append(documents["all"])
      own = part.validation
      validation[own.key] = _documents(own, tokenizer, folder, hold_out=False)["all"]
  weights = tuple(part.weight for part in parts)
  return TextData(tokenizer, tuple(train), weights, _joined(validation, tokenizer, folder))


def documents_from_path(path: str | Path, tokenizer: Tokenizer) -> Documents:
  """Tokenises the text of a file or a folder, see `text_files`, in memory."""
  source = PathSource(path)
  documents, prompts, unfinished = [], [], []
  for piece in source.pieces():
    unfinished += [tokenizer.encode(piece.prompt), tokenizer.encode(piece.text)]
    if piece.last:
      prompts.append(len(unfinished[0]))
      documents.append(np.concatenate(unfinished))
      unfinished = []
  if not documents:
    raise ValueError(f"expected text in {path}, but it is empty")
  joined = Documents.from_arrays(documents)
  if not source.has_prompts:
    return joined
  trained = [np.arange(len(d)) >= n for d, n in zip(documents, prompts, strict=True)]
  return Documents(joined.tokens, joined.ends, np.concatenate(trained))


def _check_choice(kind: str, choice: str, known: Collection[str]) -> None:
  if choice not in known:
    raise ValueError(f"expected a {kind} among {', '.join(known)}, got {choice!r}")


def _documents(
  source: Source, tokenizer: Tokenizer, folder: Path, *, hold_out: bool
) -> dict[str, Documents]:
  by_split = tokenised(source, tokenizer, folder / "tokens", hold_out=hold_out)
  for split, documents in by_split.items():
    if not len(documents):
      purpose = {"train": " to train on", "validation": " to evaluate on"}.get(split, "")
      raise ValueError(f"there is no text{purpose} in {source.name}")
  return by_split


def _trained_tokenizer(parts: list[Part], vocab_size: int, folder: Path) -> Tokenizer:
  total = sum(part.weight for part in parts)

  def texts():
    for part in parts:
      budget = max(1, round(_SAMPLE * part.weight / total))
      yield from sampled_texts(part.source, budget, hold_out=part.validation is None)

  keys = [(part.source.key, part.weight / total, part.validation is None) for part in parts]
  return train_sentencepiece(texts(), vocab_size, folder, key=repr((_SAMPLE, keys)))


def _joined(validation: dict[str, Documents], tokenizer: Tokenizer, folder: Path) -> Documents:
  if len(validation) == 1:
    return next(iter(validation.values()))
  name = content_hash([tokenizer.fingerprint, *(str(d.folder) for d in validation.values())])
  parts = list(validation.values())
  return interleaved(parts, tokenizer, folder / "tokens" / f"validation-{name}")
