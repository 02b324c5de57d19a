"""How a sweep of `gpu` is laid out on a Hopper multiprocessor."""

import dataclasses
from typing import Any

from . import tuned

CHUNK = 64  # rows of one wgmma instruction
BLOCK = 128  # columns of q and k that one copy brings at most
MULTIPROCESSORS = 132  # of an H100 SXM or H200
SHARED_BYTES = 224 * 1024  # of the 227 KiB of a thread block; barriers and streams need some
REGISTERS = 512  # for a thread of every warpgroup, together
SIZES = (64, 128, 256, 512)  # of a head's keys and values; others are filled up with zeros
TILES = (64, 128)  # columns of v


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a sweep over keys of `k` columns is laid out on a multiprocessor."""

  k: int  # columns of q and k
  tile: int  # columns of v that a thread block owns
  out_bytes: int  # of an element of the output
  keepers: int  # warpgroups that hold the state
  readers: int  # warpgroups that compute outputs, of alternating chunks
  slots: int  # copies of the state on the way to the readers
  registers: tuple | None  # for a thread of a keeper, the loader, a reader; None: as at launch
  stages: int = 0  # copies of blocks of q and k in flight
  value_stages: int = 2

  def __post_init__(self):
    """Raises `ValueError` for what the hardware cannot do; `stages` of 0 are yet to be settled."""

    def expect(holds, name, expected):
      if not holds:
        raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    expect(self.k in SIZES, "k", f"one of {SIZES}")
    # Accumulators of a wider tile of long keys are more than a thread's registers.
    tiles = TILES if self.k <= BLOCK and self.readers else TILES[:1]
    expect(self.tile in tiles, "tile", f"one of {tiles} for keys of {self.k}")
    whole = self.keepers > 0 and self.block % (self.keepers * CHUNK) == 0
    expect(whole, "keepers", f"a divisor of {self.block // CHUNK}, a block's rows over {CHUNK}")
    if self.registers is not None:
      roles = (self.keepers, 1, self.readers)
      launched = REGISTERS // sum(roles) // 8 * 8
      each = [launched if n is None else n for n in self.registers]
      fits = all(n % 8 == 0 and 24 <= n <= 256 for n in each)
      fits &= sum(n * role for n, role in zip(each, roles, strict=True)) <= REGISTERS
      expect(fits, "registers", f"multiples of 8 from 24 to 256, {REGISTERS} in all warpgroups")
    if self.stages:
      expect(self.stages % self._step == 0, "stages", f"a multiple of {self._step}")
      told = f"at most {SHARED_BYTES} bytes of shared memory, not {self.shared_bytes}"
      expect(self.shared_bytes <= SHARED_BYTES, "stages", told)

  @property
  def _step(self):
    # A warpgroup has to see every use of a slot, else it mistakes one use for another: chunks of
    # one reader must always fall on the same slots.
    return 1 if self.readers <= 1 else self.readers * self.blocks

  @property
  def block(self):
    return min(self.k, BLOCK)

  @property
  def blocks(self):
    return self.k // self.block

  @property
  def part(self):
    """Rows that a keeper holds of every block of the state."""
    return self.block // self.keepers

  @property
  def shared_bytes(self):
    keys = (1 + bool(self.readers)) * self.stages * CHUNK * self.block
    values = (self.value_stages + self.keepers) * CHUNK * self.tile
    out = self.out_bytes * self.readers * CHUNK * self.tile
    states = self.slots * self.k * self.tile
    return 2 * (keys + values + states) + out

  def deepened(self) -> "Plan":
    """With as many stages as fit, of at most four chunks."""
    least = dataclasses.replace(self, stages=self._step)
    fit = (SHARED_BYTES - self.shared_bytes) // (least.shared_bytes - self.shared_bytes)
    steps = min(fit, 4 * self.blocks // self._step)
    return dataclasses.replace(self, stages=steps * self._step)


def make_plan(heads: int, k: int, v: int, out_bytes: int, tile: int | None = None) -> Plan:
  """The plan for `heads` (rows times heads) sweeps; for their states only, if `out_bytes` is 0.

  A narrow tile repeats the products of q and k for more tiles and a wide one leaves
  multiprocessors idle, so the tile is wide only if that fills the chip as well, if none is given.
  """
  if out_bytes == 0:
    plan = Plan(k, 64, 0, 1 if k <= 256 else 2, 0, 0, None)
    return plan.deepened()
  if tile is None:
    waves = {one: -(-heads * v // one // MULTIPROCESSORS) * one for one in TILES}
    tile = 128 if k <= 128 and v % 128 == 0 and waves[128] <= waves[64] else 64
  if tile not in TILES or v % tile:
    raise ValueError(f"tile is {tile!r}, expected one of {TILES} that divides the {v} columns of v")
  if k <= 128 and tile == 64:
    plan = Plan(k, tile, out_bytes, 1, 2, 2, (208, 40, None))
  elif k <= 128:
    plan = Plan(k, tile, out_bytes, 1, 1, 2, (232, 40, 232))
  elif k <= 256:
    plan = Plan(k, tile, out_bytes, 1, 1, 2 if out_bytes <= 2 else 1, (232, 40, 232))
  else:
    plan = Plan(k, tile, out_bytes, 2, 1, 1, (176, 24, 136))
  return plan.deepened()


def measured(heads: int, t: int, k: int, v: int, dtype, reverse: bool) -> dict[str, Any]:
  """The `tile` and `pieces` that were measured to be the best of a sweep; nothing if none were.

  Raises:
    ValueError: for a choice in the table that cannot be.
  """
  choice = tuned.look_up(make_key(heads, t, k, v, dtype, reverse))
  if choice is None:
    return {}
  try:
    check_pieces(choice["pieces"], t)
    make_plan(heads, k, v, dtype.itemsize, choice["tile"])
  except (KeyError, ValueError) as error:
    raise ValueError(
      f"{tuned.TABLE} has {choice} for keys of {k}, values of {v}: {error}"
    ) from None
  return choice


def make_key(heads: int, t: int, k: int, v: int, dtype, reverse: bool) -> dict[str, Any]:
  """What the best layout of a sweep depends on; `dtype` is that of what it gives out."""
  sizes = {"heads": heads, "tokens": t, "k": k, "v": v}
  of = "backward" if reverse else "forward"
  return {"kernel": "gpu", "pass": of, "dtype": str(dtype), **sizes}


def check_pieces(pieces: int, t: int) -> None:
  """Raises `ValueError` unless `t` tokens are as many pieces of whole chunks."""
  if t % CHUNK:
    raise ValueError(f"there are {t} tokens, expected whole chunks of {CHUNK}")
  if not isinstance(pieces, int) or pieces < 1 or t // CHUNK % pieces:
    raise ValueError(f"pieces is {pieces!r}, expected a divisor of the {t // CHUNK} chunks")
