"""Configurations as JSON, and their fields by dotted names."""

from typing import Any

from ml_collections import ConfigDict, config_dict

_TUPLE = "__tuple__"
_PLACEHOLDER = "__placeholder__"
_PLACEHOLDER_TYPES = {t.__name__: t for t in (bool, int, float, str, tuple)}


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """The fields of a configuration by their dotted names."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def encode_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """A configuration as JSON knows it; `prefix` is what fields are called in errors."""
  encoded = {}
  for key, value in config.items():
    kind = config.get_type(key)
    if isinstance(value, ConfigDict):
      encoded[key] = encode_config(value, f"{prefix}{key}.")
    elif value is None and kind.__name__ in _PLACEHOLDER_TYPES:
      encoded[key] = {_PLACEHOLDER: kind.__name__}
    else:
      encoded[key] = _encode_value(value, prefix + key)
  return encoded


def _encode_value(value: Any, name: str) -> Any:
  if isinstance(value, tuple):
    return {_TUPLE: [_encode_value(v, name) for v in value]}
  if isinstance(value, list):
    return [_encode_value(v, name) for v in value]
  if value is None or type(value) in (bool, int, float, str):
    return value
  raise ValueError(
    f"configuration field {name} is {value!r} of type {type(value).__name__}: expected a bool, "
    "int, float, str, None, or a tuple or list of these"
  )


def decode_config(value: Any) -> Any:
  """The inverse of `encode_config`."""
  if isinstance(value, list):
    return [decode_config(v) for v in value]
  if not isinstance(value, dict):
    return value
  if _TUPLE in value:
    return tuple(decode_config(v) for v in value[_TUPLE])
  if _PLACEHOLDER in value:
    return config_dict.placeholder(_PLACEHOLDER_TYPES[value[_PLACEHOLDER]])
  return ConfigDict({k: decode_config(v) for k, v in value.items()})
