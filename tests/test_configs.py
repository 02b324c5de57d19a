"""Every file in configs/ describes a model that can be built, of the size its docstring says."""

import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from triform.arch import build, flops
from triform.arch.interface import FORMS
from triform.arch.layout import split_model
from triform.arch.sharding import make_mesh
from triform.arch.training.optimizer import schedule
from triform.arch.training.program import make_program

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


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_training_step_compiles(path):
  """From shapes alone, at the size it has: nothing is allocated."""
  config = load_module(path).get_config()
  config.model.scan_layers = True  # as on an accelerator
  program = make_program(config, make_mesh(config.mesh), config.total_steps)
  shape = (config.batch_size, config.seq_len)
  dtypes = {"inputs": "int32", "targets": "int32", "reset": bool, "mask": bool, "loss_mask": bool}
  batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
  compiled = program.step.lower(program.abstract, batch, jnp.int32(0)).compile()
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


def test_tiny_models_are_what_others_rely_on():
  for path in CONFIGS:
    if path.stem.endswith("_tiny"):
      config = load_module(path).get_config()
      assert config.model.dtype == "float32" and config.model.vocab_size >= 256


@pytest.mark.parametrize("variant", ["torchscale", "fla", "gated", "learned"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_products_with_weights_are_counted_exactly(variant, kv_heads, tied):
  module = load_module(next(path for path in CONFIGS if path.stem == "retnet_tiny"))
  model = {**module.get_config(variant).model, "num_kv_heads": kv_heads, "tie_embeddings": tied}
  params = parameters(model)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
  head = params["embedding"]["embedding"].size if tied else 0
  counted = flops.CLOSED_FORMS["retnet"](model, 64, "parallel")
  assert counted["projections"] + counted["logits"] == 2 * (kernels + head)


@pytest.mark.parametrize(
  ("architecture", "options"),
  [
    ("transformer", {}),
    ("transformer", {"num_kv_heads": 2, "key_size": 24, "gated": True}),
    ("transformer++", {"num_kv_heads": 1}),
    ("primer", {}),
    ("primer", {"shared_qk": False, "num_kv_heads": 2}),
    ("primer", {"shared_qk": False, "num_taps": 0}),
    ("hybrid", {"pattern": "retention(value_dim=24), attention", "num_layers": 5}),
    ("hybrid", {"pattern": "mdha(shared_qk=True, num_kv_heads=2), retention(decay='gated')"}),
  ],
)
def test_products_with_weights_of_attention_are_counted_exactly(architecture, options):
  sizes = {"vocab_size": 40, "d_model": 16, "num_layers": 3, "num_heads": 4, "ffn_dim": 20}
  model = {"architecture": architecture, **sizes, "tie_embeddings": True, **options}
  params = parameters(model)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
  taps = sum(
    leaf.size // leaf.shape[-2] * (2 * leaf.shape[-2] - 1)
    for path, leaf in leaves
    if path[-1].key == "taps"
  )
  counted = flops.CLOSED_FORMS[architecture](model, 64, "parallel")
  assert counted["projections"] == 2 * kernels
  assert counted["logits"] == 2 * params["embedding"]["embedding"].size
  assert counted.get("convolutions", 0) == taps


def test_attention_is_counted_by_what_causality_and_the_window_leave():
  config = {"d_model": 8, "num_heads": 2}
  t, per_pair = 10, 2 * 2 * 2 * 4  # multiply-adds, heads, scores and values, key size
  whole = flops.attention(config, t, "parallel")["mixing"]
  assert whole == per_pair * sum(range(1, t + 1)) / t
  near = flops.attention({**config, "window": 3}, t, "parallel")["mixing"]
  assert near == per_pair * (1 + 2 + 3 * 8) / t


def test_mixing_is_counted_by_form():
  model = {
    "d_model": 8, "num_heads": 2, "value_dim": 16, "ffn_dim": 8, "num_layers": 3, "vocab_size": 9,
    "chunk_size": 4,
  }  # fmt: skip
  key, value, heads, layers, t = 4, 8, 2, 3, 10

  def mixing(form):
    return flops.retnet(model, t, form)["mixing"] / (2 * layers * heads)

  pairs = sum(range(1, t + 1)) / t
  assert mixing("parallel") == pairs * (key + value)
  assert mixing("recurrent") == 2 * key * value
  assert mixing("chunkwise") == (1 + 2 + 3 + 4) / 4 * (key + value) + 2 * key * value


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
  assert flops.peak_flops(SimpleNamespace(device_kind=kind, platform="tpu")) == peak


@pytest.mark.parametrize(
  ("platform", "expected"), [("cpu", (1024, "float32")), ("rocm", (8192, "bfloat16"))]
)
def test_an_unknown_device_is_measured_at_what_it_is_good_at(platform, expected, monkeypatch):
  monkeypatch.setattr(flops, "_measured_flops", lambda device, n, dtype: (n, jnp.dtype(dtype).name))
  assert flops.peak_flops(SimpleNamespace(device_kind="new", platform=platform)) == expected


def test_the_peak_of_this_processor_is_measured():
  assert 1e8 < flops._measured_flops(jax.devices()[0], 256, jnp.float32) < 1e15
