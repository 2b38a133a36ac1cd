"""Fields of a config: as flags, as JSON, and checked."""

import dataclasses
import types
import typing
from typing import Any

from vsae_jax.system.errors import UserError, did_you_mean

_FLOAT32_END = 2.0**128
# The `default_help` of a flag without which a command does nothing.
REQUIRED = "required"


def flag(
    help: str,
    default: Any = None,
    *,
    grid: bool = False,
    runtime: bool = False,
    traced: bool = False,
    before: Any = None,
    default_help: str | None = None,
    preset_table: str | None = None,
    group: str = "flags",
) -> Any:
    """A config field that is also a command-line flag.

    grid: it takes a comma list.
    runtime: it leaves the result of a run as it is.
    traced: it is a number of the compiled step; changing it does not recompile.
    before: its value in files that are older than the field.
    default_help: what `--help` says of the default, where not the default itself.
    preset_table: the table of presets that its default comes from.
    group: the heading that it stands under in `--help`.
    """
    metadata: dict[str, Any] = {"help": help, "group": group}
    metadata |= {"grid": grid, "runtime": runtime, "traced": traced}
    optional = {
        "before": before,
        "default_help": default_help,
        "preset_table": preset_table,
    }
    metadata |= {name: v for name, v in optional.items() if v is not None}
    return dataclasses.field(default=default, metadata=metadata)


def as_flag(value: Any) -> str:
    """A value as one would type it after a flag."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def traced(config: Any) -> dict[str, int | float]:
    """The numbers of a resolved config that its compiled step takes, by field: int
    where the field is a whole number."""
    hints = typing.get_type_hints(type(config))
    return {
        f.name: (int if hints[f.name] is int else float)(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if f.metadata.get("traced")
    }


def with_new_fields(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON object with the fields that are younger than the file."""
    fields = dataclasses.fields(config_class)
    younger = {f.name: f.metadata["before"] for f in fields if "before" in f.metadata}
    return {**younger, **values}


def to_json(config: Any) -> dict[str, Any]:
    """A config as a JSON object."""
    return dataclasses.asdict(config)


def from_json(
    config_class: type,
    values: Any,
    *,
    where: str,
    may_lack: frozenset[str] = frozenset(),
) -> Any:
    """A config from a JSON object; keys that are unknown or missing, and values of
    another type, are refused by name. `may_lack` are fields that an older version
    did not have; they get their defaults."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {config_class.__name__} is no JSON object there")
    values = with_new_fields(config_class, values)
    hints = typing.get_type_hints(config_class)
    wrong = sorted((hints.keys() ^ values.keys()) - (may_lack - values.keys()))
    wrong += [n for n in values if n in hints and not _fits(values[n], hints[n])]
    if wrong:
        raise UserError(
            f"{where}: {config_class.__name__} does not match this version at "
            f"{', '.join(wrong)}"
        )
    return config_class(**values)


def from_keywords(config_class: type, values: dict[str, Any], *, of: str) -> Any:
    """A config from the keywords of a call of the function `of`: unknown ones and
    values of another type are refused by name."""
    hints = typing.get_type_hints(config_class)
    values = {n: v.item() if hasattr(v, "item") else v for n, v in values.items()}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{of} has no keyword {name}{did_you_mean(name, hints)}")
        if value is not None and not _fits(value, hints[name]):
            hint = hints[name]
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise UserError(f"{name}={value!r} is not {wanted.replace('typing.', '')}")
    return config_class(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a field's type."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`name: old -> new` for every key that differs, or an empty string."""
    return ", ".join(
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def fill(config: Any, defaults: dict[str, Any]) -> Any:
    """The config with its unset fields among `defaults` filled."""
    unset = {n: v for n, v in defaults.items() if getattr(config, n) is None}
    return dataclasses.replace(config, **unset)


def _numbers(config: Any, names: tuple[str, ...]) -> list[tuple[str, int | float]]:
    pairs = [(name, getattr(config, name)) for name in names]
    pairs = [(name, v) for name, v in pairs if v is not None and not isinstance(v, str)]
    for name, value in pairs:
        if not abs(value) < _FLOAT32_END:
            raise UserError(f"--{name}={value} must be a finite number (of float32)")
    return pairs


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Refuses a number below `least`, naming its flag; so do the other checks."""
    for name, value in _numbers(config, names):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")


def check_above_zero(config: Any, *names: str) -> None:
    """Refuses a number that is not above 0."""
    for name, value in _numbers(config, names):
        if value <= 0:
            raise UserError(f"--{name}={value} must be above 0")


def check_below(config: Any, limit: int, *names: str) -> None:
    """Refuses a number that is not below `limit`."""
    for name, value in _numbers(config, names):
        if value >= limit:
            raise UserError(f"--{name}={value} must be below {limit}")
