import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triform.arch.data.packing import Documents, PackedWindows, carried_batches

BOS, EOS = 1, 2
KEYS = ("inputs", "targets", "reset", "mask", "loss_mask")

lengths_of_documents = st.lists(st.integers(0, 12), max_size=8)
seq_lens = st.integers(1, 9)


def make_documents(lengths):
  """Documents in which every token is different."""
  ends = np.cumsum([10, *lengths])
  return Documents.from_arrays([np.arange(a, b) for a, b in itertools.pairwise(ends)])


def make_stream(documents):
  """(input, target, reset) of every position, by the definition."""
  stream, start = [], 0
  for end in documents.ends:
    tokens = documents.tokens[start:end].tolist()
    resets = [True] + [False] * len(tokens)
    stream += zip([BOS, *tokens], [*tokens, EOS], resets, strict=True)
    start = end
  return stream


def real_positions(batch):
  """(input, target, reset) of the positions that are not padding, which must be blank."""
  padding = ~batch["mask"]
  assert not any(batch[key][padding].any() for key in KEYS)
  columns = (batch[key][batch["mask"]].tolist() for key in KEYS[:3])
  return list(zip(*columns, strict=True))


def check_types(batch, shape):
  assert set(batch) == set(KEYS)
  assert all(batch[key].shape == shape for key in KEYS)
  assert [batch[key].dtype for key in KEYS] == [np.int32, np.int32, bool, bool, bool]


def test_documents():
  documents = Documents.from_arrays([np.array([5, 6]), np.array([], np.int64), np.array([7])])
  assert documents.tokens.tolist() == [5, 6, 7]
  assert documents.ends.tolist() == [2, 2, 3]
  assert (documents.tokens.dtype, documents.ends.dtype) == (np.int32, np.int64)
  assert len(documents) == 3
  assert len(Documents.from_arrays([])) == 0


@pytest.mark.parametrize("ends", [[], [2], [4], [2, 1, 3], [-1, 3]])
def test_documents_refuse_wrong_ends(ends):
  with pytest.raises(ValueError, match="3 tokens"):
    Documents(np.arange(3, dtype=np.int32), np.array(ends, np.int64))


def test_a_small_example():
  documents = Documents.from_arrays([np.array([5, 6]), np.array([7])])
  windows = PackedWindows(documents, bos_id=BOS, eos_id=EOS, seq_len=4)
  assert len(windows) == 2
  assert {key: windows[0][key].tolist() for key in KEYS} == {
    "inputs": [1, 5, 6, 1],
    "targets": [5, 6, 2, 7],
    "reset": [True, False, False, True],
    "mask": [True, True, True, True],
    "loss_mask": [True, True, True, True],
  }
  assert {key: windows[1][key].tolist() for key in KEYS} == {
    "inputs": [7, 0, 0, 0],
    "targets": [2, 0, 0, 0],
    "reset": [False, False, False, False],
    "mask": [True, False, False, False],
    "loss_mask": [True, False, False, False],
  }


def test_prompts_are_read_but_not_trained_on():
  trained = np.array([False, True, True, False])
  documents = Documents(np.array([5, 6, 7, 8], np.int32), np.array([3, 4]), trained)
  window = PackedWindows(documents, bos_id=BOS, eos_id=EOS, seq_len=7)[0]
  assert window["targets"].tolist() == [5, 6, 7, EOS, 8, EOS, 0]
  assert window["loss_mask"].tolist() == [False, True, True, True, False, True, False]
  assert window["mask"].tolist() == [True] * 6 + [False]
  with pytest.raises(ValueError, match="4 flags in trained, got 3"):
    Documents(documents.tokens, documents.ends, trained[1:])


@settings(deadline=None, max_examples=100)  # NumPy alone, so quick
@given(lengths=lengths_of_documents, seq_len=seq_lens)
def test_windows_hold_the_stream(lengths, seq_len):
  documents = make_documents(lengths)
  windows = PackedWindows(documents, bos_id=BOS, eos_id=EOS, seq_len=seq_len)
  stream = make_stream(documents)
  assert len(windows) == -(-len(stream) // seq_len)
  read = []
  for i, window in enumerate(windows):
    check_types(window, (seq_len,))
    assert i == len(windows) - 1 or window["mask"].all()
    assert (np.diff(window["mask"].astype(int)) <= 0).all()  # padding is on the right
    read += real_positions(window)
  assert read == stream
  targets = Counter(target for _, target, _ in read)
  assert targets == Counter(documents.tokens.tolist() + [EOS] * len(documents))


def test_windows_refuse_what_is_not_there():
  windows = PackedWindows(make_documents([3]), bos_id=BOS, eos_id=EOS, seq_len=4)
  for index in (-1, 1):
    with pytest.raises(IndexError, match=r"\[0, 1\)"):
      windows[index]


def test_windows_go_to_other_processes():
  windows = PackedWindows(make_documents([3]), bos_id=BOS, eos_id=EOS, seq_len=4)
  copy = pickle.loads(pickle.dumps(windows))
  assert real_positions(copy[0]) == real_positions(windows[0])


@settings(deadline=None, max_examples=100)  # NumPy alone, so quick
@given(
  lengths=lengths_of_documents,
  seq_len=seq_lens,
  batch_size=st.integers(1, 5),
  max_tokens=st.none() | st.integers(1, 100),
)
def test_carried_batches_continue_each_row(lengths, seq_len, batch_size, max_tokens):
  documents = make_documents(lengths)
  stream = make_stream(documents)[:max_tokens]
  sizes = dict(bos_id=BOS, eos_id=EOS, seq_len=seq_len, batch_size=batch_size)
  batches = list(carried_batches(documents, max_tokens=max_tokens, **sizes))
  row_len = -(-len(stream) // batch_size)
  assert len(batches) == -(-row_len // seq_len)
  for batch in batches:
    check_types(batch, (batch_size, seq_len))
  for r in range(batch_size if batches else 0):
    row = {key: np.concatenate([batch[key][r] for batch in batches]) for key in KEYS}
    assert (np.diff(row["mask"].astype(int)) <= 0).all()
    assert real_positions(row) == stream[r * row_len : (r + 1) * row_len]


@pytest.mark.parametrize("name", ["seq_len", "batch_size", "max_tokens"])
def test_sizes_below_one_are_refused(name):
  documents = make_documents([3])
  sizes = dict(bos_id=BOS, eos_id=EOS, seq_len=4, batch_size=2)
  with pytest.raises(ValueError, match=f"{name} >= 1, got 0"):
    carried_batches(documents, **{**sizes, name: 0})


def test_stored_documents_are_sent_by_name(tmp_path):
  documents = make_documents([700, 300])
  np.save(tmp_path / "tokens.npy", documents.tokens.astype(np.uint16))
  np.save(tmp_path / "ends.npy", documents.ends)
  stored = Documents.load(tmp_path)
  sent = pickle.dumps(stored)
  assert len(sent) < 500 and pickle.loads(sent).tokens.tolist() == documents.tokens.tolist()
  sizes = dict(bos_id=BOS, eos_id=EOS, seq_len=9)
  for a, b in zip(PackedWindows(stored, **sizes), PackedWindows(documents, **sizes), strict=True):
    check_types(a, (9,))
    assert {k: v.tolist() for k, v in a.items()} == {k: v.tolist() for k, v in b.items()}
