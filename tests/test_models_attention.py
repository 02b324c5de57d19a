"""Transformer, Primer and hybrids beside the laws."""

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from triform.arch import FORMS, Attention, MultiDConvHeadAttention, build, generate, state_bytes
from triform.arch.data.packing import Documents
from triform.arch.data.tokenizers import ByteTokenizer
from triform.arch.evaluation import _restarted, evaluate
from triform.arch.layout import from_stacked, split_model, to_stacked
from triform.arch.models import complete, fields
from triform.arch.models.registry import ARCHITECTURES

SIZES = {"vocab_size": 11, "d_model": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 12}
NAMES = ("transformer", "transformer++", "primer", "hybrid")


def make(architecture, **changes):
  return build({"architecture": architecture, **SIZES, **changes}, rngs=nnx.Rngs(0))


def parameters(model):
  return to_stacked(split_model(model)[1])


@pytest.mark.parametrize(
  ("architecture", "change", "message"),
  [
    ("transformer", {"num_heads": 3}, "d_model 8 is not divisible by num_heads 3"),
    ("transformer", {"num_kv_heads": 3}, "num_heads 2 is not divisible by num_kv_heads 3"),
    ("transformer", {"position": "x"}, "position is 'x', expected rotary, relative or none"),
    ("transformer", {"norm": "x"}, "norm is 'x', expected layer or rms"),
    ("transformer", {"max_len": 0}, "max_len is 0, expected at least 1"),
    ("transformer++", {"key_size": 3}, "key size 3 per head is odd"),
    ("transformer++", {"window": 0}, "window is 0, expected at least 1"),
    ("primer", {"norm_placement": "x"}, "norm_placement is 'x', expected pre or pre_post"),
    ("primer", {"num_taps": 0}, "shared_qk needs convolutions, but num_taps is 0"),
    ("primer", {"num_taps": -1}, "num_taps is -1, expected at least 1"),
    ("hybrid", {"pattern": "retention attention"}, "expected text such as"),
    ("hybrid", {"pattern": ""}, "pattern is '', expected text such as"),
    ("hybrid", {"pattern": "attention(3)"}, "expected text such as"),
    ("hybrid", {"pattern": "attention, retentoin"}, "mixer 'retentoin'; did you mean 'retention'"),
    ("hybrid", {"pattern": "attention(windo=3)"}, "pattern 'attention.*unexpected.*'windo'"),
    ("hybrid", {"num_layers": 2, "pattern": "attention, " * 3}, "2 layers are less than the"),
  ],
)
def test_bad_options_are_refused(architecture, change, message):
  with pytest.raises(ValueError, match=message):
    make(architecture, **change)


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_all_options(name):
  model = {"architecture": name, **SIZES, "num_layers": 3}
  assert complete(ConfigDict(fields(model))) == complete(model)
  assert name in ARCHITECTURES


@pytest.mark.parametrize("name", NAMES)
def test_scanned_and_unrolled_start_alike_and_convert(name):
  options = {"pattern": "retention, attention"} if name == "hybrid" else {}
  models = [make(name, num_layers=5, scan_layers=scan, **options) for scan in (True, False)]
  scanned, unrolled = (split_model(model)[1] for model in models)
  stacked = to_stacked(unrolled)
  assert stacked.keys() == to_stacked(scanned).keys()
  for leaf, other in zip(to_stacked(scanned).values(), stacked.values(), strict=True):
    np.testing.assert_array_equal(leaf, other)
  jax.tree.map(np.testing.assert_array_equal, from_stacked(stacked, scanned), scanned)
  jax.tree.map(np.testing.assert_array_equal, from_stacked(stacked, unrolled), unrolled)


def test_layers_share_one_table_of_relative_positions():
  for name in ("transformer", "primer"):
    params = parameters(make(name))
    assert params["relative_bias/relative_bias"].shape == (2, 32)
    assert not any("mixer/bias" in leaf for leaf in params)


def test_a_layer_with_a_shared_table_asks_for_it():
  mixer = Attention(8, num_heads=2, position="relative", shared_bias=True, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="relative_bias is None, expected the shared bias"):
    mixer(np.ones((1, 2, 8), np.float32))


def test_convolutions_start_as_published():
  mixer = MultiDConvHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(mixer.value_conv.taps[:, 0], [0.5, 0.5 / 3, 0.5 / 3], rtol=1e-6)


def test_a_hybrid_compiles_one_repetition_and_the_rest():
  pattern = "retention, retention(decay='gated'), attention"

  def products(num_layers, scan):
    model = make("hybrid", num_layers=num_layers, pattern=pattern, scan_layers=scan)
    traced = jax.make_jaxpr(lambda ids: model(ids)[0])(np.zeros((1, 5), np.int32))
    return str(traced).count("dot_general")

  assert products(7, True) == products(10, True) < products(7, False) < products(10, False)
  assert products(8, True) > products(7, True)


def test_a_hybrid_has_its_layers_in_order():
  pattern = "retention, mdha(num_taps=2), attention(window=3, num_heads=4)"
  model = make("hybrid", num_layers=7, pattern=pattern, scan_layers=False)
  groups = [*model.stack.repeated.layers, *model.stack.rest.layers]
  kinds = [type(block.mixer).__name__ for group in groups for block in group.blocks]
  names = ["Retention", "MultiDConvHeadAttention", "Attention"]
  assert kinds == names * 2 + names[:1]
  assert model.stack.repeated.layers[1].blocks[2].mixer.num_heads == 4
  assert model.max_len == 2048 and not model.state_is_constant
  assert model.stack.repeated.layers[1].blocks[1].mixer.query_conv.num_taps == 2


def test_states_are_as_large_as_they_are_said_to_be():
  full, window = make("transformer", max_len=64), make("transformer++", window=4, num_kv_heads=1)
  assert (full.max_len, window.max_len) == (64, None)
  assert (full.state_is_constant, window.state_is_constant) == (False, True)
  counter, number = 4, 4
  assert state_bytes(full.init_state(3)) == 2 * 3 * (64 * 2 * 8 * number + counter)
  assert state_bytes(full.init_state(3, max_len=5)) == 2 * 3 * (5 * 2 * 8 * number + counter)
  assert state_bytes(window.init_state(3, max_len=5)) == 2 * 3 * (4 * 2 * 4 * number + counter)
  narrow = make("transformer", max_len=64, dtype="bfloat16")
  assert state_bytes(narrow.init_state(3)) == 2 * 3 * (64 * 2 * 8 * 2 + counter)


@pytest.mark.parametrize("name", NAMES)
def test_a_continuation_is_what_the_whole_text_gives(name):
  """Through a padded prefill and a cache that is just large enough."""
  model = make(name, num_layers=3, scan_layers=False)
  prompt = np.random.default_rng(0).integers(0, 11, (2, 5))
  new = generate(model, prompt, max_new_tokens=6, temperature=0.0)
  ids = np.concatenate([prompt, new], axis=1)
  logits, _ = jax.jit(model)(ids)
  np.testing.assert_array_equal(new, np.argmax(logits, axis=-1)[:, 4:-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["transformer", "primer"])
def test_a_full_cache_gives_nan_from_there_on_and_only_there(name, form):
  """What is NaN in one layer does not reach other tokens, or other documents, in the next."""
  model = make(name, chunk_size=4, scan_layers=False)
  ids = np.random.default_rng(0).integers(0, 11, (2, 9))
  reset = np.zeros(ids.shape, bool)
  reset[0, [0, 6]] = True
  run = jax.jit(lambda state: model(ids, state, form=form, reset=reset)[0])
  logits, expected = run(model.init_state(2, max_len=4)), run(None)
  full = np.zeros(ids.shape, bool)
  full[0, 4:6] = full[1, 4:] = True
  assert np.isnan(logits[full]).all()
  np.testing.assert_allclose(logits[~full], expected[~full], rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="9 tokens do not fit a cache of max_len 4"):
    model(ids, model.init_state(2, max_len=4), form=form)


@pytest.mark.parametrize("form", FORMS)
def test_long_documents_are_evaluated_in_pieces_that_fit(form):
  model = make("transformer", vocab_size=257, max_len=8, scan_layers=False, chunk_size=4)
  tokens = np.random.default_rng(0).integers(0, 256, 50)
  documents = Documents.from_arrays([tokens[:20], tokens[20:]])
  options = {"seq_len": 5, "batch_size": 2, "form": form}
  result = evaluate(model, documents, ByteTokenizer(), **options)
  assert result["tokens"] == 52 and np.isfinite(result["loss"])


def test_evaluation_begins_afresh_where_the_cache_is_full():
  reset, mask = np.zeros((2, 5), bool), np.ones((2, 5), bool)
  reset[1, 3], mask[0, 1] = True, False
  batches = [{"reset": reset, "mask": mask}, {"reset": ~mask, "mask": mask}]
  got = [batch["reset"].astype(int).tolist() for batch in _restarted(iter(batches), 3)]
  assert got == [[[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]], [[0, 1, 0, 1, 0], [0, 1, 0, 0, 1]]]
