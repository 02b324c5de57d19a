"""Audio made different in every step, on the device, from the step's own random numbers."""

import dataclasses

import jax
import jax.numpy as jnp

from ..layers.audio import FULL_SCALE, FrontEnd, take_slices

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What is done to clips before they are trained on, in this order; 0 leaves a part out.

  Attributes:
    gain: a random factor of the samples, up to so many decibels up or down.
    speed: a random factor of time about a clip's middle, from `1 / (1 + speed)` to `1 + speed`; its
      pitch changes too (Ko et al., Interspeech 2015). By linear interpolation.
    shift: in time, up to so many milliseconds either way; zeros come in, and what moves out at the
      beginning makes a clip as much shorter.
    mixup: probability that a clip is mixed with another of the batch, their shares from
      Beta(`mixup_alpha`, `mixup_alpha`), and their classes likewise (arXiv 1710.09412).
    noise: probability that noise is added, from `lowest_snr` to `highest_snr` decibels below the
      clip: of the data set's recordings, where it has some (`noise` in a batch), else with a random
      spectrum, from white to brown. Power counts at all frequencies; of the brownest noise 3 % of
      it is above 20 Hz, where mels begin.
    prefixes: probability that only the beginning of a clip is heard, at least `shortest_prefix`
      milliseconds of it, so that answers before its end are learnt too.
    frequency_masks, time_masks: so many stripes of features, of random widths below
      `frequency_width` features and `time_width` frames, are set to 0, the mean of log-mels as
      they are normalised by default (SpecAugment, arXiv 1904.08779).
  """

  gain: float = 0.0
  speed: float = 0.0
  shift: float = 0.0
  mixup: float = 0.0
  mixup_alpha: float = 10.0
  noise: float = 0.0
  lowest_snr: float = 0.0
  highest_snr: float = 20.0
  prefixes: float = 0.0
  shortest_prefix: float = 500.0
  frequency_masks: int = 0
  frequency_width: int = 0
  time_masks: int = 0
  time_width: int = 0

  def __post_init__(self):
    for name in ("mixup", "noise", "prefixes"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"augment.{name} is {getattr(self, name)}, expected a probability")
    for name in (
      *("gain", "speed", "shift", "shortest_prefix"),
      *("frequency_masks", "frequency_width", "time_masks", "time_width"),
    ):
      if getattr(self, name) < 0:
        raise ValueError(f"augment.{name} is {getattr(self, name)}, expected at least 0")
    if not self.mixup_alpha > 0:
      raise ValueError(f"augment.mixup_alpha is {self.mixup_alpha}, expected a positive number")
    if self.lowest_snr > self.highest_snr:
      raise ValueError(
        f"augment.lowest_snr is {self.lowest_snr}, expected at most highest_snr, {self.highest_snr}"
      )

  def samples(
    self, batch: Batch, targets: jax.Array, key: jax.Array, sample_frequency: float
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clips as they are heard this time, and what they are.

    Args:
      batch: `inputs` `[b, n]`, perhaps with `mask` `bool[b, n]`, true up to a clip's end, and
        `noise` `[b, n]`; integers are int16 samples.
      targets: probabilities of the classes, `[b, classes]`.
      key: of all that is random.
      sample_frequency: in hertz.

    Returns:
      Samples `[b, n]` in [-1, 1] or beyond, their mask, and the probabilities of the classes.
    """
    x = _scaled(batch["inputs"])
    (b, n), index = x.shape, jnp.arange(x.shape[1])[None]
    ends = jnp.full(b, n) if "mask" not in batch else jnp.sum(batch["mask"], axis=1)
    x = jnp.where(index < ends[:, None], x, 0)
    keys = iter(jax.random.split(key, 8))
    if self.gain:
      decibels = jax.random.uniform(next(keys), (b, 1), minval=-self.gain, maxval=self.gain)
      x = x * 10 ** (decibels / 20)
    if self.speed:
      most = jnp.log1p(self.speed)
      factor = jnp.exp(jax.random.uniform(next(keys), (b, 1), minval=-most, maxval=most))
      x = _interpolated(x, (index - n / 2) * factor + n / 2)
      ends = jnp.clip(jnp.ceil((ends - n / 2) / factor[:, 0] + n / 2), 1, n).astype(ends.dtype)
    if self.shift:
      most = int(self.shift * sample_frequency / 1000)
      by = jax.random.randint(next(keys), (b,), -most, most + 1)
      x = take_slices(jnp.pad(x, ((0, 0), (most, most))), most - by, n)
      ends = jnp.clip(ends + by, 1, n)
    if self.mixup:
      first, second, third = jax.random.split(next(keys), 3)
      other = jax.random.permutation(first, b)
      share = jax.random.beta(second, self.mixup_alpha, self.mixup_alpha, (b, 1), x.dtype)
      share = jnp.where(jax.random.bernoulli(third, self.mixup, (b, 1)), share, 1)
      x = share * x + (1 - share) * x[other]
      targets = share * targets + (1 - share) * targets[other]
      ends = jnp.where(share[:, 0] < 1, jnp.maximum(ends, ends[other]), ends)
    if self.noise:
      x = x + self._noise(x, ends, batch, next(keys))
    if self.prefixes:
      first, second = jax.random.split(next(keys))
      shortest = min(int(self.shortest_prefix * sample_frequency / 1000), n)
      stops = jax.random.randint(first, (b,), shortest, n + 1)
      cut = jax.random.bernoulli(second, self.prefixes, (b,))
      ends = jnp.where(cut, jnp.minimum(ends, stops), ends)
    return x, index < ends[:, None], targets

  def _noise(self, x, ends, batch, key):
    """Noise as loud as it is added; the power of a clip is that up to its end."""
    (b, n), keys = x.shape, jax.random.split(key, 4)
    if "noise" in batch:
      noise = _scaled(batch["noise"])[jax.random.permutation(keys[0], b)]
      noise = take_slices(jnp.tile(noise, 2), jax.random.randint(keys[1], (b,), 0, n), n)
    else:
      bins = n // 2 + 1
      slope = jax.random.uniform(keys[0], (b, 1), maxval=2)
      real, imaginary = jax.random.normal(keys[1], (2, b, bins))
      size = jnp.maximum(jnp.arange(bins), 1)[None] ** (-slope / 2)
      size = size.at[:, 0].set(0)
      noise = jnp.fft.irfft(jax.lax.complex(real * size, imaginary * size), n)
    snr = jax.random.uniform(keys[2], (b, 1), minval=self.lowest_snr, maxval=self.highest_snr)
    power = jnp.sum(x * x, axis=1) / jnp.maximum(ends, 1)
    of_noise = jnp.maximum(jnp.mean(noise * noise, axis=1), 1e-12)
    loudness = jnp.sqrt(power / of_noise)[:, None] * 10 ** (-snr / 20)
    return jnp.where(jax.random.bernoulli(keys[3], self.noise, (b, 1)), loudness * noise, 0)

  def features(self, x: jax.Array, key: jax.Array) -> jax.Array:  # [b, t, features]
    """Features with stripes of zeros."""
    keys = jax.random.split(key)
    for axis, number, width, own in (
      (2, self.frequency_masks, self.frequency_width, keys[0]),
      (1, self.time_masks, self.time_width, keys[1]),
    ):
      if number and width:
        first, second = jax.random.split(own)
        shape = (len(x), number, 1)
        widths = jax.random.randint(first, shape, 0, min(width, x.shape[axis]))
        begins = jax.random.uniform(second, shape) * (x.shape[axis] - widths + 1)
        begins = begins.astype(widths.dtype)
        index = jnp.arange(x.shape[axis])[None, None]
        hidden = ((index >= begins) & (index < begins + widths)).any(axis=1)
        x = jnp.where(jnp.expand_dims(hidden, 3 - axis), 0, x)
    return x


def heard(
  front_end: FrontEnd,
  augment: Augmentation,
  batch: Batch,
  targets: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The frames `[b, t, features]` of augmented clips, their mask and the classes' probabilities."""
  of_samples, of_features = jax.random.split(key)
  rate = front_end.analysis.sample_frequency
  x, mask, targets = augment.samples(batch, targets, of_samples, rate)
  frames, real, _ = front_end(x, mask=mask)
  return augment.features(frames, of_features), real, targets


def _scaled(x: jax.Array) -> jax.Array:
  scale = FULL_SCALE if jnp.issubdtype(x.dtype, jnp.integer) else 1
  return x.astype(jnp.float32) / scale


def _interpolated(x: jax.Array, at: jax.Array) -> jax.Array:  # [b, n], [b, n] -> [b, n]
  """The rows of `x` at places between samples, with zeros beyond."""
  x = jnp.pad(x, ((0, 0), (1, 1)))
  at = jnp.clip(at + 1, 0, x.shape[1] - 1)
  left = jnp.minimum(jnp.floor(at).astype(jnp.int32), x.shape[1] - 2)
  part = at - left
  return (1 - part) * jnp.take_along_axis(x, left, 1) + part * jnp.take_along_axis(x, left + 1, 1)
