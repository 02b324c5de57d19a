"""Spike rates against spikes counted by hand and published ones, and energy by hand arithmetic."""

import json
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws_subjects import awake

from triform.arch import RetNet
from triform.arch.interop.lmuformer import from_lmuformer
from triform.arch.layers.normed import fold_batch_norm
from triform.arch.layers.spiking import LIF
from triform.arch.models.lmuformer import LMUFormer
from triform.arch.models.registry import ARCHITECTURES
from triform.arch.spiking import ACCUMULATE, MAC, energy, spike_rates

SIZES = {
  "in_features": 6, "num_classes": 4, "d_model": 8, "num_layers": 2, "mlp_ratio": 2, "order": 5,
  "theta": 6.0, "chunk_size": 4, "scan_layers": False,
}  # fmt: skip
FRAMES = 11
PUBLISHED = dict(np.load(Path(__file__).parent / "data/lmuformer.npz"))
# Neurons of a block by their published names, in the order that they are called in.
NEURONS = {
  "spiking_ms": {
    "attn.prev_lif": "mixer/input_neuron",
    "attn.lmu.f_u": "mixer/write_neuron",
    "attn.lmu.f_m": "mixer/memory_neuron",
    "attn.lmu.f_h": "mixer/hidden_neuron",
    "mlp.fc1_lif": "feed_forward/input_neuron/neuron",
    "mlp.fc2_lif": "feed_forward/hidden_neuron",
  },
  "spiking": {
    "attn.lmu.f_u": "mixer/write_neuron",
    "attn.lmu.f_m": "mixer/memory_neuron",
    "attn.lmu.f_h": "mixer/hidden_neuron",
    "attn.proj_lif": "mixer/output_neuron",
    "mlp.fc1_lif": "feed_forward/hidden_neuron",
    "mlp.fc2_lif": "feed_forward/output_neuron",
  },
}
STEM = ("proj_lif", "proj_lif1", "proj_lif2", "proj_lif3", "rpe_lif")
every_model = pytest.mark.parametrize(
  ("variant", "padding"),
  [
    ("spiking_ms", "same"),
    ("spiking", "causal"),
    pytest.param("spiking_ms", "causal", marks=pytest.mark.slow),
    pytest.param("spiking", "same", marks=pytest.mark.slow),
  ],
)


def make(variant="spiking_ms", padding="same", **options):
  options = {**SIZES, "variant": variant, "padding": padding, **options}
  return awake(LMUFormer(**options, rngs=nnx.Rngs(0)))


def clips():
  shape = (2, FRAMES, SIZES["in_features"])
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def names(variant, num_layers):
  """Published names and ours, in the order that neurons are called in."""
  stem = STEM if variant == "spiking" else STEM[:-1]
  pairs = {f"patch_embed.{name}": f"stem/neurons/{i}" for i, name in enumerate(stem)}
  for i in range(num_layers):
    for theirs, ours in NEURONS[variant].items():
      pairs[f"block.{i}.{theirs}"] = f"stack/layers/{i}/{ours}"
  return pairs if variant == "spiking" else {**pairs, "head_lif": "neuron/neuron"}


def heard(model, x, monkeypatch):
  """Spikes in all calls of neurons, and how many there could have been, one after another."""
  call = LIF.__call__

  def run(variables, x):
    spikes = []

    def listen(neuron, x, *args, mask=None, **options):
      y, v = call(neuron, x, *args, mask=mask, **options)
      frames = jnp.ones(y.shape[:2], bool) if mask is None else mask
      spikes.append((y.sum(where=frames[..., None]), frames.sum() * y.shape[-1]))
      return y, v

    with monkeypatch.context() as patch:
      patch.setattr(LIF, "__call__", listen)
      nnx.merge(graphdef, variables)(x)
    return spikes

  graphdef, variables = nnx.split(model)
  return [(float(spikes), int(most)) for spikes, most in jax.jit(run)(variables, x)]


@every_model
def test_rates_are_spikes_of_real_frames(variant, padding, monkeypatch):
  """Each row for itself, the second of which is shorter: frames count, not rows."""
  model, x, short = make(variant, padding), clips(), 7
  mask = np.arange(FRAMES)[None] < np.array([[FRAMES], [short]])
  rates = spike_rates(model, x, mask=mask)
  rows = [heard(model, x[:1], monkeypatch), heard(model, x[1:, :short], monkeypatch)]
  ours = list(names(variant, 2).values())
  assert sorted(rates) == sorted(ours) and [len(row) for row in rows] == [len(ours)] * 2
  for name, (first, second) in zip(ours, zip(*rows, strict=True), strict=True):
    expected = (first[0] + second[0]) / (first[1] + second[1])
    assert rates[name] == pytest.approx(expected, abs=1e-6), name
  assert len(set(rates.values())) > 5


def test_rates_of_scanned_layers_have_the_same_names():
  rates = spike_rates(make(), clips(), form="recurrent")
  for options in ({"scan_layers": True}, {"scan_layers": True, "remat": "full"}):
    assert spike_rates(make(**options), clips()) == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("case", ["ms_eval_24", "ms_eval_128", "eb_eval_24"])
def test_published_rates(case):
  meta = json.loads(str(PUBLISHED[f"{case}/meta"]))
  prefix = f"{case}/param/"
  params = {k.removeprefix(prefix): v for k, v in PUBLISHED.items() if k.startswith(prefix)}
  model = from_lmuformer(meta["config"], params)
  rates = spike_rates(model, PUBLISHED[f"{case}/in/x"].astype("float32"))
  pairs = names(model.variant, meta["config"]["depths"])
  assert meta["min_distance_to_threshold"] > 1e-5
  assert {theirs: round(rates[ours], 3) for theirs, ours in pairs.items()} == meta["spike_rate"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_model_stays_as_it_is(scan_layers):
  model, x = make(scan_layers=scan_layers), clips()
  before = nnx.split(nnx.clone(model))
  spike_rates(model, x)
  jax.jit(lambda x: model(x)[0])(x)  # evaluation writes nothing, or there would be an error
  after = nnx.split(model)
  assert after[0] == before[0]
  chex.assert_trees_all_equal(nnx.to_pure_dict(after[1]), nnx.to_pure_dict(before[1]))
  assert all((m.rate[...] == 0).all() for _, m in nnx.iter_graph(model) if isinstance(m, LIF))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_memory_that_nothing_is_written_to_is_told(scan_layers):
  model = make(scan_layers=scan_layers)
  layers = model.stack.layers
  norm = (layers if scan_layers else layers[1]).mixer.input.norm
  norm.bias[...] = norm.bias[...].at[-1].set(-100.0)
  with pytest.warns(UserWarning, match=r"^stack/layers/1/mixer/write_neuron never fires") as told:
    rates = spike_rates(model, clips())
  assert len(told) == 1 and told[0].filename == __file__
  assert rates["stack/layers/1/mixer/write_neuron"] == 0
  assert rates["stack/layers/0/mixer/write_neuron"] > 0


def test_one_channel_that_fires_is_enough():
  model = make(memory_channels=2)
  norm = model.stack.layers[0].mixer.input.norm
  norm.bias[...] = jnp.asarray([-100.0, 1.0])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert spike_rates(model, clips())["stack/layers/0/mixer/write_neuron"] > 0


def test_a_model_without_spikes_has_no_rates():
  with pytest.raises(ValueError, match="LMUFormer has no spiking neurons"):
    spike_rates(make("plain"), clips())


I, D, K, N, M, T = 2, 3, 4, 5, 6, 10  # inputs, width, classes, order, hidden units, frames
TINY = {
  "in_features": I, "d_model": D, "num_classes": K, "order": N, "mlp_ratio": M // D,
  "num_layers": 1, "theta": 4.0,
}  # fmt: skip


def tiny(variant, *, fold=False, **options):
  def build():
    model = LMUFormer(**{**TINY, **options}, variant=variant, rngs=nnx.Rngs(0))
    return fold_batch_norm(model) if fold else model

  return nnx.eval_shape(build)


def sums(told):
  return [sum(column) for column in zip(*told.layers.values(), strict=True)]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_energy_of_the_published_spiking_model(scan_layers):
  rates = {ours: (i + 1) / 100 for i, ours in enumerate(names("spiking_ms", 1).values())}
  told = energy(tiny("spiking_ms", scan_layers=scan_layers), rates, frames=T)
  folded = energy(tiny("spiking_ms", fold=True, scan_layers=scan_layers), rates, frames=T)
  # Neurons: four in the stem, then of input, memory's input, memory, hidden; two; head.
  hundredths = (
    (1 + 2 + 3 + 4) * 3 * D * D  # convolutions
    + 5 * D * 1 + 6 * N  # W_u, and Bbar u
    + 7 * N * D + 5 * D * D + 8 * D * D  # W_h of memory and input, W_o
    + 9 * D * M + 10 * M * D
  )  # fmt: skip
  real = 3 * I * D + N * N
  norms = D + D + N + D + D  # that no product comes before: stem, block, memory, block, head
  behind = 3 * D + 1 + D + D + M  # products: convolutions, W_u, W_h, W_o, first of the feed-forward
  assert sums(told) == pytest.approx([T * (real + norms + behind) + D * K, T * hundredths / 100])
  assert sums(folded)[0] == T * (real + norms) + D * K
  assert told.updates == T * (4 * D + D + 1 + N + D + D + M + D)
  assert told.joules == pytest.approx(sums(told)[0] * MAC + sums(told)[1] * ACCUMULATE)
  assert told.layers["head"] == (D * K, 0)
  assert told.layers["stack/layers/0/mixer/memory"] == pytest.approx((T * N * N, T * N * 0.06))
  other = energy(tiny("spiking_ms"), rates, frames=T, mac=2.0, accumulate=3.0)
  assert other.joules == pytest.approx(2 * sums(told)[0] + 3 * sums(told)[1])


def test_energy_counts_sums_of_spikes():
  """Residuals of the other spiking model: what a layer sees is the spikes of several."""
  rates = {ours: (i + 1) / 100 for i, ours in enumerate(names("spiking", 1).values())}
  told = energy(tiny("spiking", fold=True), rates, frames=T, form="parallel")
  stem, after = 4 + 5, 4 + 5 + 9
  hundredths = (
    (1 + 2 + 3 + 4) * 3 * D * D
    + stem * D * 1 + 6 * N * (T + 1) / 2  # of the memory half the frames, on average
    + 7 * N * D + stem * D * D + 8 * D * D
    + after * D * M + 10 * M * D
  )  # fmt: skip
  assert sums(told) == pytest.approx([T * (3 * I * D + N) + D * K, T * hundredths / 100])


def test_energy_of_a_plain_model_is_of_products():
  told = energy(tiny("plain", memory_channels=2), {}, frames=T)
  memory = 2 * N * N + 2 * N
  weights = 3 * I * D + 4 * 3 * D * D + 2 * D + (2 * N + D) * D + D * D + 2 * D * M
  norms = 4 * D + D + M + D
  assert sums(told) == [T * (weights + memory + norms) + D * K, 0]
  assert told.updates == 0


def test_energy_at_the_published_sizes():
  def figures(variant, rates):
    model = nnx.eval_shape(lambda: LMUFormer(variant=variant, rngs=nnx.Rngs(0)))
    return energy(model, rates, frames=128)

  plain, spiking = figures("plain", {}), figures("spiking_ms", 0.3)
  assert spiking.updates == 128 * 3585
  assert plain.joules / 128 == pytest.approx(7.7e-6, rel=0.01)
  assert spiking.joules / 128 == pytest.approx(2.1e-6, rel=0.01)


def test_energy_says_what_it_misses():
  with pytest.raises(ValueError, match="model is a RetNet, expected an LMUFormer"):
    retnet = nnx.eval_shape(lambda: RetNet(**ARCHITECTURES["retnet"].small, rngs=nnx.Rngs(0)))
    energy(retnet, {}, frames=T)
  with pytest.raises(ValueError, match="rates has no stem/neurons/0"):
    energy(tiny("spiking"), {}, frames=T)
  with pytest.raises(ValueError, match="form is 'chunkwise', expected recurrent or parallel"):
    energy(tiny("spiking"), 0.3, frames=T, form="chunkwise")
