"""What the documents tell a reader to type: blocks, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_INLINE = re.compile(r"`(python -m vsae_jax\.\w+ --[^`]*)`")


def blocks(page: Path, language: str = "") -> list[str]:
    """The page's fenced blocks of a language, in their order."""
    fenced = re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [block for marked, block in fenced if marked == language]


def commands(block: str) -> list[list[str]]:
    """The lines of a block that are a command of ours, as its name and its flags;
    continuations are joined, comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    ours = [line for line in lines if line.startswith("python -m vsae_jax.")]
    words = [shlex.split(line, comments=True)[2:] for line in ours]
    return [[name.removeprefix("vsae_jax."), *flags] for name, *flags in words]


def every_command(page: Path) -> list[list[str]]:
    """The commands of all blocks, and those that stand in the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    written = [*blocks(page), *_INLINE.findall(text)]
    found = [command for block in written for command in commands(block)]
    return [command for command in found if command[1:] != ["--help"]]
