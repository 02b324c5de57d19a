"""The table of architectures in README: what they can do and what they cost.

    python benchmarks/architectures.py [--write]

What they can do is found out on the small model that each is tested with; what they cost is
counted at the sizes in `configs/*_1b.py`, abstractly. `--write` puts the table into README.
"""

import argparse
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from triform.arch import FORMS, HyperMixerClassifier, SequenceModule, build, state_bytes
from triform.arch.flops import Call, abstract_model, count
from triform.arch.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- architectures: python benchmarks/architectures.py --write -->", "<!-- end -->"
LENGTH, LONG = 2048, 65536
HEADER = (
  "model",
  "forms",
  "looks ahead",
  "gradients through the state",
  "packed documents",
  "parameters",
  f"state of a row at {LENGTH:,} tokens",
  f"at {LONG:,}",
  "a token in training",
  "of which mixing",
  "and elementwise",
  "a decoded token",
)


def abilities(model: SequenceModule) -> list[str]:
  """What a small model is seen to do: the columns of `HEADER` up to its parameters."""
  ids = jnp.asarray(np.random.default_rng(0).permutation(32)[None, :8])

  @functools.partial(jax.jit, static_argnames="form")
  def features(ids, form="parallel", reset=None):
    return model.encode(ids, form=form, reset=reset)[0]

  forms = [form for form in FORMS if _answers(features, ids, form=form)]
  other = jnp.concatenate([ids[:, :4], ids[:, :3:-1]], axis=1)  # the same start, then otherwise
  start, later = (features(a)[:, :4] for a in (ids, other))
  return [
    ", ".join(forms),
    "no" if np.allclose(start, later, atol=1e-5) else "yes",
    _state_has_gradients(model, ids),
    "yes" if _packs(features, ids) else "no",
  ]


def _answers(features, ids, **arguments) -> bool:
  try:
    features(ids, **arguments)
  except NotImplementedError:
    return False
  return True


def _state_has_gradients(model, ids) -> str:
  _, state = jax.jit(lambda ids: model.encode(ids))(ids[:, :4])
  leaves, structure = jax.tree.flatten(state)
  if not leaves:
    return "no state"
  floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def loss(floats):
    rest = iter(floats)
    given = [next(rest) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
    features = model.encode(ids[:, 4:], jax.tree.unflatten(structure, given))[0]
    # Weighted, for a norm may make the plain sum a constant.
    return (features * np.random.default_rng(1).standard_normal(features.shape)).sum()

  flows = all(jnp.abs(gradient).max() > 0 for gradient in jax.jit(jax.grad(loss))(floats))
  return "yes" if flows else "no"


def _packs(features, ids) -> bool:
  reset = jnp.zeros(ids.shape, bool).at[:, 4].set(True)
  if not _answers(features, ids, reset=reset):
    return False
  return np.allclose(features(ids, reset=reset)[:, 4:], features(ids[:, 4:]), atol=1e-5)


def costs(model: SequenceModule, form: str) -> list[str]:
  """Bytes and operations per token, in a window of `LENGTH` tokens."""
  training = count(model, Call(LENGTH, form, training=True, causal=True))
  step = training.forward + training.backward
  parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  states = [jax.eval_shape(lambda n=n: model.init_state(1, max_len=n)) for n in (LENGTH, LONG)]
  decoded = "none"
  if model.causal:
    token = count(model, Call(1, "recurrent", context=LENGTH, causal=True)).forward
    decoded = f"{token.flops / 1e9:.2f} GFLOP"
  return [
    f"{parameters / 1e9:.2f}B",
    *(f"{state_bytes(state) / 2**20:,.0f} MiB" for state in states),
    f"{step.flops / LENGTH / 1e9:.2f} GFLOP",
    f"{step.mixing / step.flops:.1%}",
    f"{(step.vector + step.transcendental) / LENGTH / 1e9:.2f} GFLOP",
    decoded,
  ]


def language_models() -> Iterator[tuple[str, str, ConfigDict]]:
  """Name, file and configuration of every model of about a billion parameters."""
  for path in sorted((ROOT / "configs").glob("*_1b.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variant in getattr(module, "VARIANTS", {"": None}):
      config = module.get_config(*filter(None, [variant]))
      yield config.model.architecture, ":".join(filter(None, (path.stem, variant))), config


def encoder(config: Mapping[str, Any]) -> HyperMixerClassifier:
  names = ("vocab_size", "d_model", "num_layers", "num_heads", "mixing_dim", "ffn_dim")
  sizes = {name: config[name] for name in names}
  return HyperMixerClassifier(num_classes=2, tied=False, **sizes, rngs=nnx.Rngs(0))


def table() -> str:
  rows = [HEADER, ["---"] * len(HEADER)]
  for name, file, config in language_models():
    small = build({"architecture": name, **ARCHITECTURES[name].small}, rngs=nnx.Rngs(0))
    told = costs(abstract_model(config.model), config.form)
    rows.append([f"{name} (`{file}`)", *abilities(small), *told])
    if name == "hypermixer":  # the published one, of the same sizes
      small = encoder(ARCHITECTURES[name].small)
      large = nnx.eval_shape(functools.partial(encoder, config.model))
      rows.append(["hypermixer, bidirectional", *abilities(small), *costs(large, config.form)])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", action="store_true", help="put the table into README")
  if not parser.parse_args().write:
    print(table())
    return
  readme = ROOT / "README.md"
  before, _, rest = readme.read_text().partition(BEGIN)
  _, _, after = rest.partition(END)
  readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
  main()
