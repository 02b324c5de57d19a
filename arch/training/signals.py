"""Stopping a run by a signal without losing its work."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

STOPPING = b"\nstopping after this step; again to stop at once\n"


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
  """An event that the first SIGTERM or SIGINT sets; the second acts as it would have by default.

  Only for the main thread, which alone may handle signals.
  """
  stopped = threading.Event()
  previous: dict[int, Any] = {}

  def restore():
    for number, handler in previous.items():
      signal.signal(number, handler)

  def handle(number, frame):
    restore()
    stopped.set()
    os.write(2, STOPPING)  # the signal may have come within a print, which cannot be entered twice

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, handle)
  try:
    yield stopped
  finally:
    restore()
