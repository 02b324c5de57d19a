"""Proof that the law suite bites: breaks the library on purpose, one fault at a time.

    python tests/faults.py [NAME ...]

Every fault is one exact edit of shipped code, made in a temporary copy, where the tests named
beside it have 60 seconds to fail. Exits with 1 if a fault survives, if the unbroken copy fails,
or if the code to edit is no longer there exactly once.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
API, XLA, POSITIONS = "kernels/retention/api.py", "kernels/retention/xla.py", "kernels/positions.py"
RUNS = "kernels/runs.py"
MIXER, STACK = "arch/mixers/retention.py", "arch/models/stack.py"
ATTENTION, CONV = "kernels/attention/forms.py", "kernels/depthwise_conv.py"
PACKING = "arch/data/packing.py"
LAWS, KERNELS = "tests/test_laws.py", "tests/test_kernels_retention.py"
ATTENTION_KERNELS = "tests/test_kernels_attention.py"
ATTENTION_MIXERS = "tests/test_mixers_attention.py"


class Fault(NamedTuple):
  name: str
  kind: str  # retention, attention, positions, packing, padding or training
  file: str
  old: str
  new: str
  tests: str  # the file expected to notice
  select: str  # and which of its tests, as for `pytest -k`


FAULTS = [
  Fault(
    "ragged tail decays like a whole chunk",
    "retention",
    RUNS,
    "pad(reset), pad(mask), *map",
    "pad(reset), jnp.pad(mask, [(0, 0), (0, -t % c)], constant_values=True), *map",
    LAWS,
    "law_1_forms_agree and retention-fixed and float64",
  ),
  Fault(
    "recurrent form resets after the token",
    "retention",
    XLA,
    "new = kept + k[..., None] * v[:, :, None]",
    "new = decay * state + k[..., None] * v[:, :, None]\n"
    "    new = new if reset is None else jnp.where(reset[:, None, None, None], 0, new)",
    LAWS,
    "law_1_forms_agree and retention-fixed and float64",
  ),
  Fault(
    "mask outside the exponential",
    "retention",
    RUNS,
    "return jnp.exp(jnp.where(visible, exponent, -jnp.inf))",
    "return jnp.where(visible, jnp.exp(exponent), 0)",
    KERNELS,
    "strong_decays",
  ),
  Fault(
    "recurrent state rounded to bfloat16",
    "retention",
    XLA,
    "return new, jnp.einsum",
    "return new.astype(jnp.bfloat16).astype(dtype), jnp.einsum",
    KERNELS,
    "narrow_dtype and bfloat16 and recurrent",
  ),
  Fault(
    "state handed over in the compute dtype",
    "retention",
    MIXER,
    "RetentionState(kv.astype(state_dtype(self.dtype)), seen)",
    "RetentionState(kv.astype(self.dtype), seen)",
    LAWS,
    "law_6 and retention-fixed",
  ),
  Fault(
    "row scale off by one token",
    "retention",
    POSITIONS,
    "count = (position.astype(dtype) + 1)[..., None]",
    "count = position.astype(dtype)[..., None]",
    LAWS,
    "oracle_agrees and retention-fixed",
  ),
  Fault(
    "keys not scaled",
    "retention",
    MIXER,
    " * self.key_size**-0.5",
    "",
    LAWS,
    "oracle_agrees and retention-fixed",
  ),
  Fault(
    "position advances over padding",
    "positions",
    POSITIONS,
    "seen = jnp.cumsum(mask, axis=1, dtype=jnp.int32)",
    "seen = jnp.cumsum(jnp.ones_like(mask), axis=1, dtype=jnp.int32)",
    LAWS,
    "law_3_holes and retention-fixed",
  ),
  Fault(
    "state carries the last position, not the count",
    "positions",
    POSITIONS,
    "count - 1), count[:, -1]",
    "count - 1), count[:, -1] - 1",
    LAWS,
    "law_2_splits and retention-fixed",
  ),
  Fault(
    "phases as float32 products",
    "positions",
    "kernels/rotary.py",
    "return position[..., None] * steps[None, None, :]",
    "phase = position[..., None].astype(jnp.float32) * (steps[None, None, :] / jnp.float32(TURN))\n"
    "  return ((phase % 1.0) * jnp.float32(TURN)).astype(jnp.uint32)",
    LAWS,
    "law_7 and retention-fixed",
  ),
  Fault(
    "phases as products in the default dtype",
    "positions",
    "kernels/rotary.py",
    "return position[..., None] * steps[None, None, :]",
    "phase = position[..., None].astype(float) * (steps[None, None, :] / float(TURN))\n"
    "  return ((phase % 1.0) * float(TURN)).astype(jnp.uint32)",
    LAWS,
    "law_7_positions and retention-fixed",
  ),
  Fault(
    "positions go on after a reset",
    "packing",
    POSITIONS,
    "if reset is not None:",
    "if False:",
    LAWS,
    "law_4_packing and retention-fixed",
  ),
  Fault(
    "a document begins at position 1",
    "packing",
    POSITIONS,
    "in_document = (seen - document_start + 1)",
    "in_document = (seen - document_start + 2)",
    LAWS,
    "law_4_packing and retention-fixed",
  ),
  Fault(
    "incoming state seen beyond a reset",
    "packing",
    RUNS,
    "exponent = jnp.where(self.documents == 0, exponent, -jnp.inf)",
    "exponent = jnp.where(self.documents <= 1, exponent, -jnp.inf)",
    LAWS,
    "law_4_documents and retention-fixed and float64",
  ),
  Fault(
    "scanned stack forgets reset",
    "packing",
    STACK,
    "x, after = block(x, before, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)",
    "reset = None if self.scan else reset\n"
    "      x, after = block(x, before, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)",
    LAWS,
    "law_4_packing and stack-scanned",
  ),
  Fault(
    "no reset where a document begins",
    "packing",
    PACKING,
    '"reset": begins,',
    '"reset": np.zeros(real, bool),',
    "tests/test_data_packing.py",
    "windows_hold_the_stream",
  ),
  Fault(
    "targets one token late",
    "packing",
    PACKING,
    "targets[~ending] = self._documents.tokens[inner]",
    "targets[~ending] = self._documents.tokens[np.maximum(inner - 1, 0)]",
    "tests/test_data_packing.py",
    "windows_hold_the_stream",
  ),
  Fault(
    "masked token's reset honoured",
    "padding",
    RUNS,
    "starts = reset if mask is None else reset & mask",
    "starts = reset",
    LAWS,
    "law_3_padding and retention-fixed and float64",
  ),
  Fault(
    "masked token's reset restarts positions",
    "padding",
    POSITIONS,
    "starts_here = reset if mask is None else reset & mask",
    "starts_here = reset",
    LAWS,
    "law_3_padding and retention-fixed and float64",
  ),
  Fault(
    "masked tokens decay the state",
    "padding",
    API,
    "jnp.where(mask[..., None], log_decay, 0)",
    "log_decay",
    LAWS,
    "law_1_forms_agree and retention-gated and float64",
  ),
  Fault(
    "masked NaN reaches the products",
    "padding",
    API,
    "(jnp.where(mask[..., None, None], a, 0) for a in (q, k, v))",
    "(q, k, v)",
    KERNELS,
    "masked_tokens_may_be_nan",
  ),
  Fault(
    "a reset multiplies the state by 0",
    "packing",
    RUNS,
    "return jnp.where(weights == 0, 0, weights * x)",
    "return weights * x",
    KERNELS,
    "reset_heals",
  ),
  Fault(
    "masked call rewrites the state",
    "padding",
    RUNS,
    "return jnp.where(mask.any(axis=1)[:, None, None, None], new, old)",
    "return new",
    LAWS,
    "masked_calls and retention-fixed and float32",
  ),
  Fault(
    "recurrent form reads through the mask",
    "padding",
    XLA,
    "new = jnp.where(mask[:, None, None, None], new, state)",
    "pass",
    LAWS,
    "law_3_padding and retention-fixed and float64",
  ),
  Fault(
    "scanned stack drops batch statistics",
    "training",
    STACK,
    "self._update(self.layers, statistics, rngs)",
    "pass",
    "tests/test_interface.py",
    "scanned_equals_unrolled",
  ),
  Fault(
    "a window of one token more",
    "attention",
    ATTENTION,
    "visible &= distance < rule.window",
    "visible &= distance <= rule.window",
    ATTENTION_KERNELS,
    "oracle and plain and 5",
  ),
  Fault(
    "the last bucket of distances is never read",
    "attention",
    ATTENTION,
    "jnp.clip(distance, 0, bias.shape[1] - 1)",
    "jnp.clip(distance, 0, bias.shape[1] - 2)",
    ATTENTION_KERNELS,
    "oracle and biased and None",
  ),
  Fault(
    "a token that has no row is dropped in silence",
    "attention",
    "kernels/attention/api.py",
    "out = jnp.where(full[..., None, None], jnp.nan, out)",
    "pass",
    ATTENTION_KERNELS,
    "full_cache",
  ),
  Fault(
    "keys without their positions",
    "attention",
    "arch/mixers/attention.py",
    "q, k = kernels.rotate(q, phase), kernels.rotate(k, phase)",
    "q = kernels.rotate(q, phase)",
    ATTENTION_MIXERS,
    "formula and rotary",
  ),
  Fault(
    "both norms before",
    "attention",
    STACK,
    'if self.norm_placement == "pre":',
    "if True:",
    "tests/test_interop_primer.py",
    "official_logits and full and parallel",
  ),
  Fault(
    "keys of the document before are seen",
    "packing",
    ATTENTION,
    "queries.document[:, :, None] == keys.document[:, None]",
    "queries.document[:, :, None] >= keys.document[:, None]",
    LAWS,
    "law_4_packing and transformer",
  ),
  Fault(
    "a cache keeps the document before",
    "packing",
    ATTENTION,
    "held = jax.tree.map(lambda a: jnp.where(begun, 0, a), held)",
    "pass",
    ATTENTION_KERNELS,
    "cache_holds_the_document",
  ),
  Fault(
    "a convolution reaches into the document before",
    "packing",
    CONV,
    "shifted = jnp.where(inside(count - s, first), shifted, 0)",
    "pass",
    ATTENTION_MIXERS,
    "no_document_is_in_the_convolution",
  ),
  Fault(
    "the last layers of a pattern forget reset",
    "packing",
    STACK,
    "x, own = stack(x, own, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)",
    "reset = reset if stack is self.repeated else None\n"
    "      x, own = stack(x, own, form=form, reset=reset, mask=mask, rngs=rngs, **of_block)",
    LAWS,
    "law_4_packing and hybrid-rest",
  ),
  Fault(
    "padding takes a row of the cache",
    "padding",
    ATTENTION,
    "row = jnp.where(real, row, rows)",
    "pass",
    ATTENTION_KERNELS,
    "oracle and recurrent and plain and None",
  ),
  Fault(
    "masked NaN reaches the values",
    "padding",
    "kernels/attention/api.py",
    "(jnp.where(real[..., None, None], a, 0) for a in (q, k, v))",
    "(q, k, v)",
    ATTENTION_KERNELS,
    "masked_tokens_may_be_nan",
  ),
  Fault(
    "taps count padding",
    "padding",
    CONV,
    "jnp.argsort(~mask, axis=1, stable=True)",
    "jnp.broadcast_to(jnp.arange(t), mask.shape)",
    "tests/test_kernels_depthwise_conv.py",
    "is_the_loop and mask",
  ),
  Fault(
    "squared ReLU with the gradient of ReLU",
    "training",
    "arch/layers/feed_forward.py",
    "dx = 2 * positive * jnp",
    "dx = jnp.sign(positive) * jnp",
    "tests/test_layers_feed_forward.py",
    "squared_relu_and_its_gradients",
  ),
]


def copy_tree(target: Path) -> None:
  """The packages and tests, and a folder from which `import triform` finds these packages."""
  ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
  for name in ("arch", "kernels", "tests", "benchmarks"):
    shutil.copytree(ROOT / name, target / name, ignore=ignore)
  shim = target / "path" / "triform"
  shim.mkdir(parents=True)
  for name in ("arch", "kernels"):
    (shim / name).symlink_to(target / name)


def run(target: Path, tests: str, select: str, seconds: int = SECONDS) -> tuple[bool, str]:
  """Whether the tests pass, and the first that does not."""
  environment = os.environ | {
    "PYTHONPATH": str(target / "path"),
    "PYTHONDONTWRITEBYTECODE": "1",
    "HYPOTHESIS_PROFILE": "quick",
  }
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
  try:
    finished = subprocess.run(
      [*command, "--rootdir", str(target), str(target / tests), "-k", select],
      cwd=target,
      env=environment,
      capture_output=True,
      text=True,
      timeout=seconds,
    )
  except subprocess.TimeoutExpired:
    raise SystemExit(f"{tests} -k {select!r} took more than {seconds} seconds") from None
  if finished.returncode not in (0, 1):  # nothing collected, an import error, ...
    raise SystemExit(f"pytest could not run {tests} -k {select!r}:\n{finished.stdout[-3000:]}")
  judged = re.search(r"^E .*\b(AssertionError|assert)\b", finished.stdout, re.M)
  if finished.returncode == 1 and not judged:
    raise SystemExit(f"not a failed assertion but an error:\n{finished.stdout[-3000:]}")
  failed = re.search(r"^FAILED \S+?::(\S+)", finished.stdout, re.M)
  return finished.returncode == 0, failed[1] if failed else "?"


def check_imports(target: Path) -> None:
  program = "import triform.arch, triform.kernels as k; print(triform.arch.__file__, k.__file__)"
  environment = os.environ | {"PYTHONPATH": str(target / "path")}
  found = subprocess.run(
    [sys.executable, "-c", program], cwd=target, env=environment, capture_output=True, text=True
  )
  paths = [Path(p).resolve() for p in found.stdout.split()]
  if len(paths) != 2 or not all(p.is_relative_to(target.resolve()) for p in paths):
    raise SystemExit(f"the copy is not what is imported: {found.stdout}{found.stderr[-2000:]}")


def main() -> None:
  chosen = [f for f in FAULTS if len(sys.argv) < 2 or f.name in sys.argv[1:]]
  survived = []
  with tempfile.TemporaryDirectory() as folder:
    target = Path(folder)
    copy_tree(target)
    check_imports(target)
    for fault in chosen:
      path = target / fault.file
      if path.read_text().count(fault.old) != 1:
        raise SystemExit(f"{fault.file} does not have exactly once: {fault.old!r}")
    for tests in dict.fromkeys(f.tests for f in chosen):
      every = dict.fromkeys(f"({f.select})" for f in chosen if f.tests == tests)
      passed, test = run(target, tests, " or ".join(every), SECONDS * len(every))
      if not passed:
        raise SystemExit(f"unbroken, the library fails {test}")
    print(f"{'fault':48} {'kind':10} {'file':26} {'s':>3}  caught by", flush=True)
    for fault in chosen:
      path = target / fault.file
      original, start = path.read_text(), time.monotonic()
      path.write_text(original.replace(fault.old, fault.new))
      passed, test = run(target, fault.tests, fault.select)
      path.write_text(original)
      seconds = time.monotonic() - start
      if passed:
        survived.append(fault.name)
        test = "NOTHING"
      print(f"{fault.name:48} {fault.kind:10} {fault.file:26} {seconds:3.0f}  {test}", flush=True)
  if survived:
    raise SystemExit(f"survived: {', '.join(survived)}")
  print(f"{len(chosen)} faults, all caught")


if __name__ == "__main__":
  main()
