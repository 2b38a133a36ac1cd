"""JSON objects from files that may be anyone's: bounded, with one-line errors."""

import json
from pathlib import Path
from typing import Any

from vsae_jax.system.errors import UserError, one_line


def read_object(path: Path, *, limit: int, strict: bool = True) -> dict[str, Any]:
    """`parse_object` of a file of at most `limit` bytes."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} has over {limit} bytes, more than belong there")
    return parse_object(data, path, strict=strict)


def parse_object(data: bytes, path: Path, *, strict: bool = True) -> dict[str, Any]:
    """A JSON object; `strict` refuses NaN, infinity and a name that occurs twice."""
    options: dict[str, Any] = {
        "parse_constant": refuse_constant,
        "object_pairs_hook": _no_twins,
    }
    try:
        value = json.loads(data, **(options if strict else {}))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; expected an object")
    return value


def refuse_constant(name: str) -> None:
    """A hook of `json.loads` that refuses NaN and infinity, which are not JSON."""
    raise ValueError(f"{name} is not a finite number")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return value
