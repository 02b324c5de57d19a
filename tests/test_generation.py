import jax
import numpy as np
import pytest
from flax import nnx

from triform.arch import RetNet, generate, generation, stream


@pytest.fixture(scope="module")
def model():
  return RetNet(
    vocab_size=50,
    d_model=32,
    num_layers=2,
    num_heads=2,
    value_dim=64,
    ffn_dim=32,
    chunk_size=8,
    scan_layers=False,
    rngs=nnx.Rngs(0),
  )


def prompt(length, rows=2):
  return np.random.default_rng(length).integers(0, 50, (rows, length))


@pytest.mark.parametrize("length", [1, 16, 17, 515])  # one, a full bucket, the next, two pieces
def test_greedy_tokens_are_those_of_the_whole_sequence(model, length):
  ids = prompt(length)
  new = generate(model, ids, max_new_tokens=4, temperature=0.0)
  logits, _ = model(np.concatenate([ids, new], axis=1), form="parallel")
  np.testing.assert_array_equal(new, np.argmax(logits[:, length - 1 : -1], axis=-1))


def test_a_scanned_model_generates_the_same(model):
  options = {"max_new_tokens": 5, "temperature": 0.0}
  scanned = RetNet(
    vocab_size=50, d_model=32, num_layers=2, num_heads=2, value_dim=64, ffn_dim=32,
    chunk_size=8, scan_layers=True, rngs=nnx.Rngs(0),
  )  # fmt: skip
  expected = generate(model, prompt(9), **options)
  np.testing.assert_array_equal(generate(scanned, prompt(9), **options), expected)


def test_sampling_is_reproducible_and_seeded(model):
  options = {"max_new_tokens": 12, "temperature": 1.5}
  first, again = (generate(model, prompt(5), seed=1, **options) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert (first != generate(model, prompt(5), seed=2, **options)).any()


def test_top_k_and_top_p_keep_to_the_likeliest(model):
  ids = prompt(6, rows=64)
  logits = np.asarray(model(ids)[0][:, -1], np.float64)
  ranks = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
  rows = np.arange(len(ids))
  token = generate(model, ids, max_new_tokens=1, temperature=2.0, top_k=3)[:, 0]
  assert set(ranks[rows, token]) == {0, 1, 2}

  probabilities = np.asarray(jax.nn.softmax(logits / 2.0, axis=-1))
  token = generate(model, ids, max_new_tokens=1, temperature=2.0, top_p=0.5)[:, 0]
  likelier = np.where(ranks < ranks[rows, token][:, None], probabilities, 0).sum(axis=-1)
  assert (likelier < 0.5).all() and (likelier > 0.3).any()


def test_tokens_come_one_by_one(model):
  tokens = stream(model, prompt(3)[0], max_new_tokens=3)
  assert next(tokens).shape == (1,)
  assert len(list(tokens)) == 2
  assert generate(model, prompt(3), max_new_tokens=0).shape == (2, 0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 51}, "vocab_size is 51"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
  ],
)
def test_settings_out_of_range_are_refused(model, options, message):
  with pytest.raises(ValueError, match=message):
    stream(model, prompt(3), **{"max_new_tokens": 1, **options})


def test_an_empty_prompt_is_refused(model):
  with pytest.raises(ValueError, match="prompt is empty"):
    stream(model, [], max_new_tokens=1)


@pytest.mark.parametrize("bad", [-1, 50])
def test_an_id_that_the_model_does_not_have_is_refused(model, bad):
  with pytest.raises(ValueError, match=rf"the prompt has id {bad}, expected ids in \[0, 50\)"):
    stream(model, [3, bad, 7], max_new_tokens=1)


def test_tokens_beyond_the_tokenizer_are_never_sampled(model):
  options = {"max_new_tokens": 20, "temperature": 3.0}
  assert generate(model, prompt(4, rows=8), **options).max() >= 40
  for temperature in (0.0, 3.0):
    options["temperature"] = temperature
    assert generate(model, prompt(4, rows=8), vocab_size=40, **options).max() < 40


def test_decoding_is_compiled_once(model):
  generation._decode.clear_cache()
  generate(model, prompt(7), max_new_tokens=20)
  assert generation._decode._cache_size() == 1
