"""Where in a language model activations are taken, in TransformerLens' words."""

import re
from typing import Literal, NamedTuple

Site = Literal["resid_post", "mlp_out", "attn_out"]
_NAME = re.compile(r"blocks\.(\d{1,4})\.hook_(resid_post|mlp_out|attn_out)")


class Hook(NamedTuple):
    """A site of a block.

    layer: the block, from 0.
    site: `resid_post`, the residual stream after the block; `attn_out` or `mlp_out`,
      what its attention or its MLP adds to the stream (where a family normalises that
      once more, as Gemma 2 and 3 do, after this norm).
    """

    layer: int
    site: Site = "resid_post"

    @property
    def name(self) -> str:
        """`blocks.3.hook_mlp_out`"""
        return f"blocks.{self.layer}.hook_{self.site}"


def read_hook(name: str | None) -> Hook | None:
    """The hook of that name; None where it is none of ours."""
    match = _NAME.fullmatch(name or "")
    return Hook(int(match[1]), match[2]) if match else None  # pyright: ignore[reportArgumentType]
