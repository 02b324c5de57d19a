"""Classes of audio while it is heard: many streams in one state, and words in audio without end."""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .data.packing import check_positive
from .interface import SequenceModule, restart_rows, sees_all, state_bytes
from .layers.audio import FULL_SCALE
from .layout import split_model

HOPS = 16  # of the larger of the two sizes of pieces
CALL = 32  # what a call costs beside its frames, in frames; measured on one core of a CPU
FEW = 64  # streams whose larger pieces a CPU's caches hold; of more they are slower than small ones
LOUDEST = 8.0  # of samples: louder ones are not in [-1, 1] but in the scale of integers


class Recognizer:
  """What each of many streams of samples is, at any time, in constant memory and time.

      recognizer = Recognizer(*load("runs/speech"), streams=1000)
      posteriors = recognizer.push(samples)  # [1000, n], the next n samples of each

  Every stream is of one document after another, and is answered for what it heard of the current
  one: the posterior is that of the model for these samples alone, however they came. With a model
  that looks ahead it is as if nothing followed them; of a stream without a whole frame yet, it is
  what the model says of nothing.

  Calls of any number of samples run two compiled programs, of one and of 16 frames' worth, their
  rests padded and masked; and two more read out and restart.

  Args:
    model: a classifier with a `front_end` and a state.
    labels: the names of its classes, as `load` gives them.
    streams: how many there are.

  Attributes:
    labels, streams: as given.
    sample_rate: of the model, in hertz.
    state: of all streams, a pytree; see `interface.take_rows` and `put_rows`. A call takes the
      memory of the one before.
    state_bytes: of a stream.
    heard: int64[streams], samples of the current document.

  Raises:
    ValueError: for a model that cannot stream, labels of other classes, or no streams.
  """

  def __init__(self, model: SequenceModule, labels: Sequence[str], *, streams: int = 1):
    _check_model(model)
    check_positive(streams=streams)
    classes = model.head.out_features
    if not isinstance(labels, list | tuple) or len(labels) != classes:
      count = len(labels) if isinstance(labels, list | tuple) else type(labels).__name__
      raise ValueError(f"labels are {count}, expected the names of {classes} classes")
    self.labels, self.streams = tuple(labels), streams
    self.sample_rate = model.front_end.analysis.sample_frequency
    self._max_len, self._num_frames = model.max_len, model.front_end.analysis.num_frames
    self._hop, self._dtype = model.front_end.shift, np.dtype(model.front_end.dtype)
    graphdef, *self._weights = split_model(model)
    self._first, self._restart, self._hear, self._answer = _programs(graphdef)
    self.state = self._first(self._weights, streams)
    self.state_bytes = state_bytes(self.state) // streams
    self.heard = np.zeros(streams, np.int64)

  def push(
    self,
    samples: Any,  # int16[streams, n], or floats in [-1, 1]
    *,
    lengths: Any = None,  # int[streams]
    reset: Any = None,  # bool[streams]
  ) -> np.ndarray:  # float32[streams, classes]
    """Hears samples, `hear`, and answers, `posteriors`."""
    self.hear(samples, lengths=lengths, reset=reset)
    return self.posteriors()

  def hear(self, samples: Any, *, lengths: Any = None, reset: Any = None) -> None:
    """Goes on by the next samples of each stream.

    Args:
      samples: `[streams, n]` with any n of at least 1, int16 or floats in [-1, 1].
      lengths: how many of its samples each stream has, the first ones; default n. One without any
        is idle: its state stays bit for bit as it is, whatever its samples and `reset`.
      reset: true where a document begins with the first of these samples.

    Raises:
      ValueError: for other shapes or dtypes, lengths beyond 0 to n, or samples that are not finite
        or far beyond 1, or a document longer than the state of the model has room for (`max_len`
        frames, of attention); then nothing was heard.
    """
    samples, lengths = self._checked(samples, lengths)
    begins = np.zeros(self.streams, bool)
    if reset is not None:
      begins = _flags("reset", reset, self.streams) & (lengths > 0)
    self._check_room(int((np.where(begins, 0, self.heard) + lengths).max()))
    self.reset(begins)
    for start, size in self._pieces(int(lengths.max())):
      piece = samples[:, start : start + size]
      piece = np.pad(piece, ((0, 0), (0, size - piece.shape[1])))
      real = np.clip(lengths - start, 0, size).astype(np.int32)
      self.state = self._hear(self._weights, self.state, piece, real)
    self.heard += lengths

  def posteriors(self) -> np.ndarray:  # float32[streams, classes]
    """Probabilities of the classes, of what each stream heard of its document."""
    return np.asarray(self._answer(self._weights, self.state))

  def reset(self, rows: Any) -> None:  # bool[streams]
    """Begins a document in every stream of `rows`: what it heard is forgotten."""
    rows = _flags("rows", rows, self.streams)
    if rows.any():
      self.state = self._restart(self._weights, self.state, rows)
      self.heard[rows] = 0

  def _checked(self, samples, lengths) -> tuple[np.ndarray, np.ndarray]:
    samples = np.asarray(samples)
    if samples.ndim != 2 or len(samples) != self.streams or not samples.shape[1]:
      raise ValueError(
        f"samples have shape {list(samples.shape)}, expected [{self.streams}, n] with n > 0"
      )
    integers = samples.dtype == np.int16
    if not integers and not jnp.issubdtype(samples.dtype, jnp.floating):
      raise ValueError(f"samples are {samples.dtype}, expected int16, or floats in [-1, 1]")
    n = samples.shape[1]
    if lengths is None:
      lengths = np.full(self.streams, n)
    else:
      lengths = np.asarray(lengths)
      if lengths.shape != (self.streams,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
          f"lengths are {lengths.dtype}{list(lengths.shape)}, expected integers [{self.streams}]"
        )
      if lengths.min() < 0 or lengths.max() > n:
        worst = lengths.min() if lengths.min() < 0 else lengths.max()
        raise ValueError(f"lengths have {worst}, expected 0 to {n}, the samples there are")
      if lengths.min() < n:
        samples = np.where(np.arange(n)[None] < lengths[:, None], samples, samples.dtype.type(0))
    samples = samples.astype(self._dtype, copy=False)
    if integers:
      samples = samples / self._dtype.type(FULL_SCALE)  # as the front end does, to the bit
    elif not np.abs(samples).max() <= LOUDEST:  # nor is NaN
      raise ValueError(f"samples reach {np.abs(samples).max()}, expected int16, or in [-1, 1]")
    return samples, lengths

  def _check_room(self, samples: int) -> None:
    if self._max_len is not None and self._num_frames(samples) > self._max_len:
      raise ValueError(
        f"a stream would have heard {self._num_frames(samples)} frames of its document, expected "
        f"at most {self._max_len}, max_len of the model, before a reset"
      )

  def _pieces(self, n: int) -> Iterator[tuple[int, int]]:
    """Starts and sizes of pieces that hold n samples, the last perhaps not full."""
    large, start = HOPS * self._hop, 0
    small_only = self.streams > FEW and jax.default_backend() == "cpu"
    while start < n:
      hops = min(HOPS, -(-(n - start) // self._hop))
      padded = hops * (self.streams + CALL) > HOPS * self.streams + CALL
      size = large if padded and not small_only else self._hop
      yield start, size
      start += size


@functools.lru_cache(maxsize=16)
def _programs(graphdef):
  """Of a model; looked up once, for a graph takes milliseconds to hash."""

  @functools.partial(jax.jit, static_argnums=1)
  def first(weights, streams):
    return nnx.merge(graphdef, *weights).init_state(streams)

  @functools.partial(jax.jit, donate_argnums=1)
  def restart(weights, state, rows):
    model = nnx.merge(graphdef, *weights)
    return restart_rows(state, model.init_state(len(rows)), rows)

  @functools.partial(jax.jit, donate_argnums=1)
  def hear(weights, state, samples, real):
    model = nnx.merge(graphdef, *weights)
    mask = jnp.arange(samples.shape[1])[None] < real[:, None]
    form = "recurrent" if samples.shape[1] == model.front_end.shift else "chunkwise"
    return model.encode(samples, state, form=form, mask=mask)[1]

  @jax.jit
  def answer(weights, state):
    logits = nnx.merge(graphdef, *weights).read_out(state)
    return jax.nn.softmax(logits, axis=-1).astype(jnp.float32)

  return first, restart, hear, answer


def _check_model(model: SequenceModule) -> None:
  name = type(model).__name__
  if not hasattr(model, "front_end"):
    raise ValueError(f"{name} is no classifier of audio, expected one with a front_end")
  if model.front_end is None:
    raise ValueError(f"{name} takes frames, not samples: expected a model with a front_end")
  if sees_all(model):
    raise ValueError(f"{name} sees whole sequences and cannot stream: expected one with a state")


def _flags(name: str, flags: Any, streams: int) -> np.ndarray:
  flags = np.asarray(flags)
  if flags.shape != (streams,) or flags.dtype != bool:
    raise ValueError(f"{name} is {flags.dtype}{list(flags.shape)}, expected bool[{streams}]")
  return flags


class Decision(NamedTuple):
  """A word that was heard."""

  time: float  # in seconds of audio; when it fell
  label: str
  posterior: float


class Answer(NamedTuple):
  """What a `Spotter` makes of the end of what it heard."""

  time: float  # in seconds of audio
  posteriors: np.ndarray  # float32[classes]
  decision: Decision | None  # that falls with it


class Spotter:
  """Words in one stream of samples without end, in constant memory.

      spotter = Spotter(*load("runs/speech"))
      for time, label, posterior in spotter.push(samples):  # [n], the next n samples
        ...

  A model that learned from clips of a second knows nothing of minutes, so `rows` streams of a
  `Recognizer` hear the same samples, each beginning afresh every `window` seconds, one of them
  every `window / rows`; at first all begin. The one that began the longest ago answers: it heard
  all from the beginning, or between `(rows - 1) / rows` of a window and a whole one. So a sound no
  longer than `(rows - 1) / rows` of a window is heard whole by some answer.

  There is an answer every `every` seconds, and with it a decision for the likeliest class if

  - it was the likeliest, with a posterior of at least `threshold`, at every answer of the last
    `hold` seconds, this one included,
  - it is not in `ignored`, and
  - its own last decision is at least `window` seconds ago.

  A row answers for `window / rows` seconds, which `hold` is by default, so that two have to agree:
  one that heard a word from its middle on, or the ends of two words, is often as certain and wrong.
  A sound that goes on is decided once a window. A word said twice within a window counts once.

  Args:
    model, labels: as of `Recognizer`.
    threshold: above 0 and at most 1.
    window: in seconds; as a rule the length of the clips that the model learned from.
    rows: at least 2; more cost more, and let sounds be longer.
    every: in seconds; decisions fall at most so late.
    hold: in seconds; 0 believes any answer.
    ignored: labels; default those that begin with an underscore, such as `_silence_`.

  Attributes:
    recognizer: the rows.
    window: in samples, a multiple of `rows`.
    heard: samples so far.

  Raises:
    ValueError: as `Recognizer`, or for an option that cannot be.
  """

  def __init__(
    self,
    model: SequenceModule,
    labels: Sequence[str],
    *,
    threshold: float = 0.8,
    window: float = 1.0,
    rows: int = 4,
    every: float = 0.05,
    hold: float | None = None,
    ignored: Collection[str] | None = None,
  ):
    if rows < 2:
      raise ValueError(f"rows is {rows}, expected at least 2")
    if not 0 < threshold <= 1:
      raise ValueError(f"threshold is {threshold}, expected more than 0 and at most 1")
    self.recognizer = Recognizer(model, labels, streams=rows)
    rate, frame = self.recognizer.sample_rate, model.front_end.analysis.window
    if not rows * frame <= window * rate < math.inf:
      least = rows * frame / rate
      raise ValueError(f"window is {window} s, expected at least {least:g} s, a frame to each row")
    if not 1 <= every * rate < math.inf:
      raise ValueError(f"every is {every} s, expected at least a sample, {1 / rate:g} s")
    if hold is not None and not 0 <= hold < math.inf:
      raise ValueError(f"hold is {hold} s, expected at least 0")
    self.recognizer._check_room(math.ceil(window * rate))
    labels = self.recognizer.labels
    if ignored is None:
      ignored = [label for label in labels if label.startswith("_")]
    if unknown := sorted(set(ignored) - set(labels)):
      raise ValueError(f"ignored has {', '.join(unknown)}, expected some of {', '.join(labels)}")
    self._stride = round(window * rate / rows)
    self.window, self.heard = self._stride * rows, 0
    self._every = round(every * rate)
    self._hold = self._stride if hold is None else round(hold * rate)
    self._threshold, self._ignored = threshold, frozenset(ignored)
    self._likeliest, self._since = -1, 0
    self._decided: dict[str, int] = {}  # when a label was last, in samples

  def push(self, samples: Any) -> list[Decision]:  # int16[n], or floats in [-1, 1]
    """Hears the next samples, any number; returns the decisions that fall meanwhile."""
    return [answer.decision for answer in self.answers(samples) if answer.decision is not None]

  def answers(self, samples: Any) -> Iterator[Answer]:
    """Hears the next samples as the answers are asked for, all of them only with the last."""
    samples = np.asarray(samples)
    if samples.ndim != 1 or not len(samples):
      raise ValueError(f"samples have shape {list(samples.shape)}, expected [n] with n > 0")
    return self._answers(samples)

  def posteriors(self) -> np.ndarray:  # float32[classes]
    """Of the row that answers, now."""
    begun = max(0, -(-self.heard // self._stride) - self.recognizer.streams)
    return self.recognizer.posteriors()[begun % self.recognizer.streams]

  def _answers(self, samples: np.ndarray) -> Iterator[Answer]:
    rows, start = self.recognizer.streams, 0
    while start < len(samples):
      steps, late = divmod(self.heard, self._stride)
      # A row that is to begin does so with its first sample: until then it answers.
      reset = (np.arange(rows) == steps % rows) & (late == 0)
      n = min(self._every - self.heard % self._every, self._stride - late)
      piece = samples[start : start + n]
      self.recognizer.hear(np.broadcast_to(piece, (rows, len(piece))), reset=reset)
      start, self.heard = start + len(piece), self.heard + len(piece)
      if self.heard % self._every == 0:
        posteriors = self.posteriors()
        yield Answer(self._seconds(), posteriors, self._decide(posteriors))

  def _seconds(self) -> float:
    return self.heard / self.recognizer.sample_rate

  def _decide(self, posteriors: np.ndarray) -> Decision | None:
    likeliest = int(posteriors.argmax())
    posterior, label = float(posteriors[likeliest]), self.recognizer.labels[likeliest]
    if posterior < self._threshold:
      self._likeliest = -1
      return None
    if likeliest != self._likeliest:
      self._likeliest, self._since = likeliest, self.heard
    decided = self._decided.get(label, -self.window)
    if (
      label in self._ignored
      or self.heard - self._since < self._hold
      or self.heard - decided < self.window
    ):
      return None
    self._decided[label] = self.heard
    return Decision(self._seconds(), label, posterior)
