"""Closed forms of work against the traced programs, and the programs against XLA's own count."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from counted import abstract, calls, closed, traced
from flax import nnx

from triform import kernels
from triform.arch import HyperMixerClassifier, RetNet, SequenceModule, build, flops
from triform.arch.flops import Call, Work, count, walk
from triform.arch.flops.report import report, table
from triform.arch.interface import FORMS
from triform.arch.models.registry import ARCHITECTURES
from triform.arch.training.config import default_config

# Every language model as it is small, and what else its count depends on.
NAMES = [
  name
  for name, known in ARCHITECTURES.items()
  if "triform" in known.model.__module__ and known.task == "language"
]
VARIANTS = {
  "transformer-rotary": {"position": "rotary", "activation": "gelu", "num_kv_heads": 1},
  "transformer-gated": {"gated": True, "norm": "rms", "position": "none", "window": 5},
  "transformer++-window": {"window": 5, "num_heads": 4, "num_kv_heads": 2, "dtype": "bfloat16"},
  "primer-ez": {"shared_qk": False, "norm_placement": "pre", "dropout": 0.1},
  "primer-searched": {
    "shared_qk": False, "input_floor": -0.57, "conv_scale": -1.12, "tanh": True,
    "output_bias": False,
  },
  "primer-plain": {"shared_qk": False, "num_taps": 0, "tie_embeddings": True, "activation": "silu"},
  "hybrid-rest": {"pattern": "retention(decay='gated'), mdha(shared_qk=True)", "num_layers": 3},
  "hypermixer-rows": {"normalizer": "row_rms", "position": "official", "dropout": 0.1},
  "hypermixer-mean": {"normalizer": "mean", "tied": True, "position": "none", "decay": "none"},
  "hypermixer-variance": {"normalizer": "variance", "dtype": "bfloat16", "use_bias": True},
  "hypermixer-none": {
    "normalizer": "none", "activation": "relu", "mixing_activation": "relu",
    "tie_embeddings": True,
  },
  "lmu-gelu": {"hidden_activation": "gelu", "activation": "relu", "tie_embeddings": True},
  "lmu-tanh": {"hidden_activation": "tanh", "channels": 1, "dropout": 0.1},
  "lmu-channels": {"channels": 3, "order": 6, "dtype": "bfloat16", "chunk_size": 3},
  "retnet-learned": {"decay": "learned"},
  "retnet-gated": {"decay": "gated"},
  "retnet-fla": {"dialect": "fla", "activation": "relu"},
  "retnet-grouped": {
    "num_heads": 4, "num_kv_heads": 2, "key_dim": 16, "value_dim": 12, "dtype": "bfloat16",
    "activation": "gelu", "tie_embeddings": True, "dropout": 0.1,
  },
}  # fmt: skip
SUBJECTS = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
# With chunks of 4 and blocks of 128: ragged, whole, and several blocks.
LENGTHS = {"parallel": (7, 300), "chunkwise": (7, 8), "recurrent": (7,)}


def options(name):
  architecture = name.partition("-")[0]
  small = ARCHITECTURES[architecture].small
  return {"architecture": architecture, **small, "scan_layers": False, **VARIANTS.get(name, {})}


def model(name, **changes):
  return abstract({**options(name), **changes})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_closed_forms_are_exact(name, form):
  subject = model(name)
  for length in LENGTHS[form]:
    for call in calls(length, form):
      assert closed(subject, call) == traced(subject, call), call


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_decoded_token_is_counted_exactly(name):
  call = Call(1, "recurrent", context=9)
  assert closed(model(name), call) == traced(model(name), call)


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_recomputation_is_counted_exactly(form, remat):
  for name in ("transformer", "primer", "hybrid", "lmu"):
    subject, call = model(name, remat=remat), Call(8, "parallel", training=True)
    assert closed(subject, call) == traced(subject, call), name
  subject, call = model("retnet-gated", remat=remat), Call(8, form, training=True)
  assert closed(subject, call) == traced(subject, call)
  again = count(subject, call).recompute
  assert again.mixing > 0 and again.logits == 0 and (again.matmul > 0) == (remat == "full")
  without = count(model("retnet-gated"), call)
  assert count(subject, call) == dataclasses.replace(without, recompute=again)


@pytest.mark.parametrize("form", FORMS)
def test_scanned_layers_share_only_what_does_not_depend_on_the_layer(form):
  subject = model("retnet", scan_layers=True)
  call = Call(8, form)
  assert closed(subject, call) == traced(subject, call)
  more = closed(subject, call._replace(training=True))
  less = traced(subject, call._replace(training=True))
  shared = more - less
  assert shared == Work(vector=shared.vector, transcendental=shared.transcendental)
  assert 0 <= shared.vector < 0.1 * more.vector


@pytest.mark.parametrize("heads", [2, 4])
def test_a_cpu_works_as_much_chunk_by_chunk(heads, monkeypatch):
  """What it has a program of its own for is counted by that of all other platforms."""
  sizes = ((2, 7, heads, 8), (2, 7, 2, 8), (2, 7, 2, 12), (heads,), (2, heads, 8, 12))
  arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]

  def loss(q, k, v, log_decay, state):
    results = kernels.retention(q, k, v, log_decay, state=state, form="chunkwise", chunk_size=4)
    return sum(map(jnp.sum, results))

  gradient = jax.grad(loss, argnums=range(5))
  elsewhere = walk(loss, *arrays), walk(gradient, *arrays)
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: cpu(*args))
  assert (walk(loss, *arrays), walk(gradient, *arrays)) == elsewhere


def test_causality_leaves_half_of_the_pairs():
  heads, key, value, layers, t = 2, 4, 8, 2, 10

  def mixing(form):
    call = Call(t, form, training=True, causal=True)
    counted = count(model("retnet"), call)
    assert counted.backward.mixing == 2 * counted.forward.mixing
    return counted.forward.mixing / (2 * layers * heads * t)

  assert mixing("parallel") == sum(range(1, t + 1)) / t * (key + value)
  assert mixing("recurrent") == 2 * key * value
  assert mixing("chunkwise") == (1 + 2 + 3 + 4) / 4 * (key + value) + 2 * key * value


@pytest.mark.parametrize("name", SUBJECTS)
def test_products_with_weights_are_two_operations_a_weight(name):
  subject = model(name)
  leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(subject, nnx.Param)))
  weights = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
  weights += subject.embedding.embedding.size if subject.head is None else 0
  forward = count(subject, Call(1, "recurrent")).forward
  assert forward.matmul + forward.logits == 2 * weights
  step = count(subject, Call(7, "parallel", training=True, causal=True))
  both = step.forward + step.backward  # products with tables have one gradient
  expected = 3 * (2 * weights + step.forward.convolution / 7) + both.mixing / 7
  assert flops.train_flops_per_token(options(name), 7, "parallel") == pytest.approx(expected)


# Wide enough for products to be most of the work, as in any model. One chunk or token is taken,
# because XLA counts the body of a loop once.
WIDE = {"d_model": 256, "ffn_dim": 512, "num_heads": 4, "num_layers": 1, "chunk_size": 64}
WIDE_OPTIONS = {
  "retnet": {"value_dim": 512},
  "transformer": {"position": "rotary"},
  "primer": {"position": "rotary"},
  "hybrid": {"num_layers": 2},
  # XLA counts an `erf` as 64 operations: wide enough that those of the hypernetworks do not matter.
  "hypermixer": {
    "activation": "relu", "mixing_activation": "relu", "mixing_dim": 64, "ffn_dim": 2048,
  },
  # XLA knows that the state of a first token is zero: small enough for its product not to matter.
  "lmu": {"order": 64, "theta": 64.0, "channels": 1},
}  # fmt: skip


@pytest.mark.parametrize(
  ("form", "length"), [("parallel", 128), ("chunkwise", 64), ("recurrent", 1)]
)
@pytest.mark.parametrize("name", NAMES)
def test_xla_counts_the_same_of_one_layer(name, form, length):
  small = options(name)
  wide = {key: WIDE.get(key, value) for key, value in small.items()} | WIDE_OPTIONS.get(name, {})
  layer = build(wide, rngs=nnx.Rngs(0)).stack
  graphdef, variables = nnx.split(layer)

  def run(variables, x):
    return nnx.merge(graphdef, variables)(x, form=form)

  x = jax.ShapeDtypeStruct((1, length, wide["d_model"]), jnp.float32)
  theirs = jax.jit(run).lower(variables, x).compile().cost_analysis()["flops"]
  ours = count(layer, Call(length, form)).forward
  assert theirs == pytest.approx(ours.flops + ours.vector, rel=0.02)


def spec(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_the_walk_counts_what_runs():
  def loop(a, b):
    step = jax.named_scope("mixing")(lambda c, _: (jnp.exp(c @ b), None))
    _unused = a @ b
    return jax.lax.scan(step, a, length=5)[0].sum()

  assert walk(loop, spec(2, 3), spec(3, 3)) == Work(
    mixing=5 * 2 * 2 * 3 * 3, transcendental=5 * 6, vector=6
  )


def test_the_walk_enters_what_has_a_gradient_of_its_own():
  @jax.custom_vjp
  def f(x):
    return jnp.sin(x)

  f.defvjp(lambda x: (f(x), x), lambda x, dy: (dy * jnp.cos(x) * 2,))
  assert walk(f, spec(5)) == Work(transcendental=5)
  assert walk(jax.grad(lambda x: f(x).sum()), spec(5)) == Work(transcendental=5, vector=10)


def test_the_walk_takes_the_dearest_branch():
  def either(which, x):
    return jax.lax.cond(which, jnp.sin, lambda x: x @ x, x)

  assert walk(either, jax.ShapeDtypeStruct((), bool), spec(4, 4)) == Work(matmul=2 * 4**3)


def test_the_walk_refuses_what_it_cannot_know():
  with pytest.raises(ValueError, match="turns an unknown number of times"):
    walk(lambda x: jax.lax.while_loop(lambda x: (x < 3).all(), lambda x: x + 1, x), spec(4))


def test_a_kernel_counts_as_it_estimates():
  from jax.experimental import pallas as pl

  def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2

  def kernel(x, **options):
    return pl.pallas_call(double, out_shape=spec(8, 128), **options)(x)

  estimate = pl.CostEstimate(flops=123, transcendentals=4, bytes_accessed=5)
  mixing = jax.named_scope("mixing")(lambda x: kernel(x, cost_estimate=estimate))
  assert walk(mixing, spec(8, 128)) == Work(mixing=123, transcendental=4)
  with pytest.raises(ValueError, match="has no cost_estimate"):
    walk(kernel, spec(8, 128))


def test_the_walk_counts_convolutions():
  def convolve(x, taps):
    return jax.lax.conv_general_dilated(x, taps, (1,), "VALID", feature_group_count=6)

  # Six channels by themselves, three taps, eight places.
  assert walk(convolve, spec(1, 6, 10), spec(6, 1, 3)) == Work(convolution=2 * 3 * 6 * 8)


def test_the_walk_counts_fourier_transforms():
  def filtered(x, gains):
    return jnp.fft.irfft(jnp.fft.rfft(x, 16) * jnp.fft.rfft(gains, 16), 16)

  # Four rows and one filter there, four back, nine frequencies.
  count = 9 * 2.5 * 16 * 4
  assert walk(filtered, spec(4, 7), spec(1, 7)) == Work(mixing=count, vector=6 * 4 * 9)
  whole = jax.named_scope("convolution")(lambda x: jnp.fft.fft(x).real)
  assert walk(whole, spec(3, 8)) == Work(mixing=3 * 5 * 8 * 3)
  assert walk(jnp.fft.rfft, spec(6)) == Work(mixing=39)  # 2.5 * 6 * log2(6) is 38.8


def test_the_walk_counts_complex_numbers():
  def product(a, b):
    return jax.lax.complex(a, a) @ jax.lax.complex(b, b) + 1

  assert walk(product, spec(2, 3), spec(3, 4)) == Work(matmul=8 * 2 * 3 * 4, vector=2 * 2 * 4)


def test_the_innermost_scope_tells_what_a_product_is_for():
  @jax.named_scope("mixing")
  def f(a, b):
    with jax.named_scope("matmul"):
      read = a @ b
    return a @ read

  assert walk(f, spec(4, 4), spec(4, 4)) == Work(matmul=2 * 4**3, mixing=2 * 4**3)


def test_a_module_without_closed_form_says_what_to_do():
  class Mystery(SequenceModule):
    pass

  with pytest.raises(NotImplementedError, match=r"Mystery has no closed form.*count.register"):
    count(Mystery(), Call(1, "recurrent"))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_activation_bytes_are_what_the_gradient_keeps(remat):
  subject, length = model("retnet", remat=remat, scan_layers=True), 8
  kept = flops.activation_bytes(subject, length, "chunkwise")
  inputs = 4 * length * 8 * (2 + 1)  # of both layers and the last norm
  products = 4 * length * 2 * (8 + 8 + 16 + 16 + 8 + 12 + 12)  # but for what leaves a layer
  known = inputs + 4 * length  # and the ids
  if remat == "full":
    assert kept == known
  elif remat == "dots":
    assert kept == known + products
  else:
    assert kept > known + products


def config(name="retnet", **changes):
  made = default_config(**{**options(name), **changes})
  made.seq_len = 16
  return made


def test_the_report_is_per_token_of_one_row():
  told = report(config())
  forward = count(model("retnet"), Call(16, "chunkwise", training=True)).forward
  assert told["forward_matmul_flops_per_token"] == (forward.matmul + forward.logits) / 16
  assert told["parameter_bytes"] == 4 * told["parameters"]
  assert told["state_bytes"] == 2 * (4 * (2 * 4 * 8) + 4)  # of each layer `kv`, and a position
  step = told["training_step"]["work"]
  assert step["computed"]["forward"]["mixing"] == forward.mixing / 16
  assert step["model"]["forward"]["mixing"] < forward.mixing / 16
  assert told["decoded_token"]["context"] == 16
  text = table(told)
  assert f"{told['parameters']:,} parameters" in text and "recompute" not in text
  assert "recompute, as computed" in table(report(config(remat="full")))


def test_the_report_of_a_legendre_memory():
  told = report(config("lmu"))
  assert told["state_bytes"] == 2 * 4 * 2 * 4  # of each layer two channels of order 4
  work = told["decoded_token"]["work"]["model"]["forward"]
  assert work["mixing"] == 2 * (2 * 2 * 4 * 4 + 2 * 2 * 4)
  assert "decoded token (recurrent, after 16)" in table(told)


def test_the_report_is_not_of_classifiers():
  made = default_config(architecture="lmu_classifier", **ARCHITECTURES["lmu_classifier"].small)
  with pytest.raises(ValueError, match=r"^lmu_classifier is a classifier.*flops\.count takes any"):
    report(made)


def test_a_model_that_hears_tells_of_a_second_of_audio(monkeypatch):
  monkeypatch.setattr(RetNet, "tokens_per_second", 50, raising=False)
  told = report(config())
  work = told["prefill"]["work"]["model"]["forward"]
  products = sum(work[kind] for kind in ("matmul", "convolution", "mixing", "logits"))
  assert told["flops_per_second_of_audio"] == pytest.approx(50 * products)
  assert "of a second of audio" in table(told)


def test_the_program_prints_the_table_and_writes_the_numbers(tmp_path):
  root = Path(__file__).parents[1]
  command = [sys.executable, "-m", "triform.arch.flops", "--config=configs/retnet_tiny.py"]
  command += ["--config.seq_len=32", f"--json={tmp_path / 'costs.json'}"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  told = json.loads((tmp_path / "costs.json").read_text())
  assert done.stdout == table(told) + "\n"
  # Per token: twice the 1,433,600 weights of the layers and the table as the head, 160 x 2,048.
  assert told["forward_matmul_flops_per_token"] == 2 * (1_433_600 + 160 * 2048)


CLASSIFIER = {
  "vocab_size": 32, "num_classes": 3, "d_model": 8, "num_layers": 2, "num_heads": 2,
  "mixing_dim": 12, "ffn_dim": 12, "chunk_size": 4, "scan_layers": False,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "options",
  [{}, {"tied": False, "position": "none"}, {"position": "standard", "use_bias": True}],
  ids=str,
)
def test_closed_forms_of_a_classifier_are_exact(options, form):
  model = nnx.eval_shape(
    lambda: HyperMixerClassifier(**{**CLASSIFIER, **options}, rngs=nnx.Rngs(0))
  )
  graphdef, params = nnx.split(model)
  for length in (3, 4, 7, 8):
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), bool)

    def logits(params, ids, mask=None):
      return nnx.merge(graphdef, params)(ids, form=form, mask=mask)[0]

    def gradient(params, ids, mask, cotangent):
      y, backward = jax.vjp(lambda params: logits(params, ids, mask), params)
      return y, backward(cotangent)

    counted = count(model, Call(length, form))
    assert counted.forward == walk(logits, params, ids)
    counted = count(model, Call(length, form, training=True))
    expected = walk(gradient, params, ids, mask, spec(1, 3))
    assert counted.forward + counted.backward == expected, length
    needed = count(model, Call(length, form, causal=True)).forward
    assert needed == count(model, Call(length, "parallel")).forward
