import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.arch.data.batches import TrainBatches
from triform.arch.data.packing import Documents, PackedWindows

BOS, EOS, HOSTS, EPOCHS = 1, 2, 3, 2
SPECIAL = {"bos_id": BOS, "eos_id": EOS}

seeds = st.integers(0, 2**32 - 1)
lengths_of_documents = st.lists(st.integers(0, 12), min_size=2, max_size=6)


def make_documents(lengths, first=10):
  """Documents in which every token is different."""
  ends = np.cumsum([first, *lengths])
  return Documents.from_arrays([np.arange(a, b) for a, b in itertools.pairwise(ends)])


def make_batches(documents, **changes):
  return TrainBatches(documents, **SPECIAL, **{"seq_len": 4, "batch_size": 3, "seed": 0, **changes})


def rows_of(batch):
  """One hashable value per window of a batch."""
  rows = zip(*(batch[key].tolist() for key in sorted(batch)), strict=True)
  return [tuple(map(tuple, row)) for row in rows]


def windows_of(documents, seq_len=4):
  windows = PackedWindows(documents, **SPECIAL, seq_len=seq_len)
  return [row for window in windows for row in rows_of({k: v[None] for k, v in window.items()})]


def rows_until(hosts, count):
  """The first `count` rows of all hosts together."""
  steps = (rows_of(host[step]) for step in itertools.count() for host in hosts)
  return list(itertools.islice(itertools.chain.from_iterable(steps), count))


def targets_of(rows):
  keys = ["inputs", "loss_mask", "mask", "reset", "targets"]
  mask, targets = keys.index("mask"), keys.index("targets")
  return Counter(
    t for row in rows for t, m in zip(row[targets], row[mask], strict=True) if m
  )  # fmt: skip


@given(lengths=lengths_of_documents, seq_len=st.integers(1, 9), rows=st.integers(1, 3), seed=seeds)
def test_three_hosts_see_every_token_once_an_epoch(lengths, seq_len, rows, seed):
  documents = make_documents(lengths)
  seq_len = min(seq_len, len(documents.tokens) + len(documents))
  sizes = dict(seq_len=seq_len, batch_size=HOSTS * rows, seed=seed)
  hosts = [make_batches(documents, **sizes, host=h, num_hosts=HOSTS) for h in range(HOSTS)]
  windows = windows_of(documents, seq_len)
  seen = rows_until(hosts, EPOCHS * len(windows))
  for epoch in range(EPOCHS):
    of_epoch = seen[epoch * len(windows) : (epoch + 1) * len(windows)]
    assert Counter(of_epoch) == Counter(windows)
    once = Counter(documents.tokens.tolist()) + Counter({EOS: len(documents)})
    assert targets_of(of_epoch) == once
  assert seen == rows_until([make_batches(documents, **sizes)], len(seen))


@given(
  lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=2, max_size=3),
  weights=st.lists(st.floats(0.4, 2), min_size=3, max_size=3),
  seed=seeds,
)
def test_three_hosts_see_every_token_of_a_mixture(lengths, weights, seed):
  sources = [make_documents(one, first=1000 * (i + 1)) for i, one in enumerate(lengths)]
  seq_len = min(4, *(len(source.tokens) + len(source) for source in sources))
  weights = weights[: len(sources)]
  sizes = dict(seq_len=seq_len, batch_size=HOSTS, seed=seed, weights=weights)
  hosts = [make_batches(sources, **sizes, host=h, num_hosts=HOSTS) for h in range(HOSTS)]
  per_source = [windows_of(source, seq_len) for source in sources]
  total = HOSTS * hosts[0].steps(EPOCHS)
  seen = rows_until(hosts, total)
  assert Counter(seen).keys() == Counter(itertools.chain(*per_source)).keys()
  for weight, windows in zip(weights, per_source, strict=True):
    own = [row for row in seen if row in windows]
    assert abs(len(own) - total * weight / sum(weights)) < len(sources)
    # Whatever the time, every pass through a source is complete or under way.
    for begin in range(0, len(own), len(windows)):
      this_pass = Counter(own[begin : begin + len(windows)])
      complete = begin + len(windows) <= len(own)
      assert this_pass == Counter(windows) if complete else max(this_pass.values()) == 1
  if hosts[0].steps() > 1:  # an epoch is not over a step earlier
    early = rows_until(hosts, HOSTS * (hosts[0].steps() - 1))
    assert set(early) != set(itertools.chain(*per_source))


def test_batches_depend_on_seed_and_step_alone():
  documents = make_documents([7] * 20)
  batches = make_batches(documents)
  in_order = [rows_of(batches[step]) for step in range(30)]
  again = make_batches(documents)
  assert [rows_of(again[step]) for step in reversed(range(30))] == in_order[::-1]
  other = make_batches(documents, seed=1)
  assert [rows_of(other[step]) for step in range(30)] != in_order


def test_epochs_are_shuffled_afresh():
  documents = make_documents([7] * 20)  # 40 windows of 4
  batches = make_batches(documents, batch_size=40)
  unshuffled = windows_of(documents)
  orders = [unshuffled, *(rows_of(batches[epoch]) for epoch in range(4))]
  for i, order in enumerate(orders):
    assert sorted(order) == sorted(unshuffled)
    for other in orders[:i]:
      # Two random orders of 40 agree in one place on average.
      assert sum(a == b for a, b in zip(order, other, strict=True)) < 10


def test_steps_of_an_epoch():
  documents = make_documents([7] * 20)  # 40 windows of 4
  assert make_batches(documents, batch_size=7).steps() == 6
  assert make_batches(documents, batch_size=7).steps(2) == 12
  assert make_batches(documents, batch_size=8).steps(0.5) == 3
  # 40 windows at a quarter of the rows: 160 rows.
  mixed = make_batches([documents, make_documents([3, 3])], weights=[1, 3], batch_size=8)
  assert mixed.steps() == pytest.approx(20, abs=1)
  with pytest.raises(ValueError, match="positive number of epochs, got 0"):
    mixed.steps(0)


@pytest.mark.parametrize("step", [0, 5])
def test_iterate_gives_what_indexing_gives(step):
  batches = make_batches(make_documents([7] * 20))
  before = threading.active_count()
  iterator = batches.iterate(step)
  for i in range(step, step + 20):
    assert rows_of(next(iterator)) == rows_of(batches[i])
  iterator.close()
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before
  with pytest.raises(StopIteration):
    next(iterator)


def test_iterate_with_worker_processes():
  batches = make_batches(make_documents([7] * 20), workers=2, host=1, num_hosts=3)
  iterator = batches.iterate(3)
  read = [next(iterator) for _ in range(4)]
  assert all(type(array) is np.ndarray for batch in read for array in batch.values())
  assert len(multiprocessing.active_children()) == 2
  iterator.close()
  assert not multiprocessing.active_children()
  assert [rows_of(batch) for batch in read] == [rows_of(batches[step]) for step in range(3, 7)]


PROGRAM = """
  import multiprocessing, signal, time
  import numpy as np
  from triform.arch.data.batches import TrainBatches
  from triform.arch.data.packing import Documents

  def main():
    documents = Documents.from_arrays([np.arange(1000)])
    batches = TrainBatches(
      documents, bos_id=1, eos_id=2, seq_len=8, batch_size=2, seed=0, workers=1
    )
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))  # as the trainer does
    iterator = batches.iterate()
    next(iterator)
    print("ready", *(child.pid for child in multiprocessing.active_children()), flush=True)
    while not stopped:
      time.sleep(0.01)
    for _ in range(20):
      next(iterator)
    iterator.close()
    print("closed", flush=True)

  if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path):
  """A process that reads batches through a worker, in a process group of its own."""
  file = tmp_path / "program.py"
  file.write_text(textwrap.dedent(PROGRAM))
  process = subprocess.Popen(
    [sys.executable, str(file)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  yield process
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)  # with its workers, if a test has failed
  process.communicate()


def test_ctrl_c_leaves_the_workers_to_their_parent(program):
  assert program.stdout.readline().startswith("ready")
  os.killpg(program.pid, signal.SIGINT)  # the whole group, as a terminal does
  output, errors = program.communicate(timeout=60)
  assert (program.returncode, output.strip()) == (0, "closed"), errors
  assert "Traceback" not in errors


def test_workers_end_with_a_killed_parent(program):
  workers = [int(pid) for pid in program.stdout.readline().split()[1:]]
  assert workers
  program.kill()
  deadline = time.monotonic() + 30
  while any(map(is_running, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(is_running, workers))


def is_running(pid):
  try:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"  # ended, and nobody has asked how


def test_endless_batches_of_one_go_on():
  batches = make_batches(make_documents([3]), batch_size=1)
  assert batches[10**12]["inputs"].shape == (1, 4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": -1}, "seed >= 0, got -1"),
    ({"seq_len": 0}, "seq_len >= 1, got 0"),
    ({"batch_size": 0}, "batch_size >= 1, got 0"),
    ({"batch_size": 4, "num_hosts": 3}, "batch_size is 4, expected a multiple of the 3 hosts"),
    ({"host": 2, "num_hosts": 2, "batch_size": 2}, r"host in \[0, 2\), got 2"),
    ({"workers": -1}, "workers >= 0, got -1"),
    ({"seq_len": 5}, "has 4 tokens, expected at least one sequence: seq_len is 5"),
    ({"weights": [0.0]}, r"positive weights, got \[0.0\]"),
    ({"weights": [1.0, 1.0]}, "a weight for every source"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make_batches(make_documents([3]), **changes)


def test_training_on_nothing_is_refused():
  with pytest.raises(ValueError, match="has 0 tokens"):
    make_batches(Documents.from_arrays([]))
