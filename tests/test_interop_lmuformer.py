"""The LMUFormer importer against numbers of the published code.

`data/lmuformer.npz`: LMUFormer 5debadd, the plain and both spiking models, run in float64 with
gradients. `prefix` is what a model answers to the first n frames alone, `out_all_seq` to the
running mean of a whole clip's features, `final_m` and `final_v` are the memories and potentials
behind it, and `after` the running statistics that a call in training leaves.
"""

import functools
import json
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

from triform.arch.interface import FORMS
from triform.arch.interop.lmuformer import from_lmuformer, to_lmuformer
from triform.arch.layers.normed import fold_batch_norm
from triform.arch.layout import split_model, to_stacked
from triform.arch.mixers.lmu import LMU
from triform.arch.models.lmuformer import LMUFormer

ARRAYS = dict(np.load(Path(__file__).parent / "data/lmuformer.npz"))
CASES = [name.removesuffix("/out") for name in ARRAYS if name.endswith("/out")]
TRAIN = [case for case in CASES if "train" in case]
EVAL = [case for case in CASES if "train" not in case]
PREFIX = [case for case in CASES if f"{case}/prefix" in ARRAYS]
QUICK = {
  ("eval_40", "parallel"), ("ms_eval_24", "chunkwise"), ("eb_eval_24", "recurrent"),
  ("train_24", "parallel"),
}  # fmt: skip
MARGIN = 1e-5  # of potentials from thresholds, or rounding might make a spike of none
FRAMES = 6  # of a call whose mask chooses them


def every_run(cases):
  runs = [(case, form) for case in cases for form in FORMS]
  runs = [pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow) for run in runs]
  return pytest.mark.parametrize(("case", "form"), runs)


def group(case, prefix):
  prefix = f"{case}/{prefix}/"
  return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


def meta(case):
  return json.loads(str(ARRAYS[f"{case}/meta"]))


def published(case):
  """The published constructor's arguments, and the state dict."""
  return meta(case)["config"], group(case, "param")


@functools.lru_cache
def model_of(case, dtype, **options):
  with jax.enable_x64(dtype == "float64"):
    return from_lmuformer(*published(case), chunk_size=8, param_dtype=dtype, **options)


@functools.lru_cache
def compiled(case, dtype, method):
  graphdef, variables = nnx.split(model_of(case, dtype))

  @functools.partial(jax.jit, static_argnames="form")
  def call(*args, **options):
    return getattr(nnx.merge(graphdef, variables), method)(*args, **options)

  return call


def clip(case, dtype="float64"):
  return ARRAYS[f"{case}/in/x"].astype(dtype)


def tolerance(case, dtype, margin="min_distance_to_threshold"):
  if dtype == "float64":
    return 1e-12
  if meta(case)[margin] is None:
    return 1e-5
  assert meta(case)[margin] > MARGIN
  return 1e-6


def error(got, expected):
  got, expected = np.asarray(got), np.asarray(expected)
  assert got.shape == expected.shape
  return np.abs(got - expected).max() / (np.abs(expected).max() or 1)


@every_run(EVAL)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_published_logits(case, form, dtype):
  with jax.enable_x64(dtype == "float64"):
    logits, _ = compiled(case, dtype, "__call__")(clip(case, dtype), form=form)
    assert logits.dtype == dtype
    assert error(logits, ARRAYS[f"{case}/out"]) <= tolerance(case, dtype)


@pytest.mark.slow
def test_weights_are_held_in_the_widest_dtype_that_there_is():
  for dtype in ("float32", "float64"):
    with jax.enable_x64(dtype == "float64"):
      model = from_lmuformer(*published("eval_40"))
      logits, _ = model(clip("eval_40", dtype))
      assert logits.dtype == model.head.kernel.dtype == dtype


@pytest.mark.parametrize(
  ("case", "dtype"),
  [
    ("eval_40", "float64"),
    pytest.param("eval_40", "float32", marks=pytest.mark.slow),
    pytest.param("ms_eval_24", "float64", marks=pytest.mark.slow),
    pytest.param("ms_eval_24", "float32", marks=pytest.mark.slow),
  ],
)
def test_eagerly_with_the_names_of_parallel_training(case, dtype):
  """The model is in the dtype of its parameters."""
  config, params = published(case)
  params = {
    f"module.{name}": array.astype(dtype if array.dtype.kind == "f" else array.dtype)
    for name, array in params.items()
  }
  with jax.enable_x64(dtype == "float64"):
    logits, state = from_lmuformer(config, params)(clip(case, dtype), form="recurrent")
    assert {a.dtype for a in jax.tree.leaves(state)} == {np.dtype(dtype), np.dtype("uint32")}
    assert error(logits, ARRAYS[f"{case}/out"]) <= tolerance(case, dtype)


@every_run(EVAL)
def test_published_features_and_states(case, form):
  """Of the whole clip, whose last frames are pushed out by what follows it."""
  x = clip(case)
  with jax.enable_x64():
    model = model_of(case, "float64")
    encoded, state = compiled(case, "float64", "encode")(x, form=form)
    flushed = compiled(case, "float64", "flush")(state)
    features = jnp.concatenate([encoded, flushed], axis=1)[:, model.lookahead :]
    means = jnp.cumsum(features, axis=1) / np.arange(1.0, x.shape[1] + 1)[None, :, None]
    assert error(model.head(means), ARRAYS[f"{case}/out_all_seq"]) <= 1e-12
    memories, potentials = at_the_end(model, state, x.shape[1])
  for ours, theirs in ((memories, "final_m"), (potentials, "final_v")):
    expected = group(case, theirs)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
      found = ours[name] if ours[name].shape == array.shape else ours[name].T
      assert error(found, array) <= 1e-12, name


def at_the_end(model, state, length):
  """Memories and potentials by their published names, after the frames that look-ahead holds."""
  ahead, b = model.lookahead, len(state.count)
  index = np.uint32(np.tile(np.arange(length, length + ahead), (b, 1)))
  frames = (index, np.full(b, length, np.uint32))
  x, stem = model.stem(np.zeros((b, ahead, model.stem.in_features)), state.stem, frames=frames)
  x, blocks = model.stack(x, state.stack)
  names = {
    "plain": ([], [], []),
    "spiking_ms": (
      ["proj_lif", "proj_lif1", "proj_lif2", "proj_lif3"],
      ["prev_lif", "lmu.f_u", "lmu.f_m", "lmu.f_h"],
      ["fc1_lif", "fc2_lif"],
    ),
    "spiking": (
      ["proj_lif", "proj_lif1", "proj_lif2", "proj_lif3", "rpe_lif"],
      ["lmu.f_u", "lmu.f_m", "lmu.f_h", "proj_lif"],
      ["fc1_lif", "fc2_lif"],
    ),
  }
  of_stem, of_mixer, of_feed_forward = names[model.variant]
  memories = {}
  potentials = named("patch_embed", of_stem, stem.potentials)
  for i, block in enumerate(blocks):
    memories[f"block.{i}.attn.lmu"] = block.mixer.memory[:, 0]
    if of_mixer:
      potentials |= named(f"block.{i}.attn", of_mixer, block.mixer.potentials)
      potentials |= named(f"block.{i}.mlp", of_feed_forward, block.feed_forward)
  if model.neuron is not None:
    _, potentials["head_lif"] = model.neuron(x, state.neuron)
  return memories, potentials


def named(prefix, names, arrays):
  return {f"{prefix}.{name}": array for name, array in zip(names, arrays, strict=True)}


@pytest.mark.parametrize(
  ("case", "dtype"),
  [
    ("eval_40", "float64"),
    pytest.param("ms_eval_24", "float32", marks=pytest.mark.slow),
    pytest.param("eval_40", "float32", marks=pytest.mark.slow),
    pytest.param("ms_eval_24", "float64", marks=pytest.mark.slow),
  ],
)
def test_every_prefix_frame_by_frame(case, dtype):
  """Answered at once, and when the frames have been heard without an answer."""
  x, expected = clip(case, dtype), ARRAYS[f"{case}/prefix"]
  most = tolerance(case, dtype, "min_distance_in_prefix_runs")
  with jax.enable_x64(dtype == "float64"):
    answer, hear, read = (compiled(case, dtype, m) for m in ("__call__", "encode", "read_out"))
    state = silent = model_of(case, dtype).init_state(len(x))
    answers, later = [], []
    for i in range(x.shape[1]):
      logits, state = answer(x[:, i : i + 1], state, form="recurrent")
      _, silent = hear(x[:, i : i + 1], silent, form="recurrent")
      answers.append(logits)
      later.append(read(silent))
    assert error(np.stack(answers, axis=1), expected) <= most
    assert error(np.stack(later, axis=1), expected) <= most


@pytest.mark.parametrize("case", ["eval_40", pytest.param("ms_eval_24", marks=pytest.mark.slow)])
@given(data=st.data())
def test_every_prefix_however_cut(case, data):
  """Calls of any forms, with holes anywhere, that hear any number of frames of each row."""
  x, expected = clip(case), ARRAYS[f"{case}/prefix"]
  b, length, width = x.shape
  heard = np.zeros(b, int)
  with jax.enable_x64():
    model, call = model_of(case, "float64"), compiled(case, "float64", "__call__")
    state = model.init_state(b)
    for _ in range(data.draw(st.integers(1, 2 * length // FRAMES))):
      bits = data.draw(st.integers(0, 2 ** (b * FRAMES) - 1))
      mask = (bits >> np.arange(b * FRAMES) & 1).astype(bool).reshape(b, FRAMES)
      mask &= heard[:, None] + np.cumsum(mask, axis=1) <= length
      frames = np.full((b, FRAMES, width), np.nan)
      for row, real in enumerate(mask):
        frames[row, real] = x[row, heard[row] : heard[row] + real.sum()]
      heard += mask.sum(axis=1)
      logits, state = call(frames, state, form=data.draw(st.sampled_from(FORMS)), mask=mask)
      for row, count in enumerate(heard):
        answer = expected[row, count - 1] if count else model.head.bias[...]
        assert error(logits[row], answer) <= 1e-12
      np.testing.assert_array_equal(state.count, heard)


@every_run(PREFIX)
def test_a_row_answers_for_its_own_frames(case, form):
  """In a batch that is padded to its longest clip, whatever the padding holds."""
  x, expected = clip(case), ARRAYS[f"{case}/prefix"]
  for lengths in ((x.shape[1], 9), (2, x.shape[1] - 1)):
    mask = np.arange(x.shape[1])[None] < np.array(lengths)[:, None]
    with jax.enable_x64():
      call = compiled(case, "float64", "__call__")
      logits, _ = call(np.where(mask[..., None], x, np.nan), form=form, mask=mask)
    assert error(logits, np.stack([expected[i, n - 1] for i, n in enumerate(lengths)])) <= 1e-12


@every_run(EVAL)
def test_a_reset_begins_a_clip(case, form):
  """In one row after a piece of another clip, in the other at the first frame, from a state."""
  x = clip(case)
  b, length, _ = x.shape
  before = 7
  with jax.enable_x64():
    call = compiled(case, "float64", "__call__")
    stream = np.concatenate([x[:, -before:], x], axis=1)
    stream[1] = np.concatenate([x[1], x[1, :before]])
    mask = np.ones(stream.shape[:2], bool)
    mask[1, length:] = False
    reset = np.zeros_like(mask)
    reset[0, [2, before]] = reset[1, 0] = True
    reset[1, length + 1] = True  # of padding
    _, state = compiled(case, "float64", "encode")(x[:, :9], form="recurrent")
    logits, state = call(stream, state, form=form, reset=reset, mask=mask)
    assert error(logits, ARRAYS[f"{case}/out"]) <= 1e-12
    np.testing.assert_array_equal(state.count, [length] * b)
    assert error(compiled(case, "float64", "read_out")(state), ARRAYS[f"{case}/out"]) <= 1e-12


def train(case, form, x, mask=None, *, dtype="float64", **options):
  """Logits, and of `sum(logits * cot)` gradients by parameters and frames; running statistics."""
  model = from_lmuformer(*published(case), chunk_size=8, param_dtype=dtype, **options)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  cot = ARRAYS[f"{case}/cot"].astype(dtype)

  @jax.jit
  def run(params, x):
    def loss(params, x):
      # A copy: variables made outside the gradient's trace could not be written in it.
      model = nnx.merge(graphdef, params, jax.tree.map(lambda a: a, rest))
      logits, _ = model(x, form=form, mask=mask, rngs=nnx.Rngs(0))
      return jnp.sum(logits * cot), (logits, nnx.state(model, nnx.BatchStat))

    gradients, (logits, statistics) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return logits, *gradients, statistics

  logits, by_params, by_x, statistics = run(params, x)
  return logits, to_stacked(nnx.to_pure_dict(by_params)), by_x, stacked_statistics(statistics)


def stacked_statistics(statistics):
  named = to_stacked(nnx.to_pure_dict(statistics))
  return {name: leaf for name, leaf in named.items() if not name.endswith("rate")}


def assert_published_training(case, outcome, most=1e-12):
  """Gradients relative to the largest: those of biases before a batch norm are zero."""
  config, params = published(case)
  logits, by_params, by_x, statistics = outcome
  assert error(logits, ARRAYS[f"{case}/out"]) <= most
  assert error(by_x, ARRAYS[f"{case}/grad_in/x"]) <= most

  def read(changed):  # what is published is laid out like the parameters
    model = from_lmuformer(config, {**params, **changed}, param_dtype="float64")
    return split_model(model)[1], stacked_statistics(nnx.state(model, nnx.BatchStat))

  with jax.enable_x64():
    expected, after = to_stacked(read(group(case, "grad_param"))[0]), read(group(case, "after"))[1]
  largest = max(np.abs(np.asarray(leaf)).max() for leaf in expected.values())
  assert by_params.keys() == expected.keys()
  for name, leaf in expected.items():
    assert np.abs(np.asarray(by_params[name]) - np.asarray(leaf)).max() <= most * largest, name
  assert statistics.keys() == after.keys()
  for name, leaf in after.items():
    assert error(statistics[name], leaf) <= most, name


@every_run(TRAIN)
def test_published_training(case, form):
  with jax.enable_x64():
    outcome = train(case, form, clip(case), scan_layers=form == "parallel")
  assert_published_training(case, outcome)


@pytest.mark.parametrize("case", ["train_24", pytest.param("ms_train_20", marks=pytest.mark.slow)])
def test_padding_does_not_enter_training(case):
  """Neither the statistics nor the gradients, though it is anywhere and not finite."""
  x = clip(case)
  b, length, width = x.shape
  mask = np.ones((b, length + 3), bool)
  mask[0, -3:] = mask[1, [0, 5, 6]] = False
  padded = np.full((b, length + 3, width), np.nan)
  padded[mask] = x.reshape(-1, width)
  with jax.enable_x64():
    logits, by_params, by_x, statistics = train(case, "parallel", padded, mask, scan_layers=True)
  assert not by_x[~mask].any()
  assert_published_training(case, (logits, by_params, by_x[mask].reshape(x.shape), statistics))


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAIN)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_published_training_in_float32(case, scan_layers):
  tolerance(case, "float32")  # asserts the margin
  x = clip(case, "float32")
  outcome = train(case, "parallel", x, dtype="float32", scan_layers=scan_layers)
  assert_published_training(case, outcome, most=1e-4)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) for c in PREFIX])
def test_scanned_layers(case):
  with jax.enable_x64():
    model = model_of(case, "float64", scan_layers=True)
    graphdef, variables = nnx.split(model)
    logits, _ = jax.jit(lambda x: nnx.merge(graphdef, variables)(x))(clip(case))
  assert model.stack.scan and error(logits, ARRAYS[f"{case}/out"]) <= 1e-12


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_to_lmuformer_is_the_inverse(case, scan_layers):
  """Bit for bit, but for the buffers, which the published constructor makes."""
  config, params = published(case)
  told, back = to_lmuformer(from_lmuformer(config, params, scan_layers=scan_layers))
  config.pop("seq_len")  # of the file's inputs
  assert told == config
  buffers = {"A", "B", "H", "fft_H", "num_batches_tracked"}
  expected = {n: array for n, array in params.items() if n.rpartition(".")[2] not in buffers}
  assert back.keys() == expected.keys()
  for name, array in expected.items():
    assert back[name].dtype == array.dtype
    np.testing.assert_array_equal(back[name], array, err_msg=name)
  wrong = {name: array for name, array in params.items() if name != "head.bias"}
  with pytest.raises(ValueError, match=r"missing: head\.bias$"):
    from_lmuformer(config, wrong)


A, READ, OTHER = (
  "block.1.attn.lmu.A", "block.0.attn.lmu.W_h.weight", "block.1.attn.lmu.W_h.weight"
)  # fmt: skip


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda c, p: c.update(theta=128),
      r"A is not that of theta 128, but of theta 64(\.00|$)",
    ),
    (lambda c, p: c.pop("theta"), "A is not that of theta 128, but of theta 64"),
    (lambda c, p: p.update({A: np.eye(12)}), "A is not that of any theta"),
    (lambda c, p: p.pop("head.bias"), "the LMUFormer config; missing: head.bias"),
    (lambda c, p: p.update(extra=np.zeros(2)), "not expected: extra"),
    (lambda c, p: c.update(depths=1), "not expected: block.1.attn.lmu.W_h.bias, block.1"),
    (lambda c, p: c.update(depths=3), "missing: block.2.attn.lmu.W_h.bias, block.2"),
    (
      lambda c, p: c.update(num_classes=5),
      r"head.weight has shape \[4, 12\], expected \[5, 12\]|head.bias has shape \[4\], expected",
    ),
    (
      lambda c, p: c.update(in_channels=7),
      r"conv_layers.0.0.weight has shape \[12, 6, 3\], expected \[12, 7, 3\]",
    ),
    (lambda c, p: c.update(mlp_ratios=2), r"fc1_bn.bias has shape \[36\], expected \[24\]"),
    (
      lambda c, p: p.update({READ: p[READ][:, :12]}),
      r"W_h.weight has shape \[12, 12\], expected more columns than embed_dims 12",
    ),
    (
      lambda c, p: p.update({OTHER: p[OTHER][:, 1:]}),
      r"block.1.attn.lmu.W_h.weight of the input has shape \[12, 11\], expected \[12, 12\]",
    ),
    (lambda c, p: p.pop(READ), "block.0.attn.lmu.W_h.weight is missing or no matrix; the order of"),
    (lambda c, p: p.update({READ: np.zeros(3)}), "block.0.attn.lmu.W_h.weight is missing or no"),
    (lambda c, p: c.pop("depths"), "the config lacks depths"),
    (
      lambda c, p: c.update(model="lmu_rnn"),
      "model is 'lmu_rnn', which is not supported; expected 'lmu_rnn_conv1d' or 'slmu_rnn_ms_conv",
    ),
    (lambda c, p: c.update(test_mode="all_seq"), "test_mode is 'all_seq', which is not supported"),
    (lambda c, p: c.update(model="slmu_rnn_conv1d"), "missing: block.0.attn.lmu.bn_h.bias"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  config, params = published("eval_40")
  change(config, params)
  with pytest.raises(ValueError, match=message):
    from_lmuformer(config, params)


def test_cells_of_the_published_code():
  """Beside the models, the unit alone; its importer has tests of its own."""
  rng = np.random.default_rng(0)
  shapes = {"W_u.weight": (1, 3), "W_u.bias": (1,), "W_h.weight": (5, 7), "W_h.bias": (5,)}
  params = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
  sizes = {"input_size": 3, "hidden_size": 5, "memory_size": 4, "theta": 9}
  assert isinstance(from_lmuformer({"model": "LMUFFTCell", **sizes}, params), LMU)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"padding": "causal"}, "padding is 'causal', which cannot be converted; expected 'same'"),
    ({"memory_channels": 2}, "memory_channels is 2, which cannot be converted; expected 1"),
    ({"tau": 3.0}, "tau is 3.0, which cannot be converted; expected 2.0"),
    ({"learn_tau": True}, "learn_tau is True, which cannot be converted; expected False"),
    ({"reset_value": None}, "reset_value is None, which cannot be converted; expected 0.0"),
  ],
)
def test_what_the_published_code_has_not_is_refused(options, message):
  sizes = {"in_features": 3, "num_classes": 2, "d_model": 4, "mlp_ratio": 2, "theta": 9.0}
  made = {**sizes, "variant": "spiking_ms", "padding": "same", **options}
  with pytest.raises(ValueError, match=message):
    to_lmuformer(LMUFormer(**made, rngs=nnx.Rngs(0)))


def test_a_folded_model_is_refused():
  message = "folded is True, which cannot be converted; expected False"
  with pytest.raises(ValueError, match=message):
    to_lmuformer(fold_batch_norm(from_lmuformer(*published("train_24"))))


def test_another_module_is_refused():
  with pytest.raises(ValueError, match="model is a Linear, expected LMUFormer or LMU"):
    to_lmuformer(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
