"""Counts the operations of a traced program: what the closed forms are held to."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from .work import Work

# Names of scopes (`jax.named_scope`) that tell what products are for, the innermost where there are
# several; the others are `matmul`.
SCOPES = re.compile(r"\b(convolution|logits|matmul|mixing)\b")
# One operation for every element of the result.
VECTOR = {
  *("abs", "add", "add_any", "cummax", "cummin", "cumprod", "cumsum", "div", "integer_pow", "max"),
  *("min", "mul", "neg", "rem", "sign", "square", "sub"),
}
TRANSCENDENTAL = {
  *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "erf"),
  *("erf_inv", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sin"),
  *("sinh", "sqrt", "tan", "tanh"),
}
# One operation for every term.
REDUCTIONS = {"reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}


def walk(f: Callable, *arguments: Any) -> Work:
  """Counts what `f(*arguments)` computes for its results, without computing it.

  A scan counts as often as it turns, whatever is called is entered, and a Pallas kernel counts as
  its cost estimate says; of what some platforms have a program of their own for, that of the rest
  counts. Fourier transforms count as `fft_flops` and are products of tokens, whatever the scope. Of
  complex numbers a product or quotient is 6 operations, a term of a product of matrices 8, and a
  sum 2.

  Args:
    f: a function of arrays, which may be a gradient.
    arguments: trees of arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: for a loop that turns an unknown number of times, a kernel without cost estimate.
  """
  jaxpr = jax.make_jaxpr(f)(*arguments).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _jaxpr(jaxpr, "")


def _jaxpr(jaxpr: Jaxpr | ClosedJaxpr, scope: str) -> Work:
  equations = (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns
  return sum((_equation(equation, scope) for equation in equations), Work())


def _equation(equation: JaxprEqn, scope: str) -> Work:
  scope = f"{scope}/{equation.source_info.name_stack}"
  name, params = equation.primitive.name, equation.params
  if name == "scan":
    return _jaxpr(params["jaxpr"], scope) * params["length"]
  if name == "while":
    raise ValueError(f"a loop in {scope!r} turns an unknown number of times, expected a scan")
  if name == "cond":
    return max((_jaxpr(branch, scope) for branch in _possible(params)), key=_total)
  if name == "pallas_call":
    estimate = params["cost_estimate"]
    if estimate is None:
      raise ValueError(f"a Pallas kernel in {scope!r} has no cost_estimate")
    kinds = {_purpose(scope): estimate.flops, "transcendental": estimate.transcendentals}
    return Work(**kinds)
  inner = [] if name.startswith("scatter") else [*jaxprs_in_params(params)]  # it has an addition
  return sum((_jaxpr(jaxpr, scope) for jaxpr in inner), Work()) + _primitive(equation, scope)


def _possible(params: dict[str, Any]) -> list[ClosedJaxpr]:
  """The branches of a conditional; of one by platform, that for all not named."""
  branches, platforms = params["branches"], params.get("branches_platforms")
  if platforms is None or None not in platforms:
    return branches
  return [branches[platforms.index(None)]]


def _total(work: Work) -> float:
  return sum(work.values())


def fft_flops(length: int, *, real: bool) -> int:
  """Operations of a Fourier transform, to whole ones: the usual `5 n log2 n`, of real numbers half.

  That is what the algorithm of Cooley and Tukey takes for a power of two.
  """
  return round((2.5 if real else 5) * length * math.log2(length))


def _purpose(scope: str) -> str:
  return ["matmul", *SCOPES.findall(scope)][-1]


def _primitive(equation: JaxprEqn, scope: str) -> Work:
  name, out, params = equation.primitive.name, equation.outvars[0].aval, equation.params
  dtype = getattr(out, "dtype", bool)
  if not jnp.issubdtype(dtype, jnp.inexact):
    return Work()
  shapes = [operand.aval.shape for operand in equation.invars]
  is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
  if name == "fft":
    length = math.prod(params["fft_lengths"])
    real = params["fft_type"] in (jax.lax.FftType.RFFT, jax.lax.FftType.IRFFT)
    number = max(math.prod(shapes[0]), out.size) // length
    return Work(mixing=number * fft_flops(length, real=real))
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    terms = math.prod(shapes[0][axis] for axis in contracted)
    return Work(**{_purpose(scope): (8 if is_complex else 2) * terms * out.size})
  if name == "conv_general_dilated":
    outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
    return Work(convolution=2 * math.prod(shapes[1]) // outputs * out.size)
  if name in TRANSCENDENTAL:
    return Work(transcendental=out.size)
  if name in VECTOR:
    operations = out.size
  elif name == "one_minus_square":
    operations = 2 * out.size
  elif name == "polynomial":
    operations = 2 * (len(shapes) - 2) * out.size
  elif name in REDUCTIONS:
    operations = math.prod(shapes[0])
  elif name.startswith("scatter") and name != "scatter":
    operations = math.prod(shapes[2])
  else:
    return Work()
  if is_complex:
    operations *= 6 if name in ("div", "mul") else 2
  purpose = _purpose(scope)
  return Work(**{"convolution" if purpose == "convolution" else "vector": operations})
