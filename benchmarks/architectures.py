"""The table of architectures in README: what they can do and what they cost.

    python benchmarks/architectures.py [--write]

What they can do is found out on the small model that each is tested with; what they cost is
counted at the sizes in `configs/*_1b.py`, abstractly. `--write` puts the table into README.
"""

import argparse
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from triform.arch import FORMS, build, state_bytes
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
  "a decoded token",
)


def abilities(architecture: str) -> list[str]:
  """What the small model is seen to do: the columns of `HEADER` up to its parameters."""
  small = ARCHITECTURES[architecture].small
  model = build({"architecture": architecture, **small}, rngs=nnx.Rngs(0))
  ids = jnp.asarray(np.random.default_rng(0).permutation(small["vocab_size"])[None, :8])
  forms = [form for form in FORMS if _answers(model, ids, form)]
  _, state = model(ids[:, :4])
  other = jnp.concatenate([ids[:, :4], ids[:, :3:-1]], axis=1)  # the same start, then otherwise
  start, later = (model(a)[0][:, :4] for a in (ids, other))
  packed, _ = model(ids, reset=jnp.zeros(ids.shape, bool).at[:, 4].set(True))
  alone, _ = model(ids[:, 4:])
  leaves, structure = jax.tree.flatten(state)
  floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def loss(floats):
    rest = iter(floats)
    given = [next(rest) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
    return model(ids[:, 4:], jax.tree.unflatten(structure, given))[0].sum()

  flows = all(jnp.abs(gradient).max() > 0 for gradient in jax.grad(loss)(floats))
  return [
    ", ".join(forms),
    "no" if np.allclose(start, later, atol=1e-5) else "yes",
    "yes" if flows else "no",
    "yes" if np.allclose(packed[:, 4:], alone, atol=1e-5) else "no",
  ]


def _answers(model, ids, form):
  try:
    model(ids, form=form)
  except NotImplementedError:
    return False
  return True


def costs(config) -> list[str]:
  """Bytes and operations per token, in a window of `LENGTH` tokens."""
  model = abstract_model(config.model)
  training = count(model, Call(LENGTH, config.form, training=True, causal=True))
  decoded = count(model, Call(1, "recurrent", context=LENGTH, causal=True)).forward
  step = training.forward + training.backward
  parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  states = [jax.eval_shape(lambda n=n: model.init_state(1, max_len=n)) for n in (LENGTH, LONG)]
  return [
    f"{parameters / 1e9:.2f}B",
    *(f"{state_bytes(state) / 2**20:,.0f} MiB" for state in states),
    f"{step.flops / LENGTH / 1e9:.2f} GFLOP",
    f"{step.mixing / step.flops:.1%}",
    f"{decoded.flops / 1e9:.2f} GFLOP",
  ]


def table() -> str:
  rows = [HEADER, ["---"] * len(HEADER)]
  for path in sorted((ROOT / "configs").glob("*_1b.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    name = config.model.architecture
    rows.append([f"{name} (`{path.stem}`)", *abilities(name), *costs(config)])
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
