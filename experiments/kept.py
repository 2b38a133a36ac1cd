"""What a study says in short, kept as a file beside its report, so that the reports of
other scales can show it in a column of their own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.scales import SCALES
from experiments.study import Study
from vsae_jax.system.files import replace_file

RESULTS = Path(__file__).parent / "results"
# A line of a table: its first value is what the line is about.
Line = Mapping[str, str]


def keep(study: Study, name: str, lines: Sequence[Line]) -> None:
    """Writes `OUT/<name>.json`."""
    text = json.dumps(lines, indent=1) + "\n"
    replace_file(study.out / f"{name}.json", text.encode())


def elsewhere(study: Study, name: str) -> dict[str, dict[str, Line]]:
    """What is kept of other scales: by scale, by what a line is about. The study's own
    scale is told by its figures, whatever its text and its folder."""
    found = {}
    for scale, other in SCALES.items():
        path = RESULTS / scale / f"{name}.json"
        if other.figures != study.scale.figures and path.is_file():
            lines = json.loads(path.read_text())
            found[scale] = {next(iter(v.values())): v for v in lines}
    return found
