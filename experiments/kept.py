"""What a study says in short, kept as a file beside its report, so that the reports of
other scales can show it in a column of their own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """What is kept of other scales: by scale, by what a line is about."""
    found = {}
    for path in sorted(RESULTS.glob(f"*/{name}.json")):
        if path.resolve() != (study.out / path.name).resolve():
            lines = json.loads(path.read_text())
            found[path.parent.name] = {next(iter(v.values())): v for v in lines}
    return found
