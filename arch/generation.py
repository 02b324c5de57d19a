"""Sampling from a language model: chunkwise prefill, then one recurrent step per token."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .layout import split_model
from .models.language_model import LanguageModel

PREFILL_PIECE = 512
SMALLEST_PIECE = 16


def stream(
  model: LanguageModel,
  ids: Any,  # int[b, t] or int[t]
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  vocab_size: int | None = None,
  seed: int = 0,
) -> Iterator[np.ndarray]:  # int32[b] each
  """Yields the continuation of `ids` token by token, in constant memory and time per token.

  Args:
    model: a causal language model; one with unrolled layers decodes fastest.
    ids: the prompt, at least one token (a document begins with the tokenizer's `bos_id`).
    max_new_tokens: how many tokens to yield.
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: sample among the `k` most likely tokens only.
    top_p: sample among the most likely tokens that together have this probability only.
    vocab_size: sample among so many of the first tokens only: those that a tokenizer can decode,
      where it has fewer than the model.
    seed: the same seed, prompt and model give the same tokens.

  Raises:
    NotImplementedError: for a model that is not causal.
    ValueError: for an empty prompt, an id that the model does not have, or a setting out of range.
  """
  if not model.causal:
    raise NotImplementedError(
      f"{type(model).__name__} sees whole sequences, which a next token would change; expected a "
      "causal language model"
    )
  ids = np.atleast_2d(np.asarray(ids, np.int32))
  if ids.shape[1] == 0:
    raise ValueError("the prompt is empty, expected at least one token (such as bos_id)")
  for worst in (ids.min(), ids.max()):
    if not 0 <= worst < model.vocab_size:
      raise ValueError(f"the prompt has id {worst}, expected ids in [0, {model.vocab_size})")
  most = model.vocab_size
  for name, value, fits, expected in (
    ("temperature", temperature, temperature >= 0, "at least 0"),
    ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
    ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0 and at most 1"),
    ("vocab_size", vocab_size, vocab_size is None or 1 <= vocab_size <= most, f"1 to {most}"),
    ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
  ):
    if not fits:
      raise ValueError(f"{name} is {value}, expected {expected}")
  return _stream(model, ids, max_new_tokens, (vocab_size, temperature, top_k, top_p), seed)


def generate(model: LanguageModel, ids: Any, **options: Any) -> np.ndarray:  # int32[b, n]
  """All of the continuation at once; arguments as in `stream`."""
  tokens = list(stream(model, ids, **options))
  rows = np.atleast_2d(np.asarray(ids)).shape[0]
  return np.stack(tokens, axis=1) if tokens else np.zeros((rows, 0), np.int32)


def _stream(model, ids, max_new_tokens, sampling, seed):
  graphdef, params, variables = split_model(model)
  weights = (params, variables)
  b, t = ids.shape
  prefill, _ = _programs(graphdef)
  decode, decode_weights = decoding_step(graphdef, weights, b)
  state = model.init_state(b, max_len=t + max_new_tokens)
  for start in range(0, t, PREFILL_PIECE):
    piece = ids[:, start : start + PREFILL_PIECE]
    real = piece.shape[1]
    padded = min(PREFILL_PIECE, max(SMALLEST_PIECE, 1 << (real - 1).bit_length()))
    piece = np.pad(piece, ((0, 0), (0, padded - real)))
    logits, state = prefill(weights, state, piece, np.int32(real))
  key = jax.random.key(seed)
  for n in range(max_new_tokens):
    token = _sample(logits, jax.random.fold_in(key, n), *sampling)
    if n + 1 < max_new_tokens:
      logits, state = decode(decode_weights, state, token)
    yield np.asarray(token)


def decoding_step(graphdef, weights, batch_size):
  """`decode(weights, state, token) -> (logits, state)` of one token a row, and its weights.

  Few rows times a matrix take XLA for CPU a third less time if the matrix is transposed, so there
  the weights are a copy with transposed matrices. `state` is donated.
  """
  _, decode = _programs(graphdef)
  if batch_size == 1 or jax.default_backend() != "cpu":
    return decode, weights
  params, variables = weights
  return functools.partial(decode, turned=True), (jax.jit(_turned)(params), variables)


@functools.lru_cache(maxsize=16)
def _programs(graphdef):
  """Prefill and decoding step; looked up once a stream, for a graph takes milliseconds to hash."""

  @functools.partial(jax.jit, donate_argnums=1)
  def prefill(weights, state, piece, real):
    model = nnx.merge(graphdef, *weights)
    mask = jnp.broadcast_to(jnp.arange(piece.shape[1])[None] < real, piece.shape)
    features, state = model.encode(piece, state, form="chunkwise", mask=mask)
    last = jax.lax.dynamic_index_in_dim(features, real - 1, axis=1)
    return model.read_out(last)[:, 0], state

  @functools.partial(jax.jit, donate_argnums=1, static_argnames="turned")
  def decode(weights, state, token, turned=False):
    params, variables = weights
    model = nnx.merge(graphdef, _turned(params) if turned else params, variables)
    logits, state = model(token[:, None], state, form="recurrent")
    return logits[:, 0], state

  return prefill, decode


def _turned(params):
  """Parameters with the matrices of linear layers transposed, but for those of scanned layers."""
  return jax.tree.map_with_path(
    lambda path, a: a.T if path[-1].key == "kernel" and a.ndim == 2 else a, params
  )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _sample(logits, key, vocab_size, temperature, top_k, top_p):
  """[b, vocab] -> int32[b]."""
  logits = logits[:, :vocab_size]
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k is not None:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p is not None:
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(jnp.where(likelier < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)
