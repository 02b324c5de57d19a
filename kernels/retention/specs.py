"""Sizes that retention is measured at: tests, benchmarks and tuning share them."""

from typing import NamedTuple


class Shape(NamedTuple):
  b: int
  t: int
  h: int
  k: int
  v: int


# The paper's heads (RetNet, table 2) at 8,192 tokens; heads of equal sizes; a long row.
RETNET = Shape(1, 8192, 8, 256, 512)
EQUAL_HEADS = Shape(4, 8192, 16, 256, 256)
LONG = Shape(1, 65536, 16, 128, 256)
# What jax-linear-attention publishes times of, for decays of one number per head and token.
PUBLISHED = (
  Shape(4, 4096, 16, 128, 128),
  Shape(1, 16384, 16, 128, 128),
  Shape(1, 65536, 16, 128, 128),
  Shape(1, 4096, 8, 128, 128),
  Shape(4, 4096, 24, 128, 64),
  Shape(1, 16384, 48, 128, 64),
  Shape(4, 4096, 8, 128, 256),
)
ALL = (RETNET, EQUAL_HEADS, LONG, *PUBLISHED)
# A token of decoding: the paper's heads at 1.3 billion parameters, and heads half as wide.
DECODING = tuple(
  Shape(b, 1, *heads) for heads in ((8, 256, 512), (16, 128, 256)) for b in (1, 32, 128)
)
