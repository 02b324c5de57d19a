"""T5's buckets of distances (arXiv 1910.10683, section 2.1)."""

import numpy as np


def relative_buckets(num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
  """The bucket of every distance from 0 to `max_distance`; farther ones have the last one's.

  int32[max_distance + 1]. The first half of the buckets are one distance each, the others grow
  geometrically.
  """
  exact = num_buckets // 2
  if num_buckets < 2 or max_distance <= exact:
    raise ValueError(
      f"{num_buckets} buckets cannot divide distances up to {max_distance}: expected at least 2, "
      f"and a distance above {exact}"
    )
  distance = np.arange(max_distance + 1)
  far = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
  large = np.minimum(exact + (far * (num_buckets - exact)).astype(int), num_buckets - 1)
  return np.where(distance < exact, distance, large).astype(np.int32)
