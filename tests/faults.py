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

from faults_listed import FAULTS

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60


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
    "PYTHONPATH": os.pathsep.join(str(target / name) for name in ("path", "benchmarks")),
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
