"""Spike rates against those of the published code, and energy against arithmetic by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from triform.arch import LMUFormer
from triform.arch.interop import from_lmuformer
from triform.arch.layers.normed import fold_batch_norm
from triform.arch.spiking import energy, spike_rates

ARRAYS = np.load(Path(__file__).parent / "data/lmuformer.npz")
# Names of layers of neurons, as published and here.
OURS = {
  "patch_embed.proj_lif": "stem/neurons/0",
  "patch_embed.proj_lif1": "stem/neurons/1",
  "patch_embed.proj_lif2": "stem/neurons/2",
  "patch_embed.proj_lif3": "stem/neurons/3",
  "patch_embed.rpe_lif": "stem/neurons/4",
  "attn.prev_lif": "mixer/input_neuron",
  "attn.lmu.f_u": "mixer/write_neuron",
  "attn.lmu.f_m": "mixer/memory_neuron",
  "attn.lmu.f_h": "mixer/hidden_neuron",
  "attn.proj_lif": "mixer/output_neuron",
  "head_lif": "neuron/neuron",
}
FEED_FORWARD = {
  "slmu_rnn_ms_conv1d": ("input_neuron/neuron", "hidden_neuron"),
  "slmu_rnn_conv1d": ("hidden_neuron", "output_neuron"),
}


def published(case, **options):
  meta = json.loads(str(ARRAYS[f"{case}/meta"]))
  prefix = f"{case}/param/"
  params = {k.removeprefix(prefix): ARRAYS[k] for k in ARRAYS.files if k.startswith(prefix)}
  names = dict(OURS)
  for i, neuron in enumerate(FEED_FORWARD[meta["config"]["model"]]):
    names[f"mlp.fc{i + 1}_lif"] = f"feed_forward/{neuron}"
  rates = {}
  for name, rate in meta["spike_rate"].items():
    _, block, rest = name.rpartition("block.")
    layer, _, part = rest.partition(".")
    rates[f"stack/layers/{layer}/{names[part]}" if block else names[name]] = rate
  return from_lmuformer(meta["config"], params, **options), rates


def small(**options):
  sizes = {"in_features": 3, "num_classes": 4, "d_model": 5, "num_layers": 2, "mlp_ratio": 2}
  return LMUFormer(**{**sizes, "theta": 8.0, "scan_layers": False, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", ["ms_eval_24", "eb_eval_24"])
def test_published_rates(case, scan_layers):
  model, expected = published(case, scan_layers=scan_layers)
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
  rates = spike_rates(model, ARRAYS[f"{case}/in/x"])
  assert rates == pytest.approx(expected, abs=5.1e-4)  # published with three decimals
  after = nnx.to_pure_dict(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_padding_does_not_count():
  model, _ = published("ms_eval_24")
  x = np.asarray(ARRAYS["ms_eval_24/in/x"])[:1]
  mask = np.arange(24)[None] < 15
  padded = spike_rates(model, np.where(mask[..., None], x, 9.0), mask=mask)
  assert padded == pytest.approx(spike_rates(model, x[:, :15]), abs=1e-6)


def test_a_dead_memory_is_told():
  model = small(variant="spiking_ms")
  for layer in model.stack.layers:
    layer.mixer.input.norm.bias[...] = jnp.full(1, -9.0)
  with pytest.warns(UserWarning, match="stack/layers/1/mixer/write_neuron never spikes"):
    spike_rates(model, np.ones((1, 6, 3), np.float32))


def test_a_model_without_neurons_has_no_rates():
  with pytest.raises(ValueError, match="LMUFormer has no spiking neurons"):
    spike_rates(small(), np.ones((1, 6, 3), np.float32))


D, I, K, H, N = 5, 3, 4, 10, 10  # of `small`: width, inputs, classes, hidden units, order


def rates_of(model, rate):
  paths = [path for path, module in nnx.iter_graph(model) if hasattr(module, "threshold")]
  return {"/".join(map(str, path)): rate for path in paths}


def test_energy_of_the_published_spiking_model():
  model = small(variant="spiking_ms", num_layers=1)
  told = energy(model, rates_of(model, 0.25))
  norms = 3 * D + D + (D + 1 + N + D + D) + (D + H) + D  # stem, memory, feed-forward, head
  assert told.macs == 3 * I * D + N * N + norms
  spiking = 3 * (3 * D * D) + 3 * D * D  # the other convolutions
  spiking += D + N + (N + D) * D + D * D + D * H + H * D + D * K
  # The fourth convolution has spikes for inputs, and so has that of the residual.
  assert told.accumulates == pytest.approx(0.25 * spiking)
  assert told.updates == 4 * D + (D + 1 + N + D) + (D + H) + D
  assert told.picojoules == pytest.approx(4.6 * told.macs + 0.9 * told.accumulates)


def test_sums_of_spikes_are_added_as_often():
  model = small(variant="spiking", num_layers=1)
  told = energy(model, rates_of(model, 0.25))
  stem, memory, last = 0.5, 0.75, 1.0  # spikes a number of the residual stream
  spiking = 0.25 * (4 * 3 * D * D) + stem * D + 0.25 * N + 0.25 * N * D + stem * D * D
  spiking += 0.25 * D * D + memory * D * H + 0.25 * H * D + last * D * K
  assert told.accumulates == pytest.approx(spiking)


def test_energy_without_spikes_and_norms():
  plain = small(num_layers=1)
  products = 3 * I * D + 4 * (3 * D * D) + D + D * (D + 1) + 2 * D * D + D * D + 2 * D * H + D * K
  norms = 4 * D + D + H + D
  assert energy(plain).macs == products + norms
  assert energy(fold_batch_norm(plain)).macs == products + 4 * D
  assert energy(plain).accumulates == 0


def test_wrong_arguments_are_told():
  model = small(variant="spiking_ms")
  rates = rates_of(model, 0.5)
  with pytest.raises(ValueError, match="rates lacks stem/neurons/0"):
    energy(model)
  with pytest.raises(ValueError, match="rates has mine, which the model has not"):
    energy(model, {**rates, "mine": 0.1})
  with pytest.raises(ValueError, match="model is a Linear, expected LMUFormer"):
    energy(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
