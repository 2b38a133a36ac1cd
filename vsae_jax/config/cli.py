"""A config dataclass as absl flags: one flag per field, and back to the dataclass.

Flags live in a `FlagValues` of their own, so importing a command never defines
flags, and two commands never collide.
"""

import dataclasses
import errno
import inspect
import itertools
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from absl import flags

from vsae_jax.config.fields import REQUIRED, as_flag
from vsae_jax.config.presets import default_help
from vsae_jax.system.errors import Interrupted, UserError, did_you_mean, one_line

# How XLA begins to say that an allocation failed.
_NO_MEMORY = "RESOURCE_EXHAUSTED"
_LONGEST_NAME = 100
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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        go_on = "; make room and run the same command again" if full else ""
        return _say(f"error: {error.strerror or one_line(error)}{where}{go_on}", 2)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and _NO_MEMORY not in str(error):
            raise
        return _say(f"error: {_out_of_memory(error, config_class)}", 2)
    return 0


def parse(config_class: type, argv: Sequence[str]) -> list[Any]:
    """Configs from `argv[1:]`: the cross product of all comma lists, in flag order.

    Raises UserError for unknown flags, bad values and positional arguments.
    """
    values = flag_values(config_class)
    for name in (arg.split("=")[0] for arg in argv[1:] if arg.startswith("-")):
        # absl's search for a similar name recurses over its letters.
        if len(name) > _LONGEST_NAME:
            raise UserError(f"unknown flag {name[:40]}... (see --help)")
    try:
        rest = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        near = did_you_mean(error.flagname, values, prefix="--")
        raise UserError(f"unknown flag --{error.flagname}{near} (see --help)") from None
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
        parser = _Parser(hints[field.name], grid=field.metadata.get("grid", False))
        flag = flags.Flag(
            parser, None, field.name, None, field.metadata["help"], allow_override=True
        )
        flag.boolean = parser.boolean
        flag.value = field.default
        flags.DEFINE_flag(flag, flag_values=values)
    return values


def help_text(config_class: type) -> str:
    """The command's description and every flag with its unit and default, by groups."""
    hints = typing.get_type_hints(config_class)
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(config_class):
        lines = groups.setdefault(field.metadata.get("group", "flags"), [])
        kind = _Parser(hints[field.name], grid=False).syntax()
        many = " (takes a comma list)" if field.metadata.get("grid") else ""
        default = field.metadata.get("default_help", field.default)
        if table := field.metadata.get("preset_table"):
            default = default_help(field.name, table=table)
        default = "none" if default in (None, "") else as_flag(default)
        note = REQUIRED if default == REQUIRED else f"default: {default}"
        lines.append(f"  --{field.name}={kind}{many}")
        lines.append(f"      {field.metadata['help']} ({note})")
    parts = (["", f"{group}:", *lines] for group, lines in groups.items())
    return "\n".join([inspect.getdoc(config_class) or "", *itertools.chain(*parts)])


class _Parser(flags.ArgumentParser):
    """Reads one value, or with `grid` a comma list of values, of a field's type."""

    def __init__(self, hint: Any, *, grid: bool):
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        self.options = typing.get_args(hint) if union else (hint,)
        self.options = tuple(o for o in self.options if o is not type(None))
        self.grid = grid
        self.boolean = bool in self.options

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        if not self.grid or "," not in argument:
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
        if "," in text and not self.grid:
            raise ValueError(f"{text!r} is a list; it takes one {self.syntax()}")
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
    if not number.is_integer() or abs(number) >= 2**63:
        raise ValueError
    return int(number)


def _syntax(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "|".join(str(value) for value in typing.get_args(option))
    names = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return names[option]


def _out_of_memory(error: BaseException, config_class: type) -> str:
    names = [field.name for field in dataclasses.fields(config_class)]
    lower = [f"--{name}" for name in ("batch_size", "d_sae") if name in names]
    ways = f"; lower {' or '.join(lower)}" if lower else ""
    return f"out of memory{ways} ({one_line(error)})"


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
