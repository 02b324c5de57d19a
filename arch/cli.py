"""What the command-line programs share: flags with helpful errors, and exit codes."""

import difflib
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from .training.workdir import flatten


def run(main: Callable[[], int]) -> None:
  """Parses the flags, runs `main`, and exits with what it returns.

  A mistake of the user's (`ValueError`, `OSError`, a wrong flag) is one line and exit code 1;
  with `--verbosity=1` the traceback too.
  """
  app.run(lambda argv: _guarded(main), flags_parser=_parse)


def early_flag(name: str) -> str | None:
  """The value of `--name` on the command line, for what must be known to define other flags."""
  arguments = iter(sys.argv[1:])
  for argument in arguments:
    flag, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and flag == name:
      return value if equals else next(arguments, None)
  return None


def fail(error: object) -> None:
  """Says what is wrong in one line and exits with code 1."""
  print(f"error: {error}", file=sys.stderr)
  sys.exit(1)


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, KeyError):
    fail(_unknown_field(argv))
  except (flags.Error, TypeError, ValueError, OSError) as error:
    fail(error)
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # libraries tell too much at absl's own default
  if rest[1:]:
    fail(f"unexpected argument {rest[1]!r}; options are written --name=value")
  return rest


def _unknown_field(argv: list[str]) -> str:
  """Names the first override of a field that does not exist, and the closest one that does."""
  # ml_collections looks for the overrides in sys.argv, whatever it is asked to parse.
  sys.argv = [a for a in argv if not a.lstrip("-").startswith("config.")]
  flags.FLAGS(sys.argv)
  known = flatten(flags.FLAGS["config"].value)
  for argument in argv:
    flag = argument.lstrip("-").partition("=")[0]
    field = flag.removeprefix("config.")
    if flag != field and field not in known:
      closest = difflib.get_close_matches(field, known, n=1, cutoff=0)[0]
      return f"there is no --config.{field}; the closest is --config.{closest}"
  return f"unknown configuration field in {' '.join(argv[1:])}"


def _guarded(main: Callable[[], int]) -> int:
  try:
    return main()
  except (ValueError, OSError, FloatingPointError) as error:
    logging.debug("%s", traceback.format_exc())
    fail(error)
