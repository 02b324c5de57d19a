"""Loss by the position in a document: the state carried, against a sliding window.

Carried, a token is predicted from its whole document so far, in memory that does not grow with it.
With a sliding window of w tokens a model sees what it saw in training and no more: windows begin
every floor(w / 2) tokens, each from an empty state, and of each but a document's first only the
tokens count that the window before did not reach. So every token counts once, and is predicted
from at least ceil(w / 2) tokens before it (or from all there are), at the price of reading each
twice.

Both are runs of the token stream that start from an empty state (`Span`), and are read alike: rows
of a batch take one span after another, and a span goes on from batch to batch.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .data.packing import Batch, Documents, TokenStream, check_positive
from .data.tokenizers import Tokenizer
from .evaluation import carried_losses
from .interface import Form, SequenceModule

MAX_BUCKETS = 64


class Span(NamedTuple):
  """A run of the token stream, read from an empty state."""

  start: int  # the first token read; like the others, a position in the stream
  stop: int  # after the last one
  counted: int  # the first token that counts
  document: int  # where the document begins


def loss_by_position(
  model: SequenceModule,
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  window: int,
  form: Form = "chunkwise",
  seq_len: int = 512,
  batch_size: int = 16,
  max_tokens: int | None = None,
) -> dict[str, Any]:
  """Cross entropy over `documents` (their first `max_tokens` tokens) by position.

  Position n is that of a token with n before it in its document, `bos` included. Positions are
  grouped in powers of two: 0, 1, 2 to 3, 4 to 7, and so on.

  `window` is the number of tokens in a sliding window, as a rule that of training windows. The rest
  says how it is computed, at most `batch_size` rows in pieces of `seq_len` tokens, and does not
  change the result.

  Returns:
    `window`; the number of `documents` and `tokens`; the mean losses in nats `carried` and
    `sliding`; and `positions`, a list of the same by group, with its `first` and `last` position.

  Raises:
    ValueError: for sizes below 1 or a window below 2, or if there is no token that counts.
  """
  check_positive(seq_len=seq_len, batch_size=batch_size)
  if window < 2:
    raise ValueError(f"window is {window}, expected at least 2 tokens")
  stream = TokenStream(documents, tokenizer.bos_id, tokenizer.eos_id)
  begins, ends = _bounds(documents, max_tokens)

  def measure(spans: Iterable[Span], longest: int, total: int):
    # As many rows as the longest span lets finish together: more would idle while it is read.
    rows = min(batch_size, -(-total // longest))
    batches = span_batches(stream, spans, rows=rows, seq_len=seq_len)
    return _by_bucket(carried_losses(model, batches, form=form))

  if not len(begins):
    raise ValueError("expected at least one document, got none")
  longest, total = int((ends - begins).max()), int((ends - begins).sum())
  carried, counts = measure(carried_spans(begins, ends), longest, total)
  sliding, _ = measure(sliding_spans(begins, ends, window), min(window, longest), total)
  tokens = int(counts.sum())
  if not tokens:
    raise ValueError("no token counts: all are only to be read")
  return {
    "window": window,
    "documents": len(begins),
    "tokens": tokens,
    "carried": carried.sum() / tokens,
    "sliding": sliding.sum() / tokens,
    "positions": [
      {
        "first": 2 ** (i - 1) if i else 0,
        "last": min(2**i, longest) - 1,
        "tokens": int(counts[i]),
        "carried": carried[i] / counts[i],
        "sliding": sliding[i] / counts[i],
      }
      for i in np.flatnonzero(counts).tolist()
    ],
  }


def _bounds(documents: Documents, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
  """Where documents begin and end in the token stream; the last is cut at `max_tokens`."""
  index = np.arange(len(documents))
  ends = np.asarray(documents.ends) + index + 1
  begins = np.concatenate([[0], ends])[:-1]
  if max_tokens is not None:
    check_positive(max_tokens=max_tokens)
    ends = np.minimum(ends, max_tokens)
  return begins[begins < ends], ends[begins < ends]


def carried_spans(begins: np.ndarray, ends: np.ndarray) -> Iterator[Span]:
  """Whole documents, the longest first, so that rows are busy to the end."""
  for i in np.argsort(begins - ends, kind="stable"):
    yield Span(int(begins[i]), int(ends[i]), int(begins[i]), int(begins[i]))


def sliding_spans(begins: np.ndarray, ends: np.ndarray, window: int) -> Iterator[Span]:
  """Overlapping windows, the tokens of each counted that no earlier one counts."""
  for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
    start = counted = begin
    while counted < end:
      stop = min(start + window, end)
      yield Span(start, stop, counted, begin)
      start, counted = start + window // 2, stop


def span_batches(
  stream: TokenStream, spans: Iterable[Span], *, rows: int, seq_len: int
) -> Iterator[Batch]:
  """Batches `[rows, seq_len]` that continue each other; a row takes the next span when it is free.

  Beside what `TokenStream.read` gives there is `bucket`: 0 for position 0, and i for positions
  from 2^(i-1) to 2^i - 1.
  """
  shared = iter(spans)
  pieces = itertools.zip_longest(*(_row(stream, shared, seq_len) for _ in range(rows)))
  for batch in pieces:
    real = next(piece for piece in batch if piece is not None)
    idle = {name: np.zeros_like(array) for name, array in real.items()}
    yield {name: np.stack([(piece or idle)[name] for piece in batch]) for name in real}


def _row(stream: TokenStream, spans: Iterator[Span], seq_len: int) -> Iterator[Batch]:
  parts, room = [], seq_len
  for span in spans:
    at = span.start
    while at < span.stop:
      count = min(room, span.stop - at)
      parts.append(_read(stream, span, at, count))
      at, room = at + count, room - count
      if not room:
        yield _joined(parts, 0)
        parts, room = [], seq_len
  if parts:
    yield _joined(parts, room)


def _read(stream: TokenStream, span: Span, at: int, count: int) -> Batch:
  positions = np.arange(at, at + count)
  piece = stream.read(at, count, count)
  piece["reset"] = positions == span.start
  piece["loss_mask"] &= positions >= span.counted
  piece["bucket"] = np.frexp(positions - span.document)[1].astype(np.int32)
  return piece


def _joined(parts: list[Batch], padding: int) -> Batch:
  return {
    name: np.pad(np.concatenate([part[name] for part in parts]), (0, padding)) for name in parts[0]
  }


def _by_bucket(measured: Iterable[tuple[Batch, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Sums of losses in nats, and numbers of tokens, by bucket."""
  sums, counts = np.zeros(MAX_BUCKETS), np.zeros(MAX_BUCKETS, np.int64)
  for batch, losses in measured:
    counted = batch["loss_mask"]
    bucket = batch["bucket"][counted]
    sums += np.bincount(bucket, losses[counted].astype(np.float64), MAX_BUCKETS)
    counts += np.bincount(bucket, minlength=MAX_BUCKETS)
  return sums, counts


def table(result: dict[str, Any]) -> str:
  """The result of `loss_by_position` for people to read."""
  columns = ("tokens", "carried", "sliding")
  lines = [f"{'positions':>17} {'tokens':>10} {'carried':>9} {'sliding':>9} {'difference':>11}"]
  named = [(f"{row['first']:,} to {row['last']:,}", row) for row in result["positions"]]
  for name, row in [*named, ("all", result)]:
    tokens, carried, sliding = (row[column] for column in columns)
    lines.append(
      f"{name:>17} {tokens:>10,} {carried:>9.4f} {sliding:>9.4f} {carried - sliding:>+11.4f}"
    )
  return "\n".join(lines)


def import_pyplot():
  """matplotlib's, without a screen. Raises `ValueError` where it is not installed."""
  try:
    import matplotlib
  except ImportError as error:
    raise ValueError('a picture needs matplotlib: pip install "triform[plot]"') from error
  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot


def draw(result: dict[str, Any], path: str | Path) -> None:
  """Draws the result of `loss_by_position`; the ending of `path` is the format."""
  pyplot = import_pyplot()
  rows = result["positions"]
  # A logarithm has no place for position 0: the axis counts the token itself.
  middles = [((row["first"] + 1) * (row["last"] + 1)) ** 0.5 for row in rows]
  figure, (losses, difference) = pyplot.subplots(
    2, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1)
  )
  window = f"sliding window of {result['window']:,} tokens, {result['sliding']:.3f}"
  for name, label in (("sliding", window), ("carried", f"state carried, {result['carried']:.3f}")):
    losses.plot(middles, [row[name] for row in rows], "o-", label=label)
  difference.plot(middles, [row["carried"] - row["sliding"] for row in rows], "o-", color="C1")
  difference.axhline(0, color="0.6", linewidth=1)
  for axes in (losses, difference):
    axes.axvline(result["window"], color="0.6", linestyle="--", linewidth=1)
  losses.set(xscale="log", ylabel="loss, nats per token")
  losses.legend()
  difference.set(xlabel="tokens seen of the document", ylabel="carried - sliding")
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
