"""Worker processes that compute in order, with bounded memory."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def available_processors() -> int:
  """Processors that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def start_worker(*_) -> None:
  """What every worker process does first: its end is its parent's affair alone.

  Ctrl-C reaches the whole process group, and the parent may want to finish its step; a parent
  that was killed cannot stop its workers.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def ordered_map(
  function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], processes: int
) -> Iterator[Any]:
  """`function(shared, item)` of every item, in order, in so many worker processes.

  A few items per process are under way at a time, however many there are. Workers are spawned, so
  all that they are given must be picklable; `shared` is sent to each of them once. With one process
  it is this one. A worker that is killed raises ChildProcessError.
  """
  if processes == 1:
    yield from (function(shared, item) for item in items)
    return
  items = iter(items)
  pool = ProcessPoolExecutor(
    processes,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_pool_worker,
    initargs=(function, shared),
  )
  try:
    pending = collections.deque(
      pool.submit(_call, item) for item in itertools.islice(items, 3 * processes)
    )
    while pending:
      yield pending.popleft().result()
      pending.extend(pool.submit(_call, item) for item in itertools.islice(items, 1))
  except BrokenProcessPool as error:
    raise ChildProcessError("a worker process was killed (is there enough memory?)") from error
  finally:
    pool.shutdown(cancel_futures=True)


_in_worker: tuple[Callable[[Any, Any], Any], Any] | None = None  # function and shared


def _start_pool_worker(function: Callable[[Any, Any], Any], shared: Any) -> None:
  global _in_worker
  start_worker()
  _in_worker = function, shared


def _call(item: Any) -> Any:
  function, shared = _in_worker
  return function(shared, item)
