"""Loss by position: against a straightforward computation, far beyond a window's length."""

import builtins
import json
import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx

from triform.arch import RetNet
from triform.arch.data.packing import Documents, TokenStream
from triform.arch.data.tokenizers import ByteTokenizer
from triform.arch.evaluation import evaluate
from triform.arch.interface import FORMS
from triform.arch.loss_by_position import (
  carried_spans,
  draw,
  loss_by_position,
  sliding_spans,
  span_batches,
  table,
)

WINDOW = 16
LONG = 100 * WINDOW
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
  """Untrained, with logits of some size."""
  return RetNet(
    vocab_size=257, d_model=16, num_layers=2, num_heads=2, value_dim=16, ffn_dim=16, chunk_size=8,
    scan_layers=False, rngs=nnx.Rngs(0),
  )  # fmt: skip


def documents_of(*lengths):
  rng = np.random.default_rng(0)
  return Documents.from_arrays([rng.integers(0, 256, n) for n in lengths])


def stream_of(documents):
  return TokenStream(documents, TOKENIZER.bos_id, TOKENIZER.eos_id)


def measure(model, documents, **options):
  options = {"window": WINDOW, "seq_len": 20, "batch_size": 4} | options
  return loss_by_position(model, documents, TOKENIZER, **options)


def straightforward(model, documents):
  """Losses of every document, whole and by windows, written down as the definition has them."""

  @jax.jit
  def padded_losses(inputs, targets):
    logits, _ = model(inputs[None], form="parallel")
    return -jax.nn.log_softmax(logits[0])[np.arange(len(targets)), targets]

  def losses(inputs, targets):
    # What follows changes nothing before it; few lengths are few programs.
    padding = -len(inputs) % (WINDOW if len(inputs) <= WINDOW else LONG)
    return np.asarray(padded_losses(*(np.pad(a, (0, padding)) for a in (inputs, targets))))[
      : len(inputs)
    ]

  carried, sliding = [], []
  for tokens in np.split(documents.tokens, documents.ends[:-1]):
    inputs = np.append(TOKENIZER.bos_id, tokens)
    targets = np.append(tokens, TOKENIZER.eos_id)
    carried.append(losses(inputs, targets))
    last = np.zeros(len(inputs))
    # In the order of the windows: the last one that begins early enough has the last word, but
    # not on its first half.
    for start in range(0, len(inputs), WINDOW // 2):
      window = np.s_[start : start + WINDOW]
      skipped = WINDOW // 2 if start else 0
      last[window][skipped:] = losses(inputs[window], targets[window])[skipped:]
    sliding.append(last)
  return carried, sliding


def assert_rows(result, carried, sliding):
  position = np.concatenate([np.arange(len(losses)) for losses in carried])
  carried, sliding = np.concatenate(carried), np.concatenate(sliding)
  assert sum(row["tokens"] for row in result["positions"]) == result["tokens"] == len(carried)
  assert [row["first"] for row in result["positions"]] == [
    0, *(2**i for i in range(position.max().item().bit_length()))
  ]  # fmt: skip
  for row in result["positions"]:
    here = (position >= row["first"]) & (position <= row["last"])
    assert row["tokens"] == here.sum()
    assert row["carried"] == pytest.approx(carried[here].mean(), rel=1e-5)
    assert row["sliding"] == pytest.approx(sliding[here].mean(), rel=1e-5)
  assert result["carried"] == pytest.approx(carried.mean(), rel=1e-5)
  assert result["sliding"] == pytest.approx(sliding.mean(), rel=1e-5)


@pytest.fixture(scope="module")
def long_document(model):
  documents = documents_of(LONG - 1)
  return documents, straightforward(model, documents)


@pytest.mark.parametrize("form", FORMS)
def test_a_document_100_times_the_window_is_as_in_one_parallel_call(model, long_document, form):
  documents, expected = long_document
  result = measure(model, documents, form=form)
  assert_rows(result, *expected)
  assert result["positions"][-1]["last"] == LONG - 1
  beyond = [row for row in result["positions"] if row["first"] >= WINDOW]
  assert all(row["carried"] != row["sliding"] for row in beyond)
  within = [row for row in result["positions"] if row["last"] < WINDOW]
  assert all(row["carried"] == pytest.approx(row["sliding"], rel=1e-5) for row in within)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_documents_of_many_lengths(model, batch_size):
  documents = documents_of(5, 0, WINDOW - 1, WINDOW, 3 * WINDOW + 5, 2, 61)
  result = measure(model, documents, batch_size=batch_size)
  assert_rows(result, *straightforward(model, documents))
  assert result["documents"] == 7
  whole = evaluate(model, documents, TOKENIZER, seq_len=20, batch_size=1)
  assert result["carried"] == pytest.approx(whole["loss"], rel=1e-5)
  assert result["tokens"] == whole["tokens"]


@pytest.mark.parametrize("window", [2, 3, 16, 17, 1000])
def test_every_token_counts_once_with_half_a_window_before_it(window):
  begins, ends = np.array([0, 40, 41, 60]), np.array([40, 41, 60, 300])
  for spans in (carried_spans(begins, ends), sliding_spans(begins, ends, window)):
    times = np.zeros(300, int)
    for span in spans:
      assert span.document <= span.start <= span.counted < span.stop
      assert span.counted - span.start >= min(-(-window // 2), span.counted - span.document)
      times[span.counted : span.stop] += 1
    assert (times == 1).all()
  assert all(span.stop - span.start <= window for span in sliding_spans(begins, ends, window))


def test_rows_read_every_span_in_order():
  documents = documents_of(30, 7, 0, 18)
  stream = stream_of(documents)
  begins, ends = np.array([0, 31, 39, 40]), np.array([31, 39, 40, 59])
  read, counted, rows = [], 0, [[] for _ in range(3)]
  for batch in span_batches(stream, sliding_spans(begins, ends, 8), rows=3, seq_len=5):
    assert {array.shape for array in batch.values()} == {(3, 5)}
    counted += batch["loss_mask"].sum()
    assert not (batch["loss_mask"] & ~batch["mask"]).any()
    for row, *tokens in zip(rows, *batch.values(), strict=True):
      row += zip(*tokens, strict=True)
  names = list(batch)
  for row in rows:
    for token in row:
      token = dict(zip(names, token, strict=True))
      if token["mask"]:
        read += [[]] if token["reset"] else []
        read[-1].append(token["inputs"])
  whole = stream.read(0, 59, 59)["inputs"]
  spans = [whole[s.start : s.stop].tolist() for s in sliding_spans(begins, ends, 8)]
  assert sorted(map(tuple, read)) == sorted(map(tuple, spans))
  assert counted == 59


def test_tokens_that_are_only_read_do_not_count(model):
  documents = documents_of(3 * WINDOW)
  trained = np.arange(3 * WINDOW) % 3 > 0
  some = Documents(documents.tokens, documents.ends, trained)
  result = measure(model, some)
  assert result["tokens"] == trained.sum() + 1
  (carried,), (sliding,) = straightforward(model, documents)
  counted = np.append(trained, True)
  assert result["carried"] == pytest.approx(carried[counted].mean(), rel=1e-5)
  assert result["sliding"] == pytest.approx(sliding[counted].mean(), rel=1e-5)
  nothing = Documents(documents.tokens, documents.ends, np.zeros(3 * WINDOW, bool))
  with pytest.raises(ValueError, match="no token counts"):
    measure(model, nothing, max_tokens=3 * WINDOW)


def test_max_tokens_cuts_the_last_document(model):
  documents = documents_of(20, 50, 30)
  result = measure(model, documents, max_tokens=21 + 33)
  (first, second, _), (first_sliding, second_sliding, _) = straightforward(model, documents)
  assert result["documents"] == 2
  assert_rows(result, [first, second[:33]], [first_sliding, second_sliding[:33]])


def test_memory_does_not_grow_with_the_document():
  def peak(length):
    documents = documents_of(length)
    begins, ends = np.array([0]), np.array([length + 1])
    tracemalloc.start()
    for spans in (carried_spans(begins, ends), sliding_spans(begins, ends, 512)):
      for _ in span_batches(stream_of(documents), spans, rows=2, seq_len=512):
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most

  peak(1000)  # what is imported or cached on first use
  assert peak(40_000) < 1.5 * peak(4000) < 1e6


def test_no_documents_are_refused():
  with pytest.raises(ValueError, match="at least one document"):
    measure(None, documents_of())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"window": 1}, "window is 1, expected at least 2"),
    ({"seq_len": 0}, "seq_len >= 1, got 0"),
    ({"batch_size": 0}, "batch_size >= 1, got 0"),
    ({"max_tokens": 0}, "max_tokens >= 1, got 0"),
  ],
)
def test_sizes_out_of_range_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    measure(None, documents_of(5), **options)


RESULT = {
  "window": 4, "documents": 1, "tokens": 6, "carried": 2.5, "sliding": 2.75,
  "positions": [
    {"first": 0, "last": 0, "tokens": 1, "carried": 3.0, "sliding": 3.0},
    {"first": 4, "last": 8, "tokens": 5, "carried": 2.4, "sliding": 2.7},
  ],
}  # fmt: skip


def test_table():
  assert [line.split() for line in table(json.loads(json.dumps(RESULT))).splitlines()] == [
    ["positions", "tokens", "carried", "sliding", "difference"],
    ["0", "to", "0", "1", "3.0000", "3.0000", "+0.0000"],
    ["4", "to", "8", "5", "2.4000", "2.7000", "-0.3000"],
    ["all", "6", "2.5000", "2.7500", "-0.2500"],
  ]


def test_picture(tmp_path):
  draw(RESULT, tmp_path / "picture.png")
  assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_a_clear_error(tmp_path, monkeypatch):
  original = builtins.__import__

  def without(name, *arguments, **options):
    if name.startswith("matplotlib"):
      raise ImportError(name)
    return original(name, *arguments, **options)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ValueError, match=r"needs matplotlib: pip install \"triform\[plot\]\""):
    draw(RESULT, tmp_path / "picture.png")
