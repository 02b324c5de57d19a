"""Every file in configs/ describes a model that can be built, of the size its docstring says."""

import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from triform.arch import build, flops
from triform.arch.interface import FORMS
from triform.arch.layout import split_model
from triform.arch.models import laid_out
from triform.arch.sharding import make_mesh
from triform.arch.training.config import LENGTHS, keep_lengths
from triform.arch.training.loop import count_steps
from triform.arch.training.optimizer import schedule
from triform.arch.training.program import make_program

STEPS = 784  # of a sequence, where it is not the configuration that tells
SAMPLES = 16000  # of a clip
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load_module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def parameters(model_config):
  """Shapes only: nothing of the model is allocated."""
  options = laid_out(model_config, scan_layers=True)
  model = nnx.eval_shape(lambda: build(options, rngs=nnx.Rngs(0)))
  return split_model(model)[1]


def count(params):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_tells_the_parameter_count(path):
  module = load_module(path)
  (told,) = re.findall(r"([\d,]+) parameters", module.__doc__)
  assert int(told.replace(",", "")) == count(parameters(module.get_config().model))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_consistent(path):
  config = load_module(path).get_config()
  schedule(config.optimizer, count_steps(config, math.ceil))
  assert config.form in FORMS and config.eval.form in FORMS
  length = config.get("seq_len", STEPS)
  assert flops.train_flops_per_token(config.model, length, config.form) > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_length_in_other_units_takes_the_place_of_the_files(path):
  for name in LENGTHS:
    config = load_module(path).get_config()
    if name in config:
      config[name] = length = config.batch_size * config.get("seq_len", 1) * 7
      keep_lengths(config, {"batch_size": 3, name: length})
      steps = 7 if name == "total_tokens" else length
      assert count_steps(config, lambda epochs: epochs) == steps


def batch_of(config):
  shape = dict.fromkeys(("inputs", "targets", "loss_mask"), (config.batch_size,))
  dtypes = {"inputs": "float32", "targets": "int32", "loss_mask": bool}
  if "seq_len" in config:
    dtypes |= {"inputs": "int32", "reset": bool, "mask": bool}
    shape = dict.fromkeys(dtypes, (config.batch_size, config.seq_len))
  elif config.model.get("front_end"):
    dtypes |= {"inputs": "int16", "mask": bool}
    shape |= dict.fromkeys(("inputs", "mask"), (config.batch_size, SAMPLES))
  else:
    shape["inputs"] += STEPS, config.model.in_features
  return {name: jax.ShapeDtypeStruct(shape[name], dtype) for name, dtype in dtypes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_training_step_compiles(path):
  """From shapes alone, at the size it has: nothing is allocated."""
  config = load_module(path).get_config()
  config.model = laid_out(config.model, scan_layers=True)  # as on an accelerator
  program = make_program(config, make_mesh(config.mesh), STEPS)
  compiled = program.step.lower(program.abstract, batch_of(config), jnp.int32(0)).compile()
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract))
  assert compiled.memory_analysis().argument_size_in_bytes >= state


VARIANTS = [
  (path, variant) for path in CONFIGS for variant in getattr(load_module(path), "VARIANTS", {})
]


@pytest.mark.parametrize(
  ("path", "variant"), VARIANTS, ids=lambda part: getattr(part, "stem", part)
)
def test_variants_are_of_one_size(path, variant):
  module = load_module(path)
  default, other = (count(parameters(module.get_config(*v).model)) for v in ((), (variant,)))
  assert abs(other / default - 1) < 0.01


@pytest.mark.parametrize("path", dict(VARIANTS), ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
  module = load_module(path)
  with pytest.raises(ValueError, match=f"is 'nope', expected one of {next(iter(module.VARIANTS))}"):
    module.get_config("nope")


SPEECH = [(path, name) for path in CONFIGS for name in getattr(load_module(path), "MODELS", {})]


@pytest.mark.parametrize(("path", "name"), SPEECH, ids=lambda part: getattr(part, "stem", part))
def test_models_of_speech_can_be_built(path, name):
  module = load_module(path)
  config = module.get_config(name)
  assert count(parameters(config.model)) > 0 and config.model.front_end.startswith("fbank")
  with pytest.raises(ValueError, match=r"'nope', expected one of \w+, "):
    module.get_config("nope")


def test_tiny_models_are_what_others_rely_on():
  for path in CONFIGS:
    config = load_module(path).get_config()
    if path.stem.endswith("_tiny") and "vocab_size" in config.model:
      assert config.model.dtype == "float32" and config.model.vocab_size >= 256
