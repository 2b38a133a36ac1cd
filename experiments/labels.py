"""Labelled texts made from stories by a rule, for a study without labelled data.

The label is the animal that a story's beginning names, where it names just one; the
attribute is whether its words for people are at least two to one of one gender. Written
as JSON lines with the columns text, animal and hero.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file

ANIMALS = ("bird", "cat", "dog")
HEROES = {"girl": ("she", "her", "hers", "girl"), "boy": ("he", "him", "his", "boy")}
# About what fits into the context of 128 tokens that texts are cut to.
_CHARACTERS = 450
# Fewer texts of an animal and a hero than that are too few to probe.
_LEAST = 25
LABEL, ATTRIBUTE = "animal", "hero"


def write(path: Path, stories: Iterable[str], *, most: int) -> Path:
    """Writes at most `most` texts of each label and attribute; nothing where the file
    is there."""
    if path.is_file():
        return path
    cells: dict[tuple[str, str], list[str]] = {}
    for text in stories:
        if found := labels_of(text[:_CHARACTERS]):
            cell = cells.setdefault(found, [])
            if len(cell) < most:
                cell.append(text[:_CHARACTERS])
    counts = {(a, h): len(cells.get((a, h), [])) for a in ANIMALS for h in HEROES}
    if min(counts.values()) < _LEAST:
        raise UserError(
            f"the stories have too few texts for labels, {counts}, where {_LEAST} of "
            "each are needed; give more text, or labelled texts with --labelled"
        )
    lines = [
        json.dumps({"text": text, LABEL: animal, ATTRIBUTE: hero}) + "\n"
        for (animal, hero), texts in sorted(cells.items())
        for text in texts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(lines).encode())
    return path


def all_but_last(texts: Iterable[str], n: int) -> Iterator[str]:
    """The texts without the last `n`, as they are read."""
    held: deque[str] = deque()
    for text in texts:
        held.append(text)
        if len(held) > n:
            yield held.popleft()


def labels_of(text: str) -> tuple[str, str] | None:
    """(animal, hero) where there is just one of each."""
    words = re.findall(r"[a-z]+", text.lower())
    animals = [animal for animal in ANIMALS if animal in words]
    girl, boy = (sum(map(words.count, of_hero)) for of_hero in HEROES.values())
    if len(animals) != 1 or max(girl, boy) < 2 * min(girl, boy) or girl == boy:
        return None
    return animals[0], "girl" if girl > boy else "boy"
