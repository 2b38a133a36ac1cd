"""A config dataclass as absl flags: one flag per field, and back to the dataclass.

Flags live in a `FlagValues` of their own, so importing a command never defines
flags, and two commands never collide.
"""

import dataclasses
import itertools
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from absl import flags

from vsae_jax.errors import Interrupted, UserError, one_line

_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


def main(command: Callable[[Sequence[Any]], None], config_class: type) -> None:
    """Parses `sys.argv` into configs and runs `command` on them; never a traceback
    for a user's mistake. `command` gets one config, or one per arm of a grid."""
    sys.exit(run(command, config_class, sys.argv))


def run(
    command: Callable[[Sequence[Any]], None], config_class: type, argv: Sequence[str]
) -> int:
    """The exit status of `command` under `argv`: 0, 2 for a user's mistake, or
    128 + signal where a signal stopped it after saving."""
    try:
        if any(arg in ("--help", "-h", "--helpfull", "--helpshort") for arg in argv):
            print(help_text(config_class))
            return 0
        command(parse(config_class, argv))
    except UserError as error:
        return _say(f"error: {one_line(error)}", 2)
    except Interrupted as stop:
        return _say(one_line(stop), stop.exit_status)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" at {error.filename!r}" if error.filename else ""
        return _say(f"error: {error.strerror or one_line(error)}{where}", 2)
    return 0


def parse(config_class: type, argv: Sequence[str]) -> list[Any]:
    """Configs from `argv[1:]`: the cross product of all comma lists, in flag order.

    Raises UserError for unknown flags, bad values and positional arguments.
    """
    values = flag_values(config_class)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{one_line(error)} (see --help)") from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; flags start with --")
    fields = dataclasses.fields(config_class)
    chosen = [values[field.name].value for field in fields]
    columns = [v if isinstance(v, tuple) else (v,) for v in chosen]
    names = [field.name for field in fields]
    return [
        config_class(**dict(zip(names, row, strict=True)))
        for row in itertools.product(*columns)
    ]


def flag_values(config_class: type) -> flags.FlagValues:
    """One absl flag per field of `config_class`; a repeated flag: the last wins."""
    values = flags.FlagValues()
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        parser = _Parser(hints[field.name], sweep=field.metadata.get("sweep", False))
        flag = flags.Flag(
            parser, None, field.name, None, field.metadata["help"], allow_override=True
        )
        flag.boolean = parser.boolean
        flag.value = field.default
        flags.DEFINE_flag(flag, flag_values=values)
    return values


def help_text(config_class: type) -> str:
    """The command's description and every flag with its unit and default."""
    hints = typing.get_type_hints(config_class)
    lines = [(config_class.__doc__ or "").strip(), "", "flags:"]
    for field in dataclasses.fields(config_class):
        kind = _Parser(hints[field.name], sweep=False).syntax()
        many = " (takes a comma list)" if field.metadata.get("sweep") else ""
        default = field.metadata.get("default_help", field.default)
        default = "none" if default in (None, "") else default
        lines.append(f"  --{field.name}={kind}{many}")
        lines.append(f"      {field.metadata['help']} (default: {default})")
    return "\n".join(lines)


class _Parser(flags.ArgumentParser):
    """Reads one value, or with `sweep` a comma list of values, of a field's type."""

    def __init__(self, hint: Any, *, sweep: bool):
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        self.options = typing.get_args(hint) if union else (hint,)
        self.options = tuple(o for o in self.options if o is not type(None))
        self.sweep = sweep
        self.boolean = bool in self.options

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        if not self.sweep or "," not in argument:
            return self._one(argument)
        values = tuple(self._one(part.strip()) for part in argument.split(","))
        if len(set(values)) != len(values):
            raise ValueError(f"a value stands twice in {argument!r}")
        return values

    def _one(self, text: str) -> Any:
        for option in self.options:
            try:
                return _convert(text, option)
            except ValueError:
                continue
        raise ValueError(f"{text!r} is not {self.syntax()}")

    def syntax(self) -> str:
        return "|".join(_syntax(option) for option in self.options)


def _convert(text: str, option: Any) -> Any:
    if typing.get_origin(option) is Literal:
        if text in typing.get_args(option):
            return text
        raise ValueError
    if option is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ValueError
    if option is int:
        return _whole_number(text)
    return option(text)


def _whole_number(text: str) -> int:
    """`2000000`, `2_000_000` and `2e6` are the same number."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _syntax(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "|".join(str(value) for value in typing.get_args(option))
    names = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return names[option]


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
