"""Which axes of a mesh divide the rows and heads of a kernel."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from triform.kernels.sharding import divided, parts


@pytest.mark.parametrize(
  ("sizes", "rows", "heads", "of_rows", "of_heads"),
  [
    ((2, 4), 2, 4, ("x",), ("y",)),
    ((2, 2), 4, 4, ("x", "y"), None),
    ((2, 2), 2, 4, ("x",), ("y",)),  # the rows are divided but once
    ((2, 2), 1, 4, None, ("x", "y")),
    ((2, 2), 1, 2, None, ("x",)),  # and so are the heads
    ((3, 2), 4, 2, ("y",), None),  # which leaves the three nothing
    ((8, 1), 4, 2, ("y",), None),
  ],
)
def test_an_axis_divides_rows_if_it_can_or_else_heads(
  monkeypatch, sizes, rows, heads, of_rows, of_heads
):
  found = specs(monkeypatch, sizes, (AxisType.Auto,) * 2, rows, heads)
  assert found["in_specs"] == (P(of_rows, None, of_heads), P(of_heads), P(of_rows, of_heads))
  assert found["out_specs"] == (P(of_rows, None, of_heads), P(of_rows, of_heads))
  assert found["axis_names"] == {"x", "y"}


def test_axes_divided_by_hand_are_left_alone(monkeypatch):
  found = specs(monkeypatch, (2, 4), (AxisType.Manual, AxisType.Auto), 2, 4)
  assert found["in_specs"] == (P(None, None, "y"), P("y"), P(None, "y"))
  assert found["axis_names"] == {"y"}


def specs(monkeypatch, sizes, types, rows, heads):
  """What a kernel of tokens, decays and states is divided by."""
  monkeypatch.setattr(jax, "shard_map", lambda function, **options: options)
  with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, ("x", "y"), axis_types=types)):
    return divided(print, ("bth", "h", "bh"), ("bth", "bh"), rows=rows, heads=heads)


def test_parts_are_what_a_device_has():
  arrays = [jax.ShapeDtypeStruct(shape, "f4") for shape in ((2, 7, 4, 16), (4,), (2, 4, 16, 16))]
  with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4), ("x", "y"))):
    found = parts([*arrays, None], ("bth", "h", "bh", "b"), rows=2, heads=4)
  assert [a.shape for a in found[:3]] == [(1, 7, 1, 16), (1,), (1, 1, 16, 16)]
  assert found[3] is None
  assert parts(arrays, ("bth", "h", "bh"), rows=2, heads=4) == arrays


def test_without_a_mesh_a_kernel_is_as_it_is():
  assert divided(print, ("b",), "b", rows=2, heads=2) is print
