"""Layouts of kernels that were measured to be faster than the heuristic's, by kind of device.

`tuned.json` has one entry a line, which only `benchmarks/tune.py` writes: the `device` it was
measured on, the `key` by which a kernel asks, the `choice`, and by what `ratio` of its time to the
heuristic's, where two measurements of the same differed by `noise`.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

TABLE = Path(__file__).with_name("tuned.json")
FIELDS = {"device", "key", "choice", "ratio", "noise"}


def look_up(key: Mapping[str, Any]) -> dict[str, Any] | None:
  """The choice for `key` on the device that is here; `None` if there is none.

  A program that is compiled for a device that is not here has none, unless it is of the same kind.
  """
  entries = read(TABLE)
  if not entries:
    return None
  device = jax.local_devices()[0].device_kind
  target = jax.sharding.get_abstract_mesh().abstract_device
  if target is not None and target.device_kind != device:
    return None
  found = (e["choice"] for e in entries if e["device"] == device and e["key"] == key)
  return next(found, None)


@functools.cache
def read(path: Path) -> list[dict[str, Any]]:
  try:
    entries = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  for entry in entries:
    if set(entry) != FIELDS:
      raise ValueError(f"{path} has {entry}, expected {', '.join(sorted(FIELDS))}")
  return entries


def write(path: Path, entry: Mapping[str, Any]) -> None:
  """Adds an entry, in the place of the one for the same device and key."""

  def place(entry):
    return json.dumps([entry["device"], entry["key"]], sort_keys=True)

  entries = {place(e): e for e in (*read(path), entry)}
  lines = [json.dumps(entries[name], sort_keys=True) for name in sorted(entries)]
  path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
  read.cache_clear()
