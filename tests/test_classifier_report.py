"""What is said of classifiers, against counts by hand and calls on clips that are cut."""

import json
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws_subjects import awake
from ml_collections import ConfigDict
from tiny_run import run_program
from toy_classifier import ToyClassifier

from triform.arch import Encoder, SequenceModule, state_bytes
from triform.arch.accuracy import (
  calibration,
  class_logits,
  coloured_noise,
  confusion_matrix,
  false_alarms,
  measures,
  milliseconds_heard,
)
from triform.arch.audio_cost import INCLUDED, clip_energy, one_core, operations, sizes, speed
from triform.arch.classifier_report import classifier_report, draw, table
from triform.arch.evaluation import evaluate_classifier
from triform.arch.flops import Call, count
from triform.arch.folder import write_folder
from triform.arch.layers.audio import Analysis, FrontEnd
from triform.arch.layout import split_model, to_stacked
from triform.arch.models.lmuformer import LMUFormer
from triform.arch.spiking import energy, spike_rates
from triform.arch.training.config import default_config

ROOT = Path(__file__).parents[1]
PLACES_THREADS = hasattr(os, "sched_setaffinity")
RATE, SAMPLES, CLASSES = 2000, 800, 4  # 400 ms
FRONT_END = "fbank(sample_frequency=2000.0)"
WHOLE = "bidirectional_hypermixing(mixing_dim=4)"  # sees whole sequences
LABELS = ("_silence_", "yes", "no", "go")
SIZES = {
  "front_end": FRONT_END, "in_features": 6, "num_classes": CLASSES, "d_model": 8, "num_layers": 1,
}  # fmt: skip
MEMORY = {**SIZES, "mlp_ratio": 2, "order": 4, "theta": 6.0, "chunk_size": 4, "scan_layers": False}
BLOCKS = {**SIZES, "num_heads": 2, "ffn_dim": 8, "chunk_size": 4, "scan_layers": False}


def lmuformer(variant="plain", padding="causal"):
  return awake(LMUFormer(**MEMORY, variant=variant, padding=padding, rngs=nnx.Rngs(0)))


def encoder(pattern):
  return Encoder(**BLOCKS, pattern=pattern, rngs=nnx.Rngs(0))


MODELS = {
  "causal": lmuformer,
  "same": lambda: lmuformer(padding="same"),
  "spiking": lambda: lmuformer("spiking_ms", "same"),
  "attention": lambda: encoder("attention"),
  "whole": lambda: encoder(WHOLE),
}


def clips(number=5, masked=True):
  """Sounds that begin at different times, the second of them 130 ms long."""
  rng = np.random.default_rng(1)
  time = np.arange(SAMPLES) / RATE
  rows = []
  for i in range(number):
    x = np.sin(2 * np.pi * rng.uniform(100, 900) * time) * (time > 0.1 * (i % 3)) * 8000
    x = (x + rng.normal(size=SAMPLES) * 300).astype(np.int16)
    row = {"inputs": x, "targets": np.int32(i % CLASSES), "loss_mask": np.bool_(True)}
    rows.append(
      row | ({"mask": np.arange(SAMPLES) < (260 if i == 1 else SAMPLES)} if masked else {})
    )
  return rows


LOGITS = np.log([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.1, 0.4], [0.05, 0.9, 0.05]])
TARGETS = np.array([0, 0, 0, 1])


def test_measures_by_hand():
  told = measures(LOGITS, TARGETS, ("a", "b", "c"))
  assert told["loss"] == pytest.approx(-np.log([0.7, 0.3, 0.5, 0.9]).mean())
  assert (told["accuracy"], told["examples"]) == (0.75, 4)
  assert told["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
  assert told["recall"] == {"a": pytest.approx(2 / 3), "b": 1.0, "c": None}
  assert json.loads(json.dumps(told, allow_nan=False))["confusion"] == told["confusion"]
  with pytest.raises(ValueError, match="labels are 2, expected one for each of 3 logits"):
    measures(LOGITS, TARGETS, ("a", "b"))
  answers, targets = np.array([2, 0, 2]), np.array([1, 1, 2])
  expected = [[0, 0, 0], [1, 0, 1], [0, 0, 1]]
  assert confusion_matrix(answers, targets, 3).tolist() == expected


def test_calibration_by_hand():
  """Confidences .7, .6, .5 and .9, of which the second is wrong."""
  told = calibration(LOGITS, TARGETS)
  assert told["expected_error"] == pytest.approx((0.3 + 0.6 + 0.5 + 0.1) / 4)
  filled = {i: row for i, row in enumerate(told["bins"]) if row["examples"]}
  assert list(filled) == [7, 8, 10, 13] and len(told["bins"]) == 15
  assert filled[8] == {
    "above": pytest.approx(8 / 15), "up_to": pytest.approx(9 / 15), "examples": 1,
    "confidence": pytest.approx(0.6), "accuracy": 0.0,
  }  # fmt: skip
  assert told["bins"][0]["confidence"] is None
  two = calibration(LOGITS, TARGETS, bins=2)  # .5 is in the first, the rest average .73 and 2 / 3
  assert two["expected_error"] == pytest.approx(0.25 * 0.5 + 0.75 * (2.2 / 3 - 2 / 3))
  sure = calibration(np.array([[1e3, 0.0]]), np.array([0]))
  assert sure["bins"][-1]["examples"] == 1 and sure["expected_error"] == 0


@pytest.mark.parametrize(
  "name",
  [n if n in ("same", "whole") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_prefixes_are_calls_on_clips_that_are_cut(name):
  """Steps of 152.5 ms are no whole frames; the last piece is shorter; one clip ends early."""
  model, rows, step = MODELS[name](), clips(), 305
  logits, targets = class_logits(model, rows, step=step, form="parallel", batch_size=3)
  x, mask = (np.stack([row[key] for row in rows]) for key in ("inputs", "mask"))
  ends = [*range(step, SAMPLES, step), SAMPLES]
  assert logits.shape == (len(ends), len(rows), CLASSES) and targets.tolist() == [0, 1, 2, 3, 0]
  size = np.abs(logits).max()
  assert np.abs(np.diff(logits, axis=0)).max(axis=(1, 2)).min() > 1e-3 * size  # each adds something
  call = jax.jit(lambda x, mask: model(x, mask=mask)[0])
  for found, end in zip(logits, ends, strict=True):
    np.testing.assert_allclose(found, call(x[:, :end], mask[:, :end]), atol=1e-5 * size)
  for found in logits:  # the short one is heard whole, whatever the prefix
    np.testing.assert_allclose(found[1], logits[-1, 1], atol=1e-5 * size)


def test_the_curve_is_of_true_prefixes_and_counts_look_ahead():
  """What comes later changes no point, though the model looks 50 ms ahead."""
  model, rows = lmuformer(padding="same"), clips(masked=False)
  late = [row | {"inputs": np.where(np.arange(SAMPLES) < 400, row["inputs"], 0)} for row in rows]
  logits = [class_logits(model, r, step=200, form="parallel", batch_size=5) for r in (rows, late)]
  points = milliseconds_heard(model, *logits[0], 200, SAMPLES)
  shares = [(one.argmax(axis=-1) == logits[0][1]).mean() for one in logits[0][0]]
  assert points == [[100 * (i + 1), share] for i, share in enumerate(shares)]
  np.testing.assert_array_equal(logits[0][0][:2], logits[1][0][:2])
  changed = np.abs(logits[0][0][2] - logits[1][0][2])
  assert changed.max() > 1e-2 * np.abs(logits[0][0]).max()


def test_the_whole_is_what_evaluation_says():
  model, rows = lmuformer(), clips(7)
  told = measures(class_logits(model, rows, batch_size=3)[0][-1], np.arange(7) % 4, LABELS)
  expected = evaluate_classifier(model, rows, batch_size=3)
  assert told["loss"] == pytest.approx(expected.pop("loss"), rel=1e-5)
  assert {name: told[name] for name in expected} == expected
  with pytest.raises(ValueError, match="there is no example to evaluate on"):
    class_logits(model, [])
  with pytest.raises(ValueError, match="expected step >= 1, got 0"):
    class_logits(model, rows, step=0)


class Loud(SequenceModule):
  """Says "yes" to what is loud, `_silence_` to the rest; the surer, the louder."""

  causal = True

  def __init__(self):
    self.front_end = FrontEnd(Analysis(sample_frequency=100.0, num_mel_bins=1), dtype=jnp.float32)

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    level = jnp.sqrt(jnp.mean((jnp.asarray(x, jnp.float32) / 2**15) ** 2, axis=1))
    return jnp.stack([0 * level, 1000 * (level - 0.02)], axis=-1), ()


@pytest.fixture
def loud(recwarn):
  return Loud()


def test_false_alarms_are_confident_windows_of_noise(loud):
  rng = np.random.default_rng(0)
  quiet, noisy = (rng.normal(size=350) * level for level in (0.001, 0.1))  # a second is 100 samples
  told = false_alarms(
    loud, ("_silence_", "yes"), seconds=0, recordings=[quiet, noisy], batch_size=4
  )
  assert told["alarms"] == {"recordings": 3} and told["windows"] == {"recordings": 6}
  assert told["per_hour"] == 1800
  ints = (noisy * 2**15).astype(np.int16)
  told = false_alarms(loud, ("_silence_", "_yes_"), seconds=0, recordings=[ints])
  assert told["per_hour"] == 0  # no word was said
  told = false_alarms(loud, ("quiet", "yes"), seconds=0, recordings=[ints, quiet])
  assert told["per_hour"] == 3600  # any confident answer
  barely = [0.02 * np.sign(rng.normal(size=100))]  # about as likely as not
  assert false_alarms(loud, ("a", "b"), seconds=0, recordings=barely)["per_hour"] == 0
  sure = false_alarms(loud, ("a", "b"), seconds=0, recordings=barely, threshold=0.4)
  assert sure["per_hour"] == 3600
  told = false_alarms(loud, ("_silence_", "yes"), seconds=30)
  assert told["windows"] == {"white": 10, "pink": 10, "brown": 10}
  assert 0 < told["per_hour"] < 3600


def test_noise_that_cannot_be_is_refused(loud):
  for options, message in (
    ({"threshold": 1.0}, "threshold is 1.0, expected 0 to below 1"),
    ({"seconds": 4}, "seconds is 4, expected a multiple of 3"),
    ({"seconds": 0}, "there is no noise of a second to listen to"),
    ({"recordings": [np.zeros((2, 3))]}, r"a recording is float64\[2, 3\], expected samples"),
  ):
    with pytest.raises(ValueError, match=message):
      false_alarms(loud, ("a", "b"), **options)


def test_noise_has_its_colours_and_levels():
  noise = coloured_noise(20, 8000)
  again = coloured_noise(20, 8000)
  for i, (name, x) in enumerate(noise.items()):
    np.testing.assert_array_equal(x, again[name])
    x = x / 2**15
    level = 20 * np.log10(np.sqrt(np.mean(x**2, axis=1)))
    assert -61 < level.min() < -45 and -35 < level.max() < -19
    power = np.mean(np.abs(np.fft.rfft(x[level.argmax()])) ** 2, where=band(100, 200))
    ratio = power / np.mean(np.abs(np.fft.rfft(x[level.argmax()])) ** 2, where=band(1000, 2000))
    assert ratio == pytest.approx(10**i, rel=0.3), name


def band(low, high):
  return np.isin(np.arange(4001), np.arange(low, high))


def test_costs_of_a_plain_model_are_those_counted_elsewhere():
  model = lmuformer()
  own = operations(model, SAMPLES)
  frames, seconds = 38, SAMPLES / RATE
  call = Call(SAMPLES, "recurrent", causal=True)
  front_end = count(model.front_end, call).forward.flops / 2
  norms = frames * (4 * 8 + 8 + 16 + 8)  # of the stem, the memory and the feed-forward
  products = count(model, call).forward.flops / 2 - front_end
  assert own["multiply_accumulates"] * seconds == pytest.approx(products + norms)
  assert own["front_end"] * seconds == pytest.approx(front_end)
  assert own["accumulates"] == 0
  told = sizes(model, SAMPLES)
  assert told["state_bytes"] == state_bytes(model.init_state(1))
  assert told["parameters"] == sum(a.size for a in jax.tree.leaves(split_model(model)[1]))


def test_costs_of_a_spiking_model_are_by_its_spikes():
  model, rows = lmuformer("spiking_ms", "same"), clips()
  report = classifier_report(model, rows, LABELS, form="parallel", every=400.0, noise=0, rounds=0)
  x, mask = (np.stack([row[key] for row in rows]) for key in ("inputs", "mask"))
  rates = spike_rates(model, x, mask=mask)
  assert report["spikes"] == {"rates": pytest.approx(rates), "examples": len(rows)}
  told = energy(model, rates, frames=38)
  macs, accumulates = (sum(column) for column in zip(*told.layers.values(), strict=True))
  own, seconds = report["cost"]["operations_per_second"], SAMPLES / RATE
  assert own["multiply_accumulates"] * seconds == pytest.approx(macs)
  assert own["accumulates"] * seconds == pytest.approx(accumulates) and accumulates > 0
  assert report["energy"] == {
    **clip_energy(model, SAMPLES, rates), "joules_per_clip": pytest.approx(told.joules),
    "frames": 38, "updates": told.updates, "included": INCLUDED,
  }  # fmt: skip
  assert report["cost"]["lookahead_ms"] == 50
  assert report["cost"]["state_bytes"] == state_bytes(model.init_state(1))
  assert "false_alarms" not in report and "speed" not in report["cost"]
  assert "uJ a clip of 38 frames" in table(report) and "accumulates (front end" in table(report)


@pytest.mark.parametrize("pattern", ["retention", WHOLE])
def test_costs_of_other_models_are_products(pattern):
  model = encoder(pattern)
  causal = pattern == "retention"
  call = Call(SAMPLES, "recurrent" if causal else "parallel", causal=causal)
  products = count(model, call).forward.flops - count(model.front_end, call).forward.flops
  own = operations(model, SAMPLES)
  assert own["multiply_accumulates"] * SAMPLES / RATE == pytest.approx(products / 2)
  assert (sizes(model, SAMPLES)["state_bytes"] > 0) == causal


def test_time_is_taken():
  model = lmuformer(padding="same")
  told = speed(model, SAMPLES, rounds=1, batch_size=2)
  stream = told["stream"]
  for name in ("silent", "answering"):
    assert 0 < stream[name]["median"] <= stream[name]["percentile_95"]
  assert stream["real_time_factor"] == stream["answering"]["median"] / 1e4
  assert told["clips"]["batch_size"] == 2 and told["clips"]["seconds_per_second"] > 0
  assert told["cores"] == (1 if PLACES_THREADS else os.cpu_count())


@pytest.mark.skipif(not PLACES_THREADS, reason="only Linux lets a process place its threads")
def test_on_one_core_threads_go_back_to_theirs():
  before, seen = os.sched_getaffinity(0), []
  with one_core() as cores:
    thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert cores == 1 and seen == [os.sched_getaffinity(0)] and len(seen[0]) == 1
  assert os.sched_getaffinity(0) == before


def test_a_classifier_without_audio_has_only_what_makes_sense(tmp_path):
  model = ToyClassifier(steps=5, num_classes=3, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  rows = [{"inputs": rng.normal(size=(5, 1)), "targets": np.int32(i % 3)} for i in range(4)]
  rows = [row | {"inputs": row["inputs"].astype(np.float32)} for row in rows]
  told = classifier_report(model, rows, ("a", "b", "c"), form="parallel", batch_size=3)
  assert set(told) == {
    "loss", "accuracy", "interval", "examples", "recall", "confusion", "calibration", "labels",
    "cost",
  }  # fmt: skip
  assert told["cost"] == {"parameters": 5 * 16 + 2 * 16 + 16 * 3 + 3, "state_bytes": 0}
  assert "ms heard" not in table(told) and "parameters" in table(told)
  pytest.importorskip("matplotlib")
  draw(told, tmp_path / "small.png")
  assert (tmp_path / "small.png").stat().st_size > 5000


@pytest.mark.parametrize("classes", [12, 35])
def test_pictures_of_many_classes(tmp_path, classes):
  pytest.importorskip("matplotlib")
  told = measures(np.eye(classes), np.arange(classes), [f"word{i}" for i in range(classes)])
  told |= {"labels": list(told["recall"]), "milliseconds_heard": [[100.0, 0.2], [1000.0, 1.0]]}
  draw(told, tmp_path / "picture.png")
  assert (tmp_path / "picture.png").stat().st_size > 20000


def test_eval_tells_all_of_it(tmp_path):
  options = {
    **MEMORY, "architecture": "lmuformer", "front_end": "fbank", "num_classes": 10,
    "in_features": 10,
  }  # fmt: skip
  model = LMUFormer(
    **{name: value for name, value in options.items() if name != "architecture"}, rngs=nnx.Rngs(0)
  )
  config = default_config("tones", **options)
  config.data.examples, config.eval.batch_size, config.eval.form = 80, 20, "parallel"
  config.compilation_cache = False
  params, variables = split_model(model)[1:]
  tensors = to_stacked({"params": params, "variables": variables})
  labels = ("ae", "ai", "au", "ea", "ia", "iu", "oi", "io", "ua", "ui")
  write_folder(
    tmp_path / "model", config=ConfigDict(config), tensors=tensors, vocabulary=labels, step=1
  )
  pytest.importorskip("matplotlib")
  done = run_program(
    tmp_path, str(ROOT / "eval.py"), "--workdir=model", "--json=out.json", "--picture=out.png"
  )
  assert done.returncode == 0, done.stderr
  told = json.loads((tmp_path / "out.json").read_text())
  assert (told["examples"], told["split"], told["form"]) == (20, "test", "parallel")
  assert told["milliseconds_heard"][0][0] == 100
  assert told["milliseconds_heard"][-1] == [1000, told["accuracy"]]
  assert np.sum(told["confusion"]) == 20 and list(told["recall"]) == list(labels)
  assert {"interval", "calibration", "false_alarms_per_hour", "energy"} <= set(told)
  assert told["cost"]["speed"]["stream"]["real_time_factor"] > 0
  for line in ("recall", "calibration", "false alarms", "ms heard", "real time"):
    assert f"\n{line}  " in done.stdout
  assert (tmp_path / "out.png").stat().st_size > 5000
