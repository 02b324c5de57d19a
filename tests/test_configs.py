"""Every file in configs/ describes a model that can be built, of the size its docstring says."""

import importlib.util
import math
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from triform.arch import build, flops
from triform.arch.interface import FORMS
from triform.arch.layout import split_model
from triform.arch.training.optimizer import schedule

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load_module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def parameters(model_config):
  """Shapes only: nothing of the model is allocated."""
  options = {**model_config, "scan_layers": True}
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
  schedule(config.optimizer, config.total_steps)
  assert config.form in FORMS and config.eval.form in FORMS
  assert flops.train_flops_per_token(config.model, config.seq_len, config.form) > 0


def test_tiny_has_what_others_rely_on():
  module = load_module(next(path for path in CONFIGS if path.stem == "retnet_tiny"))
  config = module.get_config()
  assert config.model.dtype == "float32" and config.model.vocab_size >= 256
  for variant in module.VARIANTS:
    build(module.get_config(variant).model, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="variant is 'nope', expected one of torchscale, fla"):
    module.get_config("nope")
