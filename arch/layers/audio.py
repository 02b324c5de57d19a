"""Kaldi's log-mel features and cepstra of audio, whole or as it comes."""

import dataclasses
import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..calls import parse_calls
from ..interface import SequenceModule, check_call, restart_rows, state_dtype

FLOOR = float(np.finfo(np.float32).eps)  # of a mel bin's power, before the logarithm
FULL_SCALE = 2**15  # of int16 samples

WINDOWS = {
  "hanning": lambda n: np.hanning(n),
  "hamming": lambda n: np.hamming(n),
  "povey": lambda n: np.hanning(n) ** 0.85,
  "rectangular": np.ones,
}

# AudioSet's mean and twice the standard deviation, with which AST and LMUFormer scale log-mels.
MEAN, SCALE = -6.845978, 2 * 5.5654526
NUM_CEPSTRAL_BINS = 23  # Kaldi's mel bins of cepstra


@dataclasses.dataclass(frozen=True)
class Analysis:
  """How frames are taken from samples and what is computed of each; see `fbank` and `mfcc`."""

  sample_frequency: float = 16000.0
  num_mel_bins: int = 128
  frame_length: float = 25.0
  frame_shift: float = 10.0
  window_type: str = "hanning"
  preemphasis_coefficient: float = 0.97
  low_freq: float = 20.0
  high_freq: float = 0.0
  num_ceps: int | None = None
  cepstral_lifter: float = 22.0

  def __post_init__(self):
    if not 0 < self.sample_frequency < math.inf:
      raise ValueError(f"sample_frequency is {self.sample_frequency}, expected a number of hertz")
    if self.num_mel_bins < 1:
      raise ValueError(f"num_mel_bins is {self.num_mel_bins}, expected at least 1")
    if self.window_type not in WINDOWS:
      known = ", ".join(WINDOWS)
      raise ValueError(f"window_type is {self.window_type!r}, expected one of {known}")
    for name, samples, least in (
      ("frame_length", self.window, 2),
      ("frame_shift", self.shift, 1),
    ):
      if samples < least:
        raise ValueError(
          f"{name} is {getattr(self, name)} ms, {samples} samples at {self.sample_frequency} Hz, "
          f"expected at least {least}"
        )
    if self.shift > self.window:
      raise ValueError(
        f"frame_shift is {self.frame_shift} ms, expected at most frame_length, "
        f"{self.frame_length} ms"
      )
    nyquist = self.sample_frequency / 2
    if not 0 <= self.low_freq < self.highest <= nyquist:
      raise ValueError(
        f"low_freq is {self.low_freq} and high_freq {self.high_freq}, expected "
        f"0 <= low_freq < high_freq <= {nyquist} Hz, or high_freq below {nyquist} Hz by at most 0"
      )
    if self.num_ceps is not None and not 1 <= self.num_ceps <= self.num_mel_bins:
      raise ValueError(
        f"num_ceps is {self.num_ceps}, expected 1 to num_mel_bins={self.num_mel_bins}"
      )

  @property
  def window(self) -> int:
    """Samples of a frame."""
    return int(self.sample_frequency * self.frame_length / 1000)

  @property
  def shift(self) -> int:
    """Samples from one frame to the next."""
    return int(self.sample_frequency * self.frame_shift / 1000)

  @property
  def fft_size(self) -> int:
    """The next power of two."""
    return 1 << (self.window - 1).bit_length()

  @property
  def highest(self) -> float:
    """The upper end of the mel filters in hertz."""
    return self.high_freq if self.high_freq > 0 else self.sample_frequency / 2 + self.high_freq

  @property
  def num_features(self) -> int:
    return self.num_mel_bins if self.num_ceps is None else self.num_ceps

  def num_frames(self, samples: int) -> int:
    """Frames that are complete after so many samples."""
    return max(0, (samples - self.window) // self.shift + 1)

  def filters(self) -> np.ndarray:  # float64[fft_size / 2 + 1, num_mel_bins]
    """Triangles of height 1, equally wide on the mel scale; see `fbank`."""

    def mel(hertz):
      return 1127 * np.log1p(np.asarray(hertz) / 700)

    low, high = mel(self.low_freq), mel(self.highest)
    left, centre, right = (
      low + (high - low) * (np.arange(self.num_mel_bins) + i) / (self.num_mel_bins + 1)
      for i in range(3)
    )
    bins = mel(np.arange(self.fft_size // 2) * self.sample_frequency / self.fft_size)[:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.pad(triangles, ((0, 1), (0, 0)))  # the last bin, at half the rate, is in none

  def empty_filters(self) -> tuple[int, ...]:
    """The mel filters between two bins of the spectrum, which always are at the floor."""
    return tuple(np.flatnonzero(~self.filters().any(axis=0)).tolist())

  def cepstra(self) -> np.ndarray:  # float64[num_mel_bins, num_ceps]
    """The orthonormal cosine transform (DCT-II), liftered."""
    m, n = np.arange(self.num_mel_bins)[:, None] + 0.5, np.arange(self.num_ceps)
    transform = np.sqrt(2 / self.num_mel_bins) * np.cos(np.pi / self.num_mel_bins * m * n)
    transform[:, 0] = np.sqrt(1 / self.num_mel_bins)
    if self.cepstral_lifter == 0:
      return transform
    lifter = self.cepstral_lifter
    return transform * (1 + lifter / 2 * np.sin(np.pi * n / lifter))

  def features(self, frames: jax.Array) -> jax.Array:  # [..., window] to [..., num_features]
    """Of frames of samples, in their dtype."""
    dtype = frames.dtype
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def block(frames):
      frames = frames - frames.mean(axis=-1, keepdims=True)
      before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
      frames = frames - jnp.asarray(self.preemphasis_coefficient, dtype) * before
      window = jnp.asarray(WINDOWS[self.window_type](self.window), dtype)
      spectrum = jnp.fft.rfft(frames * window[None], self.fft_size)
      power = spectrum.real**2 + spectrum.imag**2
      features = jnp.log(jnp.maximum(product(power, jnp.asarray(self.filters(), dtype)), FLOOR))
      if self.num_ceps is not None:
        features = product(features, jnp.asarray(self.cepstra(), dtype))
      return features

    rows = frames.reshape(-1, self.window)
    size = rows_at_once()
    blocks = jnp.pad(rows, ((0, -len(rows) % size), (0, 0))).reshape(-1, size, self.window)
    features = jax.lax.map(block, blocks).reshape(-1, self.num_features)
    return features[: len(rows)].reshape(*frames.shape[:-1], self.num_features)


def rows_at_once() -> int:
  """Frames in a program of one shape, whatever the call's.

  Transforms and products of other shapes round differently, and the same frame is to give the same
  bits in any call. On a CPU so few are faster than all at once, too.
  """
  return 8 if jax.default_backend() == "cpu" else 1024


def fbank(
  samples: jax.Array,  # [b, n]
  *,
  sample_frequency: float = 16000.0,
  num_mel_bins: int = 128,
  frame_length: float = 25.0,
  frame_shift: float = 10.0,
  window_type: str = "hanning",
  preemphasis_coefficient: float = 0.97,
  low_freq: float = 20.0,
  high_freq: float = 0.0,
) -> jax.Array:  # [b, frames, num_mel_bins]
  """Logarithms of the power in mel bands, frame by frame, as Kaldi computes them.

      f <- f - mean(f)        f[k] <- f[k] - c f[k - 1], f[-1] = f[0]        f <- f * window
      log max(sum_b w[i, b] |rfft(f)[b]|^2, 2^-23)

  With W = frame_length, S = frame_shift in samples, frame t is samples [t S, t S + W), and there
  are `1 + (n - W) // S` of them, or none; the transform is as long as the next power of two. The
  filters w are triangles of height 1 between neighbours of `num_mel_bins + 2` equally spaced points
  of `1127 ln(1 + f / 700)`. (The Kaldi Speech Recognition Toolkit, ASRU 2011; names, and energies,
  dither and warping left out, as torchaudio's `compliance.kaldi.fbank`.) Tables are computed in
  float64, all else in the dtype of the samples, but at least float32. It can be differentiated; a
  frame gives the same bits in any call under `jit`.

  Args:
    samples: in the scale given; Kaldi's is that of int16, torchaudio's usually [-1, 1].
    sample_frequency: in hertz.
    num_mel_bins: so many that a filter lies between two bins of the transform give a constant
      there; see `Analysis.empty_filters`.
    frame_length: W in milliseconds.
    frame_shift: S in milliseconds.
    window_type: "hanning", "hamming", "povey" (Kaldi's default) or "rectangular", symmetric.
    preemphasis_coefficient: c.
    low_freq: where the filters begin, in hertz.
    high_freq: where they end; at most 0, from half the rate on.

  Raises:
    ValueError: for an option that cannot be, or samples of another shape.
  """
  options = dict(locals())
  return _analyse(options.pop("samples"), Analysis(**options))


def mfcc(
  samples: jax.Array,  # [b, n]
  *,
  num_ceps: int = 13,
  num_mel_bins: int = NUM_CEPSTRAL_BINS,
  cepstral_lifter: float = 22.0,
  **options: Any,
) -> jax.Array:  # [b, frames, num_ceps]
  """Mel-frequency cepstra, as Kaldi computes them without an energy.

      c = sum_i dct[i, n] fbank_i        c_n (1 + L / 2 sin(pi n / L))

  with the orthonormal DCT-II and the lifter L, 0 for none.

  Args:
    samples: as of `fbank`.
    num_ceps: coefficients kept, at most `num_mel_bins`.
    num_mel_bins: of the log-mels.
    cepstral_lifter: L.
    **options: of `fbank`.

  Raises:
    ValueError: as `fbank`.
  """
  sizes = {"num_ceps": num_ceps, "num_mel_bins": num_mel_bins}
  return _analyse(samples, Analysis(cepstral_lifter=cepstral_lifter, **sizes, **options))


def _analyse(samples: jax.Array, analysis: Analysis) -> jax.Array:
  if jnp.ndim(samples) != 2:
    raise ValueError(f"samples have shape {list(jnp.shape(samples))}, expected [batch, samples]")
  x = jnp.asarray(samples)
  x = x.astype(state_dtype(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32))
  return analysis.features(_cut(x, analysis, analysis.num_frames(x.shape[1])))


def _cut(x: jax.Array, analysis: Analysis, frames: int) -> jax.Array:
  """Samples `[b, n]` to the first `frames` frames `[b, frames, window]`."""
  index = np.arange(frames)[:, None] * analysis.shift + np.arange(analysis.window)
  return x[:, index]


class FrontEndState(NamedTuple):
  """The end of what was heard."""

  tail: jax.Array  # [b, window - 1], the last samples, zeros before the first
  held: jax.Array  # int32[b], how many of them are of the frame to come


class FrontEnd(SequenceModule):
  """Samples to normalised features: `frames, real, state = front_end(samples, state)`.

      (f - mean) / scale        with f = fbank or mfcc of the samples

  Frames `[b, frames, num_features]` come when their last sample does: those that a call completes
  are first, and `real` `bool[b, frames]` is true at them. There are `ceil(n / shift)` of them in a
  call of n samples, or at the start of a document only those that n samples can complete, but at
  least one. The state is the end of the samples; however a document is cut, its frames have the
  same bits. A feature of a mel filter without a bin of the spectrum is 0.

  Args:
    analysis: how.
    mean, scale: of the features; the default is AST's, for log-mels of samples in [-1, 1].
    dtype: of the samples and features, at least float32.

  Samples are floats in [-1, 1], or int16.

  Warns:
    UserWarning: of mel filters without a bin.
  """

  def __init__(
    self, analysis: Analysis, *, mean: float = MEAN, scale: float = SCALE, dtype: Any = jnp.float32
  ):
    if not scale > 0:
      raise ValueError(f"scale is {scale}, expected a positive number")
    self.analysis, self.mean, self.scale = analysis, mean, scale
    self.dtype = state_dtype(dtype)
    if empty := analysis.empty_filters():
      effect = (
        "their features are 0" if analysis.num_ceps is None else "all cepstra see their floor"
      )
      warnings.warn(
        f"{len(empty)} of {analysis.num_mel_bins} mel filters ({', '.join(map(str, empty))}) have "
        f"no bin of the transform of {analysis.fft_size} samples; {effect}: fewer mel bins have "
        "none",
        stacklevel=2,
      )

  @property
  def shift(self) -> int:
    """Samples from one frame to the next."""
    return self.analysis.shift

  def num_frames(self, samples: int, continued: bool) -> int:
    """Of a call with so many samples, from a state or not; not all of them are real."""
    if continued:
      return -(-samples // self.shift)
    return max(1, self.analysis.num_frames(samples))

  def init_state(self, batch_size, *, max_len=None):
    return FrontEndState(
      jnp.zeros((batch_size, self.analysis.window - 1), self.dtype),
      jnp.zeros(batch_size, jnp.int32),
    )

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    """One document to a row: of a `reset`, what comes before the last in its row is not heard."""
    check_call(x, form, reset, mask)
    if jnp.ndim(x) != 2:
      raise ValueError(f"x has shape {list(x.shape)}, expected samples [batch, time]")
    x = jnp.asarray(x)
    if x.dtype != jnp.int16 and not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"x is {x.dtype}, expected int16, or floats in [-1, 1]")
    x = x.astype(self.dtype) / (FULL_SCALE if x.dtype == jnp.int16 else 1)
    (b, n), analysis = x.shape, self.analysis
    first = self.init_state(b)
    if reset is not None:
      state, mask = forget(first if state is None else state, first, reset, mask)
    counts = jnp.full(b, n, jnp.int32)
    if mask is not None:
      x, counts = _compact(x, jnp.asarray(mask)), jnp.sum(mask, axis=1, dtype=jnp.int32)
    tail_size, held = analysis.window - 1, jnp.zeros(b, jnp.int32)
    frames = self.num_frames(n, state is not None)
    before = first.tail
    if state is not None:
      before, held = state
    joined = jnp.concatenate([before, x], axis=1)
    tail = take_slices(joined, counts, tail_size)
    length = (frames - 1) * analysis.shift + analysis.window
    heard = jnp.pad(joined, ((0, 0), (0, length)))
    if state is None:
      heard = heard[:, tail_size : tail_size + length]
    else:
      heard = take_slices(heard, tail_size - held, length)
    held = held + counts
    complete = jnp.maximum(0, (held - analysis.window) // analysis.shift + 1)
    features = (analysis.features(_cut(heard, analysis, frames)) - self.mean) / self.scale
    if analysis.num_ceps is None and (empty := analysis.empty_filters()):
      features = features.at[..., np.array(empty)].set(0)
    real = jnp.arange(frames)[None] < complete[:, None]
    return features, real, FrontEndState(tail, held - complete * analysis.shift)


def make_front_end(text: str | None, num_features: int, dtype: Any) -> FrontEnd | None:
  """The front end that a model's option names, `"fbank(frame_shift=20.0)"`; `None` is none.

  Names are `fbank` and `mfcc` with their arguments, and `mean` and `scale` of `FrontEnd`, which are
  0 and 1 for `mfcc`, whose default is 23 mel bins as in Kaldi.

  Args:
    text: the option `front_end`.
    num_features: as many mel bins, or cepstra.
    dtype: of the model.

  Raises:
    ValueError: for any other text, or arguments that cannot be.
  """
  if text is None:
    return None
  example = "fbank or mfcc(num_mel_bins=40)"
  calls = parse_calls(text, ("fbank", "mfcc"), option="front_end", kind="name", example=example)
  if len(calls) > 1:
    raise ValueError(f"front_end is {text!r}, expected one call, such as {example}")
  ((name, options),) = calls
  if name == "fbank":
    scaling, of_model = {"mean": MEAN, "scale": SCALE}, {"num_mel_bins": num_features}
    of_model |= {"num_ceps": None, "cepstral_lifter": Analysis.cepstral_lifter}
  else:
    scaling, of_model = {"mean": 0.0, "scale": 1.0}, {"num_ceps": num_features}
    options = {"num_mel_bins": NUM_CEPSTRAL_BINS, **options}
  scaling = {key: options.pop(key, default) for key, default in scaling.items()}
  try:
    return FrontEnd(Analysis(**of_model, **options), **scaling, dtype=dtype)
  except TypeError as error:  # an argument that there is not, is the model's, or is no number
    raise ValueError(f"front_end {text!r}: {error}") from error


def forget(state, first, reset, mask):
  """The state and the mask by which only what follows the last `reset` of a row is heard."""
  reset = jnp.asarray(reset)
  mask = jnp.ones(reset.shape, bool) if mask is None else jnp.asarray(mask)
  index = jnp.arange(reset.shape[1])[None]
  last = jnp.max(jnp.where(reset & mask, index, -1), axis=1)
  return restart_rows(state, first, last >= 0), mask & (index >= last[:, None])


def take_slices(x: jax.Array, starts: jax.Array, size: int) -> jax.Array:
  """Of every row the `size` elements from its start on."""
  return jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (size,)))(x, starts)


def _compact(x: jax.Array, mask: jax.Array) -> jax.Array:
  """The real samples of every row first, in their order; zeros behind them."""

  def move(x):
    index = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, x.shape[1])
    rows = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x).at[rows, index].set(x, mode="drop")

  in_place = jnp.all(mask[:, 1:] <= mask[:, :-1])
  return jax.lax.cond(in_place, lambda x: jnp.where(mask, x, 0), move, x)
