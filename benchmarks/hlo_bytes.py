"""Bytes that a compiled program moves through its device's memory, read off its instructions.

Every instruction of the entry computation reads its operands and writes its results once; what lies
in a TPU's VMEM moves nothing, and a slice that is updated in place moves the slice alone. XLA's own
count (`cost_analysis`) takes VMEM for memory, and has none for GPUs that are not there.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

NOTHING_MOVES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done"}
DTYPES = {"f32": "float32", "bf16": "bfloat16", "s32": "int32", "u32": "uint32", "pred": "bool"}


class Array(NamedTuple):
  shape: str  # with the dtype
  elements: int
  bytes: int  # in memory, so 0 in VMEM


class Instruction(NamedTuple):
  name: str
  type: str
  kind: str
  operands: list[str]


def moved(program: str) -> int:
  types, total = {}, 0
  for one in _instructions(program):
    types[one.name] = one.type
    if one.kind in NOTHING_MOVES:
      continue
    read, written = [_arrays(types[name]) for name in one.operands], _arrays(one.type)
    if one.kind == "copy-start":
      written = written[:1]  # the rest of the tuple is the operand, and a semaphore
    elif re.search("dynamic.update.slice", one.name):
      read, written = _slice_alone(read, written)
    total += sum(a.bytes for arrays in (*read, written) for a in arrays)
  return total


def moves(program: str, elements: int) -> int:
  """How often an array of so many elements is read or written."""
  types, total = {}, 0
  for one in _instructions(program):
    types[one.name] = one.type
    if one.kind not in NOTHING_MOVES:
      total += sum(_elements(types[name]).count(elements) for name in one.operands)
      total += _elements(one.type).count(elements)
  return total


def users(program: str, elements: int) -> list[str]:
  """Instructions that read an array of so many elements."""
  types, found = {}, []
  for one in _instructions(program):
    types[one.name] = one.type
    read = [name for name in one.operands if elements in _elements(types[name])]
    if read and one.kind not in NOTHING_MOVES:
      found.append(one.name)
  return found


def _instructions(program: str) -> Iterator[Instruction]:
  for line in program[program.index("\nENTRY") :].splitlines()[2:]:
    found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line)
    if found:
      name, type_, kind, rest = found.groups()
      yield Instruction(name, type_, kind, re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))


def _slice_alone(read, written):
  """Without what is updated in place, but for slices as large as the largest other operand."""
  shapes = {a.shape for a in written}
  rest = [arrays for arrays in read if len(arrays) != 1 or arrays[0].shape not in shapes]
  kept = {arrays[0].shape for arrays in read if arrays not in rest}
  largest = max((a for arrays in rest for a in arrays), key=lambda a: a.bytes)
  return rest, [min(a, largest, key=lambda a: a.bytes) if a.shape in kept else a for a in written]


def _arrays(type_: str) -> list[Array]:
  found = []
  for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_):
    count = math.prod(map(int, filter(None, sizes.split(","))))
    itemsize = 0 if "S(" in layout else jnp.dtype(DTYPES[dtype]).itemsize
    found.append(Array(f"{dtype}[{sizes}]", count, count * itemsize))
  return found


def _elements(type_: str) -> list[int]:
  return [a.elements for a in _arrays(type_)]
