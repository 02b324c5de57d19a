"""What is counted, and of which call."""

import dataclasses
from typing import NamedTuple

from ..interface import Form


class _Sums:
  """Adds, subtracts and multiplies by a number, field by field."""

  def __add__(self, other):
    pairs = zip(self.values(), other.values(), strict=True)
    return type(self)(*(mine + theirs for mine, theirs in pairs))

  def __mul__(self, times):
    return type(self)(*(value * times for value in self.values()))

  def __sub__(self, other):
    return self + other * -1

  def values(self):
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Work(_Sums):
  """Floating-point operations by kind; a multiply-add is two.

  Selecting, comparing, converting, moving and integers are not counted, nor is reading a table.

  Attributes:
    matmul: products with weights.
    convolution: all of the convolutions over time.
    mixing: products of tokens with each other or with a state.
    logits: the product with the head.
    vector: elementwise arithmetic and sums, an operation for each term.
    transcendental: exponentials, logarithms, sines, square roots and their like.
  """

  matmul: float = 0
  convolution: float = 0
  mixing: float = 0
  logits: float = 0
  vector: float = 0
  transcendental: float = 0

  @property
  def flops(self) -> float:
    """Products and convolutions, which is what utilisation is measured by."""
    return self.matmul + self.convolution + self.mixing + self.logits


@dataclasses.dataclass(frozen=True)
class Count(_Sums):
  """The work of a call.

  Attributes:
    forward: what its outputs take.
    backward: what their gradients take beyond that.
    recompute: what `remat` computes a second time.
  """

  forward: Work = Work()
  backward: Work = Work()
  recompute: Work = Work()


class Call(NamedTuple):
  """A call of a module with one row of tokens.

  Attributes:
    length: tokens in the call.
    form: the algorithm.
    training: with `reset` and `mask`, from no state, and the state after it is not asked for.
      Otherwise without the two, and the state is returned.
    context: tokens before the call, whose state it is given; 0 is no state.
    causal: counts the pairs that causality leaves, `(length + 1) / 2` keys a query: what has to be
      computed. Otherwise all the pairs that the program computes.
    packed: of training; if false, as in classifiers, rows are no packed documents and have no
      `reset`.
    ahead: the tokens of `length`, at its end, that are answered but left out of the state.
  """

  length: int
  form: Form
  training: bool = False
  context: int = 0
  causal: bool = False
  packed: bool = True
  ahead: int = 0
