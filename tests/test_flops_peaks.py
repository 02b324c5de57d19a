"""Peak speeds: known by the name of a device, or measured."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from triform.arch.flops import peaks


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v5", 459e12),  # a v5p
    ("TPU v5 lite", 197e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
  ],
)
def test_peaks_by_the_name_a_device_gives_itself(kind, peak):
  assert peaks.peak_flops(SimpleNamespace(device_kind=kind, platform="tpu")) == peak


@pytest.mark.parametrize(
  ("platform", "expected"), [("cpu", (1024, "float32")), ("rocm", (8192, "bfloat16"))]
)
def test_an_unknown_device_is_measured_at_what_it_is_good_at(platform, expected, monkeypatch):
  monkeypatch.setattr(peaks, "_measured_flops", lambda device, n, dtype: (n, jnp.dtype(dtype).name))
  assert peaks.peak_flops(SimpleNamespace(device_kind="new", platform=platform)) == expected


def test_the_peak_of_this_processor_is_measured():
  assert 1e8 < peaks._measured_flops(jax.devices()[0], 256, jnp.float32) < 1e15
