"""How a sweep of `gpu` is laid out on a Hopper multiprocessor."""

import dataclasses

CHUNK = 64  # rows of one wgmma instruction
BLOCK = 128  # columns of q and k that one copy brings at most
MULTIPROCESSORS = 132  # of an H100 SXM or H200
SHARED_BYTES = 224 * 1024  # of the 227 KiB of a thread block; barriers and streams need some


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
    # A warpgroup has to see every use of a slot, else it mistakes one use for another: chunks of
    # one reader must always fall on the same slots.
    step = 1 if self.readers <= 1 else self.readers * self.blocks
    plans = [dataclasses.replace(self, stages=n) for n in range(step, 4 * self.blocks + 1, step)]
    return max((p for p in plans if p.shared_bytes <= SHARED_BYTES), key=lambda p: p.stages)


def make_plan(heads: int, k: int, v: int, out_bytes: int) -> Plan:
  """The plan for `heads` (rows times heads) sweeps; for their states only, if `out_bytes` is 0.

  A narrow tile repeats the products of q and k for more tiles and a wide one leaves
  multiprocessors idle, so the tile is wide only if that fills the chip as well.
  """
  if out_bytes == 0:
    plan = Plan(k, 64, 0, 1 if k <= 256 else 2, 0, 0, None)
    return plan.deepened()
  waves = {tile: -(-heads * v // tile // MULTIPROCESSORS) * tile for tile in (64, 128)}
  if k <= 128 and v % 128 == 0 and waves[128] <= waves[64]:
    plan = Plan(k, 128, out_bytes, 1, 1, 2, (232, 40, 232))
  elif k <= 128:
    plan = Plan(k, 64, out_bytes, 1, 2, 2, (208, 40, None))
  elif k <= 256:
    plan = Plan(k, 64, out_bytes, 1, 1, 2 if out_bytes <= 2 else 1, (232, 40, 232))
  else:
    plan = Plan(k, 64, out_bytes, 2, 1, 1, (176, 24, 136))
  return plan.deepened()
