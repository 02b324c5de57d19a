"""How good a model is: a language model on documents, with its state carried from piece to piece,
and a classifier on examples.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from .data.batches import Rows
from .data.packing import Batch, Documents, carried_batches, check_positive
from .data.tokenizers import Tokenizer
from .interface import Form, SequenceModule
from .layout import split_model
from .training.losses import class_scores
from .training.step import token_losses

_NORMAL_95 = 1.959964  # standard deviations within which 95 % of a normal distribution lie


def evaluate(
  model: SequenceModule,
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  form: Form = "chunkwise",
  seq_len: int = 512,
  batch_size: int = 16,
  max_tokens: int | None = None,
) -> dict[str, Any]:
  """Cross entropy over `documents` (their first `max_tokens` tokens), every token counted once.

  The text is cut into `batch_size` rows, each read in pieces of `seq_len` tokens from the state
  the piece before left, so a document is seen from its beginning however long it is, but for the
  one that each row after the first may begin in. Tokens that are only to be read
  (`Documents.trained`) do not count.

  Returns:
    `loss` in nats per token, `perplexity = exp(loss)`, `bits_per_byte`, which compares models
    of different tokenizers, and the number of `tokens` and `bytes`.

  Raises:
    ValueError: if there is no token that counts.
  """
  total, tokens, text_bytes = 0.0, 0, 0
  batches = carried_batches(
    documents,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
    seq_len=seq_len,
    batch_size=batch_size,
    max_tokens=max_tokens,
  )
  for batch, losses in carried_losses(model, batches, form=form):
    total += float(np.sum(losses, dtype=np.float64))
    tokens += int(batch["loss_mask"].sum())
    text_bytes += int(tokenizer.token_bytes[batch["targets"]][batch["loss_mask"]].sum())
  if not tokens:
    raise ValueError("there is no token to evaluate on: no documents, or all are only to be read")
  loss = total / tokens
  return {
    "loss": loss,
    "perplexity": math.exp(loss) if loss < 700 else math.inf,  # where a float ends
    "bits_per_byte": bits_per_byte(total, text_bytes),
    "tokens": tokens,
    "bytes": text_bytes,
  }


def bits_per_byte(total_nats: float, text_bytes: int) -> float:
  return total_nats / math.log(2) / max(text_bytes, 1)


def carried_losses(
  model: SequenceModule, batches: Iterable[Batch], *, form: Form
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Yields every batch with its `token_losses`, each row going on where it was the batch before.

  Batches are of one shape, `[b, t]`, and read one at a time: memory does not grow with their
  number. A model whose state has room for so many tokens only (`max_len`) begins afresh, as if a
  document began, where its state is full.
  """
  graphdef, params, variables = split_model(model)
  state = None
  if model.max_len is not None:
    batches = _restarted(batches, model.max_len)
  for batch in batches:
    if state is None:
      state = model.init_state(len(batch["inputs"]))
    losses, state = _piece(graphdef, form, params, variables, state, batch)
    yield batch, multihost_utils.process_allgather(losses, tiled=True)


def _restarted(batches: Iterable[Batch], max_len: int) -> Iterator[Batch]:
  """`batches` with a `reset` wherever a document would go on past `max_len` tokens."""
  position: np.ndarray | int = 0  # tokens of its document that each row has seen
  for batch in batches:
    reset, mask = batch["reset"].copy(), batch["mask"]
    for column in range(reset.shape[1]):
      reset[:, column] |= position == max_len
      position = np.where(reset[:, column] & mask[:, column], 0, position) + mask[:, column]
    yield {**batch, "reset": reset}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _piece(graphdef, form, params, variables, state, batch):
  model = nnx.merge(graphdef, params, variables)
  logits, state = model(batch["inputs"], state, form=form, reset=batch["reset"], mask=batch["mask"])
  return token_losses(logits, batch), state


def evaluate_classifier(
  model: SequenceModule, examples: Rows, *, form: Form = "chunkwise", batch_size: int = 100
) -> dict[str, Any]:
  """Cross entropy and accuracy over `examples`, every one counted once.

  Args:
    model: maps `[b, t, channels]` to logits `[b, classes]`.
    examples: rows of `inputs`, `targets`, `loss_mask` and perhaps `mask`, see
      `training.tasks.classification.LabelledData`.
    form: the algorithm.
    batch_size: examples in a call.

  Returns:
    `loss` in nats per example, `accuracy`, the bounds of its 95 % confidence `interval` (see
    `wilson_interval`), and the number of `examples`.

  Raises:
    ValueError: if there is no example, or `batch_size` is none.
  """
  check_positive(batch_size=batch_size)
  if not len(examples):
    raise ValueError("there is no example to evaluate on")
  graphdef, params, variables = split_model(model)
  total, right = 0.0, 0
  for start in range(0, len(examples), batch_size):
    batch = padded_batch(examples, range(start, min(start + batch_size, len(examples))), batch_size)
    scores = _scores(graphdef, form, params, variables, batch)
    nats, correct = multihost_utils.process_allgather(scores, tiled=True)
    total += float(np.sum(nats, dtype=np.float64))
    right += int(correct.sum())
  return {
    "loss": total / len(examples),
    "accuracy": right / len(examples),
    "interval": wilson_interval(right, len(examples)),
    "examples": len(examples),
  }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
  """The 95 % confidence interval of a probability, of which `right` of `total` trials were seen.

  Wilson's score interval, which stays within 0 and 1 and is of use at either end, too.
  """
  share, z = right / total, _NORMAL_95
  scale = 1 + z**2 / total
  middle = (share + z**2 / (2 * total)) / scale
  half = z / scale * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
  return max(middle - half, 0.0), min(middle + half, 1.0)


def padded_batch(examples: Rows, indices: range, batch_size: int) -> Batch:
  """A batch of examples; rows that are missing at its end do not count, being all zeros."""
  rows = [examples[i] for i in indices]
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  missing = batch_size - len(rows)
  return {n: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for n, a in batch.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(graphdef, form, params, variables, batch):
  model = nnx.merge(graphdef, params, variables)
  logits, _ = model(batch["inputs"], form=form, mask=batch.get("mask"))
  return class_scores(logits, batch)
