"""What a training step lessens: a batch's cross entropy, of next tokens or of classes.

A loss is `loss(model, batch, *, form, rngs) -> (objective, sums)`: what gradients are taken of, and
what is reported, `loss` (the cross entropy, in nats) at least. All are sums over the batch's
`loss_mask`, which the training step divides by the number of its true elements. Of tokens, cross
entropy is computed in pieces, so that the logits of a batch never exist at once.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..interface import Form, SequenceModule
from .augmentation import Augmentation, Batch, heard

Objective = Literal["softmax", "sigmoid"]
Sums = tuple[jax.Array, dict[str, jax.Array]]  # the objective, and what is reported

# Logits of one piece on one device: 256 MB in float32.
MAX_LOGITS = 2**26


def next_token_loss(
  model: SequenceModule,
  batch: Batch,
  *,
  form: Form,
  rngs: nnx.Rngs,
  z_loss: float = 0.0,
  pieces: int = 1,
) -> Sums:
  """Of a language model on a batch of `data.packing`; see `cross_entropy`."""
  features, _ = model.encode(
    batch["inputs"], form=form, reset=batch["reset"], mask=batch["mask"], rngs=rngs
  )
  targets, mask = batch["targets"], batch["loss_mask"]
  objective, nats = cross_entropy(
    model.read_out, features, targets, mask, z_loss=z_loss, pieces=pieces
  )
  return objective, {"loss": nats}


def class_loss(
  model: SequenceModule,
  batch: Batch,
  *,
  form: Form,
  rngs: nnx.Rngs,
  label_smoothing: float = 0.0,
  objective: Objective = "softmax",
  augment: Augmentation | None = None,
) -> Sums:
  """Of a classifier on sequences `inputs` `[b, t, channels]` of the classes `targets` `[b]`.

  A `mask` `[b, t]` in the batch tells padding within sequences, `loss_mask` `[b]` rows that count.
  The objective is the cross entropy with targets of which `label_smoothing` is divided among all
  classes (arXiv 1512.00567, section 7): with `"softmax"` of one distribution, with `"sigmoid"` of
  every class by itself, on average over classes. `accuracy` is reported too. With `augment`,
  `inputs` are samples `[b, n]` of a model with a `front_end`, and the classes of mixed clips are
  shares; the likeliest is right.
  """
  if augment is None:
    logits, _ = model(batch["inputs"], form=form, mask=batch.get("mask"), rngs=rngs)
    targets = jax.nn.one_hot(batch["targets"], logits.shape[-1], dtype=logits.dtype)
  else:
    targets = jax.nn.one_hot(batch["targets"], model.head.out_features)
    frames, real, targets = heard(model.front_end, augment, batch, targets, rngs.augment())
    logits, _ = model(frames, form=form, mask=real, rngs=rngs)
    targets = targets.astype(logits.dtype)
  smooth = optax.smooth_labels(targets, label_smoothing)
  if objective == "softmax":
    nats, objectives = (optax.softmax_cross_entropy(logits, goal) for goal in (targets, smooth))
  else:
    nats, objectives = (
      optax.sigmoid_binary_cross_entropy(logits, goal).mean(axis=-1) for goal in (targets, smooth)
    )
  counts = batch["loss_mask"]
  correct = (jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)) & counts
  nats, objectives = (jnp.where(counts, a, 0).sum() for a in (nats, objectives))
  return objectives, {"loss": nats, "accuracy": correct.sum().astype(nats.dtype)}


def class_scores(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Cross entropy in nats, and whether the likeliest class is the target, of rows that count.

  Of logits `[b, classes]` both are `[b]`; 0 and false where the batch's `loss_mask` is false.
  """
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  correct = jnp.argmax(logits, axis=-1) == batch["targets"]
  return jnp.where(batch["loss_mask"], nats, 0), correct & batch["loss_mask"]


def cross_entropy(
  read_out: Callable[[jax.Array], jax.Array],
  features: jax.Array,  # [b, t, d]
  targets: jax.Array,  # int[b, t]
  mask: jax.Array,  # bool[b, t]
  *,
  z_loss: float = 0.0,
  pieces: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Sums over the tokens in `mask` of the objective and of the cross entropy, in nats.

      logits = read_out(features)     l = logsumexp(logits)
      cross entropy = l - logits[target]     objective = cross entropy + z_loss l^2

  The z-loss is that of PaLM (arXiv 2204.02311, section 5). Features are read out in `pieces` along
  time, and the gradient of a piece is formed together with its loss: nothing is computed twice,
  and of the logits only one piece is alive. `read_out` may close over parameters, which are
  differentiated too. The second sum has no gradient.
  """
  read_out, parameters = jax.closure_convert(read_out, _split(features, pieces)[0])
  return _cross_entropy(read_out, z_loss, pieces, parameters, features, targets, mask)


def count_pieces(batch_size: int, length: int, vocab_size: int, devices: int) -> int:
  """The fewest pieces, a divisor of `length`, of at most `MAX_LOGITS` logits on every device."""
  tokens = max(MAX_LOGITS * devices // (batch_size * vocab_size), 1)
  return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(read_out, z_loss, pieces, parameters, features, targets, mask):
  def add(sums, piece):
    x, targets, mask = piece
    logits = read_out(x, *parameters)
    objective, nats, *_ = _losses(logits, targets, mask, z_loss)
    return (sums[0] + objective, sums[1] + nats), None

  sums, _ = _over_pieces(add, (0.0, 0.0), features, targets, mask, pieces)
  return sums


def _forward(read_out, z_loss, pieces, parameters, features, targets, mask):
  def add(sums, piece):
    x, targets, mask = piece
    logits, pull = jax.vjp(read_out, x, *parameters)
    objective, nats, log_z = _losses(logits, targets, mask, z_loss)
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    weight = (1 + 2 * z_loss * log_z)[..., None]
    gradient = jnp.where(mask[..., None], jnp.exp(logits - log_z[..., None]) * weight - chosen, 0)
    x_gradient, *gradients = pull(gradient.astype(logits.dtype))
    return jax.tree.map(jnp.add, sums, (objective, nats, gradients)), x_gradient

  zeros = (0.0, 0.0, [jnp.zeros_like(p) for p in parameters])
  sums, x_gradients = _over_pieces(add, zeros, features, targets, mask, pieces)
  objective, nats, gradients = sums
  return (objective, nats), (gradients, x_gradients)


def _backward(read_out, z_loss, pieces, residuals, cotangents):
  gradients, x_gradients = jax.tree.map(lambda a: (a * cotangents[0]).astype(a.dtype), residuals)
  return gradients, x_gradients, None, None


_cross_entropy.defvjp(_forward, _backward)


def _losses(logits, targets, mask, z_loss):
  log_z = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nats = jnp.where(mask, log_z - chosen, 0).sum()
  return nats + z_loss * jnp.where(mask, log_z**2, 0).sum(), nats, log_z


def _split(a, pieces):
  """[b, t, ...] to [pieces, b, t / pieces, ...]."""
  return jnp.moveaxis(a.reshape(a.shape[0], pieces, -1, *a.shape[2:]), 1, 0)


def _over_pieces(add, sums, features, targets, mask, pieces):
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  sums = jax.tree.map(lambda a: jnp.asarray(a, dtype) if isinstance(a, float) else a, sums)
  if pieces == 1:
    return add(sums, (features, targets, mask))
  sums, outputs = jax.lax.scan(
    add, sums, tuple(_split(a, pieces) for a in (features, targets, mask))
  )
  if outputs is not None:
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(features.shape)
  return sums, outputs
