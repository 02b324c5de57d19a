"""What a configuration costs, as numbers and as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from ..interface import SequenceModule, state_bytes
from ..layout import split_model
from ..models import build, laid_out
from ..models.registry import find
from .closed import count
from .memory import activation_bytes, parameter_bytes
from .work import Call

KINDS = ("matmul", "convolution", "mixing", "logits", "vector", "transcendental")
TITLES = {
  "training_step": "training step ({form}, {length} tokens)",
  "prefill": "prefill ({form}, {length} tokens)",
  "decoded_token": "decoded token ({form}, after {context})",
}
PARTS = {
  "model": "{}, what causality leaves",
  "computed": "{}, as computed",
  "layer": "of it a layer, {}",
}
WIDTH = 16


def abstract_model(config: Mapping[str, Any]) -> SequenceModule:
  """The model of a configuration's `model` section without values, its layers as one."""
  options = laid_out(config, scan_layers=True)
  return nnx.eval_shape(lambda: build(options, rngs=nnx.Rngs(0)))


def report(config: ConfigDict) -> dict[str, Any]:
  """What a run costs: operations per token and bytes.

  Args:
    config: of a run, as in `configs/`.

  Returns:
    Numbers under these names, nested and ready for JSON:

      forward_matmul_flops_per_token   products with weights, the head's included
      parameters, parameter_bytes
      state_bytes                      of a row, after a window of training
      activation_bytes_per_token       kept for the backward pass
      training_step, prefill, decoded_token
        form, length                   one row of `seq_len` tokens; a token after as many
        model                          operations per token that have to be computed, causal
                                       products by what causality leaves
        computed                       operations per token of the program
        layer                          those of one layer, of `computed`

    each of the last three with `forward`, and in training `backward` and `recompute`, by kind.
    A model that knows how many tokens a second of audio has, as `tokens_per_second`, has
    `tokens_per_second` and `flops_per_second_of_audio` too.

  Raises:
    ValueError: if the model is no language model.
  """
  name = config.model.architecture
  if find(name).task != "language":
    raise ValueError(
      f"{name} is a classifier, and the length of its sequences is not in the configuration: "
      "expected a language model; triform.arch.flops.count takes any model and length"
    )
  model = abstract_model(config.model)
  length = config.seq_len
  calls = {
    "training_step": Call(length, config.form, training=True),
    "prefill": Call(length, config.eval.form),
    "decoded_token": Call(1, "recurrent", context=length),
  }
  forward = count(model, calls["training_step"]).forward
  params = jax.tree.leaves(split_model(model)[1])
  state = jax.eval_shape(lambda: model.init_state(1, max_len=length))
  told = {
    "architecture": config.model.architecture,
    "forward_matmul_flops_per_token": (forward.matmul + forward.logits) / length,
    "parameters": sum(leaf.size for leaf in params),
    "parameter_bytes": parameter_bytes(model),
    "state_bytes": state_bytes(state),
    "activation_bytes_per_token": activation_bytes(model, length, config.form) / length,
    **{name: _costs(model, call) for name, call in calls.items()},
  }
  if rate := getattr(model, "tokens_per_second", None):
    prefill = count(model, calls["prefill"]._replace(causal=True)).forward.flops
    told |= {"tokens_per_second": rate, "flops_per_second_of_audio": rate * prefill / length}
  return told


def _costs(model: SequenceModule, call: Call) -> dict[str, Any]:
  counted = {
    "model": count(model, call._replace(causal=True)),
    "computed": count(model, call),
    "layer": count(model.stack, call) * (1 / model.stack.num_layers),
  }
  phases = ("forward", "backward", "recompute") if call.training else ("forward",)
  return {
    "form": call.form,
    "length": call.length,
    "context": call.context,
    "work": {
      name: {phase: dataclasses.asdict(getattr(one, phase) * (1 / call.length)) for phase in phases}
      for name, one in counted.items()
    },
  }


def table(told: Mapping[str, Any]) -> str:
  """A report as text."""
  lines = [
    f"{told['architecture']}: {told['parameters']:,} parameters, {told['parameter_bytes']:,} bytes",
    f"state of a row: {told['state_bytes']:,} bytes",
    "kept of a token in training for the backward pass: "
    f"{told['activation_bytes_per_token']:,.0f} bytes",
  ]
  if "tokens_per_second" in told:
    lines.append(f"prefill of a second of audio: {told['flops_per_second_of_audio']:,.0f} FLOP")
  for name, title in TITLES.items():
    costs = told[name]
    title = f"{title.format(**costs)}, per token"
    lines += ["", f"{title:<48}" + "".join(f"{kind:>{WIDTH}}" for kind in KINDS)]
    for part, phases in costs["work"].items():
      for phase, work in phases.items():
        if any(work.values()):
          numbers = "".join(f"{work[kind]:>{WIDTH},.0f}" for kind in KINDS)
          lines.append(f"  {PARTS[part].format(phase):<46}" + numbers)
  return "\n".join(lines)
