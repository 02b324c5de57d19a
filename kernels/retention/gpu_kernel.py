"""The kernel of `gpu`: what the warpgroups of a thread block share, and what each does."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_plan import CHUNK, Plan
from .gpu_weights import WGMMA, Weights, load, per_row


def entry(*refs, plan: Plan, names, reverse):
  """Allocates what the warpgroups share, and gives each its role."""
  gmem = dict(zip(names, refs, strict=True))
  dtype = gmem["v"].dtype
  # Every tile is read by the keepers and by one reader.
  consumers = plan.keepers + bool(plan.readers)

  def shared(*shape, dtype=dtype):
    return plgpu.SMEM(shape, dtype, transforms=_tiled(dtype))

  def stream(dtype):
    return plgpu.SMEM((plan.value_stages, CHUNK), dtype)

  def ring(size, filled, emptied):
    return {
      "full": plgpu.Barrier(num_arrivals=filled, num_barriers=size),
      "free": plgpu.Barrier(num_arrivals=emptied, num_barriers=size),
    }

  copies = 1 + ("exponent" in names) + ("segment" in names)
  scratch = {
    "k": shared(plan.stages, CHUNK, plan.block),
    "v": shared(plan.value_stages, CHUNK, plan.tile),
    "added": shared(plan.keepers, CHUNK, plan.tile),
    "keys": ring(plan.stages, 2 if plan.readers else 1, consumers),
    "values": ring(plan.value_stages, copies, consumers),
  }
  if plan.readers:
    scratch |= {
      "q": shared(plan.stages, CHUNK, plan.block),
      "state": shared(plan.slots, plan.k, plan.tile),
      "out": shared(plan.readers, CHUNK, plan.tile, dtype=gmem["out"].dtype),
      "states": ring(plan.slots, plan.keepers, 1),
    }
  if "exponent" in names:
    scratch["exponent"] = stream(jnp.float32)
  if "segment" in names:
    scratch["segment"] = stream(jnp.int32)

  def body(smem):
    block = _Block(plan, reverse, gmem, smem)
    warpgroup = lax.axis_index("warpgroup")
    keepers = warpgroup < plan.keepers
    loader = warpgroup == plan.keepers

    @pl.when(keepers)
    def _():
      _set_registers(plan.registers, 0)
      block.keep(warpgroup)

    @pl.when(loader)
    def _():
      _set_registers(plan.registers, 1)
      block.load()

    if plan.readers:

      @pl.when(~keepers & ~loader)
      def _():
        _set_registers(plan.registers, 2)
        block.read(warpgroup - plan.keepers - 1)

  pl.run_scoped(body, scratch, collective_axes="warpgroup")


def _set_registers(registers, role):
  if registers is not None and registers[role] is not None:
    plgpu.set_max_registers(registers[role], action="decrease" if role == 1 else "increase")


class _Block:
  """What a thread block does, by role."""

  def __init__(self, plan: Plan, reverse: bool, gmem, smem):
    self.plan, self.reverse, self.gmem, self.smem = plan, reverse, gmem, smem
    h, v_size = gmem["state"].shape[1], gmem["v"].shape[-1]
    self.chunks = gmem["v"].shape[1] // CHUNK
    # Tiles of one head are neighbours, so that they find q and k in the L2 cache; so are the
    # heads that share k and v.
    index, tiles = lax.axis_index("block"), v_size // plan.tile
    head = lax.div(index, jnp.int32(tiles))
    self.batch, self.head = lax.div(head, jnp.int32(h)), lax.rem(head, jnp.int32(h))
    self.columns = pl.ds(lax.rem(index, jnp.int32(tiles)) * plan.tile, plan.tile)

  def _head_of(self, name):
    """The head of an array whose heads several heads of this sweep may share."""
    shared_by = self.gmem["state"].shape[1] // self.gmem[name].shape[2]
    return lax.div(self.head, jnp.int32(shared_by))

  def _chunk(self, n):
    """The position of the n-th chunk of the sweep."""
    return self.chunks - 1 - n if self.reverse else n

  def _tokens(self, n):
    return pl.ds(self._chunk(n) * CHUNK, CHUNK)

  # The loader.

  def load(self):
    plan = self.plan

    @pl.loop(0, self.chunks)
    def _(n):
      tokens = self._tokens(n)
      for index in range(plan.blocks):
        item = n * plan.blocks + index
        slot = _wait_free(self.smem["keys"], item, plan.stages)
        columns = pl.ds(index * plan.block, plan.block)
        for name in ("q", "k") if plan.readers else ("k",):
          self._copy(name, (tokens, self._head_of(name), columns), "keys", slot)
        if index == 0:
          value_slot = _wait_free(self.smem["values"], n, plan.value_stages)
          self._copy("v", (tokens, self._head_of("v"), self.columns), "values", value_slot)
          if "exponent" in self.gmem:
            shared = self.gmem["exponent"].ndim == 2
            index = (tokens,) if shared else (self.head, tokens)
            self._copy("exponent", index, "values", value_slot)
          if "segment" in self.gmem:
            self._copy("segment", (tokens,), "values", value_slot)

    _drain(self.smem["keys"], self.chunks * plan.blocks, plan.stages)
    _drain(self.smem["values"], self.chunks, plan.value_stages)

  def _copy(self, name, index, ring, slot):
    source = self.gmem[name].at[(self.batch, *index)]
    plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], self.smem[ring]["full"].at[slot])

  # The keepers.

  def keep(self, keeper):
    plan = self.plan
    rate = self.gmem["rate"][self.head]
    rows = [
      pl.ds(index * plan.block + keeper * plan.part, plan.part) for index in range(plan.blocks)
    ]

    def place(rows):
      return self.batch, self.head, rows, self.columns

    def chunk(n, state):
      last = self._last_segment(n)
      if plan.readers:
        slot = _wait_free(self.smem["states"], n, plan.slots)
        for part, at in zip(state, rows, strict=True):
          self.smem["state"].at[slot, at][...] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem["states"]["full"].at[slot])

      slot = _wait_full(self.smem["values"], n, plan.value_stages)
      weights = self._weights(slot, rate, last)
      added = self.smem["added"].at[keeper]
      values = load(self.smem["v"].at[slot], WGMMA)
      values = values.astype(jnp.float32) * per_row(weights.add(), values)
      added[...] = values.astype(jnp.bfloat16)
      plgpu.commit_smem()
      state = tuple(map(weights.keep, state))
      plgpu.barrier_arrive(self.smem["values"]["free"].at[slot])

      def update(*accs):
        for acc, part in zip(accs, state, strict=True):
          acc[...] = part
        for index, acc in enumerate(accs):
          slot = _wait_full(self.smem["keys"], n * plan.blocks + index, plan.stages)
          keys = self.smem["k"].at[slot]
          if plan.keepers > 1:
            keys = keys.at[:, pl.ds(keeper * plan.part, plan.part)]
          plgpu.wgmma(acc, keys.T, added)
          if index > 0:
            plgpu.wgmma_wait(1)
            self._free_keys(n, index - 1)
        new = tuple(acc[...] for acc in accs)
        self._free_keys(n, plan.blocks - 1)
        return new

      return pl.run_scoped(update, *[plgpu.ACC((plan.part, plan.tile))] * plan.blocks)

    state = tuple(load(self.gmem["state"].at[place(at)], WGMMA, optimized=False) for at in rows)
    state = lax.fori_loop(0, self.chunks, chunk, state)
    if plan.readers:
      _drain(self.smem["states"], self.chunks, plan.slots)
    for part, at in zip(state, rows, strict=True):
      self.gmem["final"].at[place(at)][...] = part

  def _free_keys(self, n, index):
    slot = lax.rem(n * self.plan.blocks + index, self.plan.stages)
    plgpu.barrier_arrive(self.smem["keys"]["free"].at[slot])

  # The readers.

  def read(self, reader):
    plan = self.plan
    rate = self.gmem["rate"][self.head]

    def chunk(n):
      value_slot = lax.rem(n, plan.value_stages)
      last = self._last_segment(n)

      def scores_and_history(scores, history):
        state_slot = lax.rem(n, plan.slots)
        for index in range(plan.blocks):
          slot = _wait_full(self.smem["keys"], n * plan.blocks + index, plan.stages)
          q, k = self.smem["q"].at[slot], self.smem["k"].at[slot]
          plgpu.wgmma(scores, q, k.T)
          if index == 0:
            _wait_full(self.smem["states"], n, plan.slots)
          rows = pl.ds(index * plan.block, plan.block)
          plgpu.wgmma(history, q, self.smem["state"].at[state_slot, rows])
          if index > 0:
            plgpu.wgmma_wait(2)
            self._free_keys(n, index - 1)
        # The weights of the scores are computed while the history still is.
        scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
        _wait_full(self.smem["values"], n, plan.value_stages)
        weights = self._weights(value_slot, rate, last)
        scores = (scores * weights.pairs()).astype(jnp.bfloat16)
        history = plgpu.wgmma_accumulator_load(history, wait_n=0)
        self._free_keys(n, plan.blocks - 1)
        plgpu.barrier_arrive(self.smem["states"]["free"].at[state_slot])
        return scores, weights.history(history)

      scores, out = pl.run_scoped(
        scores_and_history, plgpu.ACC((CHUNK, CHUNK)), plgpu.ACC((CHUNK, plan.tile))
      )

      def attend(acc):
        acc[...] = out
        plgpu.wgmma(acc, scores, self.smem["v"].at[value_slot])
        return acc[...]

      out = pl.run_scoped(attend, plgpu.ACC((CHUNK, plan.tile)))
      staged = self.smem["out"].at[reader]
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      staged[...] = out.astype(staged.dtype)
      plgpu.commit_smem()
      # After the commit, which also orders the reads of exponents and segments before their reuse.
      plgpu.barrier_arrive(self.smem["values"]["free"].at[value_slot])
      place = (self.batch, self._tokens(n), self.head, self.columns)
      plgpu.copy_smem_to_gmem(staged, self.gmem["out"].at[place])

    @pl.loop(0, lax.div(self.chunks - reader + plan.readers - 1, plan.readers))
    def _(step):
      chunk(step * plan.readers + reader)

    plgpu.wait_smem_to_gmem(0)

  def _last_segment(self, n):
    if "last" not in self.gmem:
      return None
    return self.gmem["last"][self.batch, self._chunk(n)]

  def _weights(self, slot, rate, last):
    if "exponent" not in self.gmem and "segment" not in self.gmem:
      return Weights(self.reverse, rate)

    def stream(name):
      return functools.partial(load, self.smem[name].at[slot])

    exponent = segment = None
    if "exponent" in self.gmem:
      exponent = stream("exponent")
    if "segment" in self.gmem:
      segment = stream("segment")
    final = self.smem["exponent"][slot, CHUNK - 1] if exponent else None
    return Weights(self.reverse, rate, exponent, segment, final, last)


def _tiled(dtype):
  """Tiles as wgmma wants them: 8 rows of 128 bytes, swizzled."""
  width = 128 // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)


def _wait_full(ring, item, size):
  slot = lax.rem(item, size)
  plgpu.barrier_wait(ring["full"].at[slot])
  return slot


def _wait_free(ring, item, size):
  """Waits until the item that last held the slot of this one has been read."""
  slot = lax.rem(item, size)

  @pl.when(item >= size)
  def _():
    plgpu.barrier_wait(ring["free"].at[slot])

  return slot


def _drain(ring, items, size):
  """Waits until the last items have been read: who waits on a barrier shall see all its phases."""
  for item in range(max(0, items - size), items):
    plgpu.barrier_wait(ring["free"].at[item % size])
