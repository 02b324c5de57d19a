"""What the command-line programs share: flags with helpful errors, and exit codes."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from .closest import closest
from .training.config_json import flatten

INTERRUPTED = 130  # as shells count it: 128 and the number of SIGINT

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
_WRONG_TYPE = re.compile(r"flag (--config\.([^=]+)=.*?): ", re.DOTALL)
_EXAMPLES = {int: 8, float: 0.1, bool: True, str: "text", tuple: "'(1, 2)'"}
_PARSING_ERRORS = (AttributeError, KeyError, flags.Error, TypeError, ValueError, OSError)


def run(main: Callable[..., int], *, takes_arguments: bool = False) -> None:
  """Parses the flags, runs `main`, and exits with what it returns.

  With `takes_arguments` there may be others between the flags, which `main` is given as a list.

  A mistake of the user's (`ValueError`, `OSError`, a wrong flag) is one line and exit code 1;
  with `--verbosity=1` the traceback too. Ctrl-C is exit code 130.
  """
  flags.FLAGS.set_gnu_getopt(takes_arguments)
  app.run(
    lambda argv: _guarded(main, *([argv[1:]] if takes_arguments else [])),
    flags_parser=functools.partial(_parse, takes_arguments=takes_arguments),
  )


def define_config(config: ConfigDict) -> flags.FlagHolder:
  """Defines `--config.FIELD=value` for the fields of a configuration that is known already."""
  try:
    return config_flags.DEFINE_config_dict("config", config)
  except _PARSING_ERRORS as error:
    fail(_explain(error, sys.argv, config))


def early_flag(name: str) -> str | None:
  """The value of `--name` on the command line, for what must be known to define other flags."""
  value = None
  arguments = iter(sys.argv[1:])
  for argument in arguments:
    if argument == "--":
      break
    flag, equals, given = argument.lstrip("-").partition("=")
    if argument.startswith("-") and flag == name:
      value = given if equals else next(arguments, None)
  return value  # of several, the last one, as absl takes it


def fail(error: object) -> NoReturn:
  """Says what is wrong in one line and exits with code 1."""
  print(f"error: {error}", file=sys.stderr)
  sys.exit(1)


def _parse(argv: list[str], *, takes_arguments: bool) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      hasattr(flags.FLAGS.config, "model")  # a file that is missing is an error when it is used
  except _PARSING_ERRORS as error:
    fail(_explain(error, argv, _without_overrides(argv)))
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # libraries tell too much at absl's own default
  if rest[1:] and not takes_arguments:
    fail(f"unexpected argument {rest[1]!r}; options are written --name=value")
  return rest


def _without_overrides(argv: list[str]) -> ConfigDict:
  """The configuration that the arguments override, empty if they name none that can be read."""
  # ml_collections looks for the overrides in sys.argv, whatever it is asked to parse.
  sys.argv = [argument for argument in argv if not _OVERRIDE.match(argument)]
  try:
    flags.FLAGS(sys.argv, known_only=True)
    config = flags.FLAGS["config"].value
  except _PARSING_ERRORS:
    config = None
  return config if isinstance(config, ConfigDict) else ConfigDict()


def _explain(error: Exception, argv: list[str], config: ConfigDict) -> str:
  """One line on what is wrong with the flags, from what absl or ml_collections raised."""
  known = flatten(config)
  if known and isinstance(error, AttributeError | KeyError):
    fields = (match[1] for match in map(_OVERRIDE.match, argv) if match)
    if unknown := next((field for field in fields if not _is_field(config, field)), None):
      return _unknown_field(unknown, config)
  if (wrong := _WRONG_TYPE.match(str(error))) and known:
    return f"{wrong[1]}: {_expected(wrong[2], config)}"
  message = str(error).strip()
  last_line = message.splitlines()[-1].strip()
  if "Traceback (most recent call last)" in message:  # raised by a file that --config names
    return f"{message.partition(': Error whilst')[0]}: {last_line.partition(': ')[2]}"
  return f"--config: {last_line}" if "Attempted [" in message else message


def _is_field(config: ConfigDict, name: str) -> bool:
  return name in flatten(config) or isinstance(_section(config, name), ConfigDict)


def _section(config: ConfigDict, name: str) -> ConfigDict | None:
  for part in filter(None, name.split(".")):
    config = config.get(part) if isinstance(config, ConfigDict) else None
  return config


def _unknown_field(field: str, config: ConfigDict) -> str:
  if guess := closest(field, flatten(config)):
    return f"there is no --config.{field}; the closest is --config.{guess}"
  name = field.rpartition(".")[0]
  section = _section(config, name)
  if not isinstance(section, ConfigDict):
    name, section = "", config
  place = f"config.{name}" if name else "config"
  return f"there is no --config.{field}; {place} has {_names(section)}"


def _expected(field: str, config: ConfigDict) -> str:
  value = _section(config, field)
  if isinstance(value, ConfigDict):
    return f"expected one of its fields, {_names(value)}"
  name, _, last = field.rpartition(".")
  kind = _section(config, name).get_type(last)
  article = "an" if kind is int else "a"
  example = _EXAMPLES.get(kind) if value is None else value
  return f"expected {article} {kind.__name__}, such as {example}"


def _names(section: ConfigDict) -> str:
  return ", ".join(sorted(section))


def _guarded(main: Callable[..., int], *arguments: list[str]) -> int:
  try:
    return main(*arguments)
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return INTERRUPTED
  except BrokenPipeError:
    # The reader of the output, such as `head`, has had enough; flushing at exit would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (ValueError, OSError, FloatingPointError) as error:
    logging.debug("%s", traceback.format_exc())
    fail(error)
