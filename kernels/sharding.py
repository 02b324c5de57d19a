"""Operators on a mesh: kernels, which the compiler cannot divide, and what is divided by hand."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def divided(
  function: Callable,
  in_axes: tuple[str, ...],
  out_axes: str | tuple[str, ...],
  *,
  rows: int,
  heads: int,
) -> Callable:
  """`function` on every device's own rows and heads, if a mesh is in scope.

  An axis of the mesh divides the rows of the batch if it can, else the heads if it can, else it
  divides nothing. Axes that the caller has divided by hand (`jax.shard_map`) are left alone.

  Every array's axes are told by letters, `b` for rows, `h` for heads, any other for the rest, of
  which those at the end may be left out. There are `rows` rows, and no array has fewer than `heads`
  heads.
  """
  axes, free = _axes(rows, heads)
  if not free:
    return function

  def spec(letters):
    return P(*(tuple(axes.get(letter, ())) or None for letter in letters))

  return jax.shard_map(
    function,
    in_specs=tuple(map(spec, in_axes)),
    out_specs=jax.tree.map(spec, out_axes),
    axis_names=free,
    check_vma=False,  # kernels do not say along which axes their results vary
  )


def parts(arrays: Sequence, axes: Sequence[str], *, rows: int, heads: int) -> list:
  """Shapes and dtypes of what `divided` gives a device of arrays; `None` remains."""
  over, _ = _axes(rows, heads)
  sizes = jax.sharding.get_abstract_mesh().shape
  pieces = {letter: math.prod(sizes[name] for name in names) for letter, names in over.items()}

  def part(a, letters):
    letters = letters.ljust(a.ndim)
    shape = (n // pieces.get(one, 1) for n, one in zip(a.shape, letters, strict=True))
    return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

  return [a if a is None else part(a, own) for a, own in zip(arrays, axes, strict=True)]


def _axes(rows: int, heads: int) -> tuple[dict[str, list[str]], set[str]]:
  """The axes of the mesh that divide rows and heads, and all that nobody has divided by hand."""
  mesh = jax.sharding.get_abstract_mesh()
  axes, free = {"b": [], "h": []}, set()
  for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True):
    if kind == AxisType.Manual:
      continue
    free.add(name)
    if rows % size == 0:
      axes["b"].append(name)
      rows //= size
    elif heads % size == 0:
      axes["h"].append(name)
      heads //= size
  return axes, free


def varying_as(like: jax.Array, x: jax.Array) -> jax.Array:
  """`x`, known to vary over the axes of the mesh that `like` does, where those are divided by hand.

  As the carry of a scan and the argument of a gradient that is written out have to be.
  """
  over = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
  return jax.lax.pcast(x, tuple(over), to="varying")
