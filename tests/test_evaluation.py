"""The loss of a model on documents, against one computed by hand."""

import jax
import numpy as np
import pytest
from flax import nnx

from triform.arch import RetNet
from triform.arch.data.packing import Documents
from triform.arch.data.tokenizers import ByteTokenizer
from triform.arch.evaluation import evaluate

TOKENIZER = ByteTokenizer()
TEXTS = ("a text", "", "another, which is longer", "the last")


@pytest.fixture(scope="module")
def model():
  return RetNet(
    vocab_size=257, d_model=8, num_layers=1, num_heads=2, value_dim=8, ffn_dim=8, chunk_size=4,
    rngs=nnx.Rngs(0),
  )  # fmt: skip


def documents(trained=None):
  joined = Documents.from_arrays([TOKENIZER.encode(text) for text in TEXTS])
  return Documents(joined.tokens, joined.ends, trained)


def losses_by_hand(model):
  """Of every target in every document, run alone."""
  for text in TEXTS:
    ids = TOKENIZER.encode(text)
    logits, _ = model(np.concatenate([[TOKENIZER.bos_id], ids])[None], form="parallel")
    targets = np.concatenate([ids, [TOKENIZER.eos_id]])
    yield -np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(len(targets)), targets]


@pytest.mark.parametrize("seq_len", [pytest.param(3, marks=pytest.mark.slow), 7, 100])
def test_documents_are_seen_from_their_beginning_in_pieces_of_any_size(model, seq_len):
  losses = np.concatenate(list(losses_by_hand(model)))
  result = evaluate(model, documents(), TOKENIZER, seq_len=seq_len, batch_size=1)
  size = len("".join(TEXTS))
  assert (result["tokens"], result["bytes"]) == (size + len(TEXTS), size)
  np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(result["perplexity"], np.exp(losses.mean()), rtol=1e-5)
  np.testing.assert_allclose(result["bits_per_byte"], losses.sum() / np.log(2) / size, rtol=1e-5)


def test_tokens_that_are_only_read_do_not_count(model):
  trained = np.zeros(len("".join(TEXTS)), bool)
  trained[3:6] = True
  result = evaluate(model, documents(trained), TOKENIZER, seq_len=5, batch_size=1)
  losses = list(losses_by_hand(model))
  counted = np.concatenate([losses[0][3:6], *(loss[-1:] for loss in losses)])
  np.testing.assert_allclose(result["loss"], counted.mean(), rtol=1e-5)


def test_nothing_to_evaluate_on_is_refused(model):
  with pytest.raises(ValueError, match="there is no token to evaluate on"):
    evaluate(model, Documents.from_arrays([]), TOKENIZER)


def test_the_perplexity_of_a_hopeless_model_is_infinite(model):
  model = nnx.clone(model)
  model.head.kernel[...] *= 1e6
  assert evaluate(model, documents(), TOKENIZER, batch_size=1)["perplexity"] == np.inf
