"""The trainer on audio, from samples to a model that hears samples."""

import json
import signal

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from triform.arch import build, load
from triform.arch.data.tones import Tones
from triform.arch.evaluation import evaluate_classifier
from triform.arch.models.registry import find
from triform.arch.training import loop
from triform.arch.training.augmentation import Augmentation
from triform.arch.training.checkpoints import restore
from triform.arch.training.config import default_config
from triform.arch.training.loop import train
from triform.arch.training.losses import class_loss

STEPS = 8
AUGMENT = {
  **{"gain": 3.0, "speed": 0.1, "shift": 20.0, "mixup": 0.5, "noise": 0.5, "prefixes": 0.5},
  **{"frequency_masks": 1, "frequency_width": 4, "time_masks": 1, "time_width": 4},
}
MODEL = {
  **{"architecture": "lmuformer", "front_end": "fbank", "in_features": 16, "num_classes": 10},
  **{"d_model": 8, "num_layers": 1, "mlp_ratio": 1, "stem_channels": (4,), "order": 4},
  **{"theta": 50.0, "memory_channels": 2},
}


def config_of(**changes):
  config = default_config("tones", **MODEL)
  config.data.examples = 40
  config.form = config.eval.form = "parallel"
  config.batch_size, config.eval.batch_size, config.total_steps = 10, 5, STEPS
  config.log_every_steps, config.eval.every_steps, config.checkpoint.every_steps = 2, 4, 4
  config.compilation_cache = False
  config.augment.update(AUGMENT)
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "tones"
  assert train(config_of(), workdir)
  return workdir


def kept(workdir):
  return restore(workdir / "checkpoints", lambda saved: saved)


def test_a_model_of_samples_is_trained_and_loaded(run):
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  told = [record for record in records if "eval_loss" in record]
  assert [record["step"] for record in told] == [4, 8]
  model, labels = load(run)
  assert labels == Tones.labels and model.front_end.analysis.num_mel_bins == 16
  examples = Tones(examples=40).examples("validation")
  result = evaluate_classifier(model, examples, form="recurrent", batch_size=10)
  assert result["loss"] == pytest.approx(told[-1]["eval_loss"], rel=1e-4)


def test_stopped_and_resumed_it_ends_bit_for_bit_the_same(run, tmp_path, monkeypatch):
  original = loop._Meter.read

  def read(self, writer, step, batch, metrics):
    original(self, writer, step, batch, metrics)
    if step == 5:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Meter, "read", read)
    assert not train(config_of(), tmp_path)
  assert train(config_of(), tmp_path)
  chex.assert_trees_all_equal(kept(run), kept(tmp_path))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"data.examples": 50}, "data.examples: saved 40, given 50"),
    ({"model.front_end": "mfcc"}, "model.front_end: saved 'fbank', given 'mfcc'"),
  ],
)
def test_a_run_keeps_its_data_and_its_front_end(run, change, message):
  with pytest.raises(ValueError, match=message):
    train(config_of(**change), run)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model.num_classes": 12}, "model.num_classes is 12, expected that of tones, 10"),
    ({"objective": "hinge"}, "objective is 'hinge', expected one of softmax, sigmoid"),
    ({"augment.noise": 2.0}, "augment.noise is 2.0, expected a probability"),
    (
      {"model.front_end": "fbank(sample_frequency=8000.0)"},
      "model.front_end takes 8000 samples a second, expected those of the data, 16000",
    ),
    ({"model.front_end": "wave"}, "front_end 'wave' has the unknown name 'wave'"),
    ({"model.front_end": None}, "model.front_end is None, expected one for samples of tones"),
  ],
)
def test_what_cannot_be_is_told_before_training(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    train(config_of(**change), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_data_set_that_there_is_not_is_told():
  with pytest.raises(ValueError, match="data is 'tune', expected one of mnist, speech, tones"):
    default_config("tune", **MODEL)


BATCH = {
  "inputs": np.random.default_rng(0).integers(-999, 999, (4, 2000)).astype(np.int16),
  "targets": np.array([3, 0, 9, 3], np.int32),
  "loss_mask": np.array([True, True, True, False]),
}


def test_the_sigmoid_objective_by_hand():
  """The cross entropies of ten coins, on average."""
  model = build(MODEL, rngs=nnx.Rngs(0))
  call = {"form": "parallel", "rngs": None, "objective": "sigmoid", "label_smoothing": 0.2}
  objective, sums = class_loss(model, BATCH, **call)
  logits = np.asarray(model(BATCH["inputs"])[0], np.float64)[:3]
  shares, hot = 1 / (1 + np.exp(-logits)), np.eye(10)[BATCH["targets"][:3]]
  for value, goal in ((sums["loss"], hot), (objective, 0.8 * hot + 0.02)):
    expected = -(goal * np.log(shares) + (1 - goal) * np.log(1 - shares)).mean(axis=1).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_what_is_augmented_is_drawn_from_the_steps_key():
  model = build(MODEL, rngs=nnx.Rngs(0))

  def objective(seed, **options):
    call = {"form": "parallel", "rngs": nnx.Rngs(jax.random.key(seed)), **options}
    return float(class_loss(model, BATCH, **call)[0])

  augment = Augmentation(**AUGMENT)
  first, again, other = (objective(seed, augment=augment) for seed in (0, 0, 1))
  assert first == again != other
  assert objective(0) == pytest.approx(objective(1, augment=Augmentation()), rel=1e-5)


def test_rounding_to_bfloat16_leaves_the_front_end_in_float32():
  model = build({**MODEL, "dtype": "bfloat16"}, rngs=nnx.Rngs(0))
  assert model.front_end.dtype == np.float32 and find("lmuformer").task == "classification"
  logits, state = model(BATCH["inputs"])
  assert logits.dtype == np.float32 and state.front_end.tail.dtype == np.float32
