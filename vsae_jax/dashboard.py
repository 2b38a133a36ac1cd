"""`python -m vsae_jax.dashboard --run=RUN [--compare=RUN2]`: an HTML page of an
autoencoder's latents, or of two autoencoders' side by side.

The page needs no network and no server. It holds its data (see page_data.py) as gzip in
base64, in blocks that are unpacked when they are looked at; the files of page/ draw it.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vsae_jax import features, lm, runs
from vsae_jax.config import DashboardConfig, FeaturesConfig, cli
from vsae_jax.config.dashboard import wanted_latents
from vsae_jax.interop.loading import open_any
from vsae_jax.latents import matching
from vsae_jax.latents.feature_files import ARRAYS, FOLDER, INFO
from vsae_jax.latents.matching import Matching
from vsae_jax.report import page_data
from vsae_jax.report.page_data import CHUNK, CHUNK_IN_BRIEF, Features
from vsae_jax.system.errors import UserError, one_line
from vsae_jax.system.files import replace_file

MOST_BYTES = 25 * 10**6
_SCRIPTS = "text data charts map overview table feature prompts app".split()


def command(configs: Sequence[DashboardConfig]) -> None:
    """Writes the page."""
    run(configs[0])


def run(c: DashboardConfig) -> Path:
    """Writes the page; returns it."""
    folders = [Path(folder) for folder in (c.run, c.compare) if folder]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name what train wrote")
        if (folder / runs.GRID).is_file():
            there = ", ".join(arm.name for arm in runs.run_folders(folder))
            raise UserError(f"{folder} is a grid; name one of the runs in it: {there}")
    lm.leave_room(backend=c.backend, device=c.device)
    sides = [ready(folder, c) for folder in folders]
    matched = _matched(sides) if len(sides) > 1 else None
    out = Path(c.out) if c.out else folders[0] / "dashboard.html"
    page = assemble(blocks(sides, c.features, names(folders), matched))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page)
    for line in matching.describe(matched) if matched else ():
        print(line)
    print(f"wrote {out}: {len(page) / 1e6:.1f} MB; open it in a browser")
    if len(page) > MOST_BYTES:
        print(f"note: it is over {MOST_BYTES // 10**6} MB; lower --features")
    return out


def names(folders: list[Path]) -> list[str]:
    """The runs' names: their folders' names, with the parents' if those are equal."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def ready(folder: Path, c: DashboardConfig) -> Features:
    """The run's `features/`, made if they are missing or out of date."""
    opened = open_any(folder)
    path = folder / FOLDER / INFO
    info = runs.read_json(path) if path.is_file() else {}
    if reason := _stale(info, opened, c):
        print(f"{folder}: {reason}, looking at held-out tokens")
        shared = ("model", "layer", "backend", "lm_dtype", "device", "activations")
        asked = {name: getattr(c, name) for name in shared}
        if c.num_tokens is not None:
            asked["num_tokens"] = c.num_tokens
        features.run(FeaturesConfig(run=str(folder), **asked))
        info = runs.read_json(path)
    try:
        # np.load does not close a file that turns out not to be an archive.
        with (folder / FOLDER / ARRAYS).open("rb") as file:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{folder / FOLDER / ARRAYS} cannot be read ({one_line(error)}); make it "
            f"again: python -m vsae_jax.features --run={folder}"
        ) from None
    return Features(opened, arrays, info)


def _stale(info: dict[str, Any], opened: runs.TrainedSAE, c: DashboardConfig) -> str:
    """The reason why `features/` must be made (again), or ""."""
    if not info:
        return f"no {FOLDER}/ yet"
    if info.get("parameters") != features.parameters_hash(opened):
        return f"{FOLDER}/ is of other parameters"
    made = info.get("config", {})
    asked = {"num_tokens": c.num_tokens, "activations": c.activations or None}
    for name, value in asked.items():
        if value is not None and made.get(name) != value:
            return f"{FOLDER}/ was made with --{name}={made.get(name)}"
    return ""


def choose(side: Features, asked: str) -> list[int]:
    """The latents shown in full, sorted by number."""
    found, d_sae = wanted_latents(asked), side.run.sae.d_sae
    if isinstance(found, list):
        if max(found) >= d_sae:
            raise UserError(
                f"--features={max(found)} is no latent of {side.run.folder}, which has "
                f"{d_sae}, from 0"
            )
        return sorted(set(found))
    if found >= d_sae:
        return list(range(d_sae))
    fired = side.arrays["n_fired"]
    alive = np.argsort(fired, kind="stable")[int((fired == 0).sum()) :]
    places = np.linspace(0, len(alive) - 1, min(found, len(alive))).astype(int)
    return sorted(alive[np.unique(places)].tolist())


def blocks(
    sides: list[Features], asked: str, called: list[str], matched: Matching | None
) -> dict[str, Any]:
    """The page's data by id: the overview, latents in full in groups of sixteen, and
    the strongest texts of the others."""
    partners = _partners(sides, matched) if matched else []
    full = _in_full(sides, partners, asked)
    overviews = [
        page_data.overview(side, chosen, name=name)
        for side, chosen, name in zip(sides, full, called, strict=True)
    ]
    for one, pair in zip(overviews, partners, strict=False):
        one["columns"]["partner"] = pair[0].tolist()
        one["columns"]["cosine"] = page_data.shorts(pair[1])
    found: dict[str, Any] = {"overview": {"sides": overviews}}
    if matched:
        found["overview"]["matching"] = {
            "said": matching.describe(matched),
            "chance": page_data.shorts(matched.chance),
        }
    for letter, side, chosen in zip("ab", sides, full, strict=False):
        for number, some in enumerate(batched(chosen, CHUNK)):
            found[f"features-{letter}-{number}"] = [
                page_data.feature(side, latent) for latent in some
            ]
        rest = sorted(set(range(side.run.sae.d_sae)).difference(chosen))
        for number, some in enumerate(batched(rest, CHUNK_IN_BRIEF)):
            found[f"briefs-{letter}-{number}"] = page_data.briefs(side, some)
    return found


def batched(latents: list[int], size: int) -> list[list[int]]:
    """The list in pieces of `size`; the last one may be shorter."""
    return [latents[start : start + size] for start in range(0, len(latents), size)]


def _in_full(
    sides: list[Features], partners: list[tuple[np.ndarray, np.ndarray]], asked: str
) -> list[list[int]]:
    """The latents that each side shows in full: the chosen ones of both sides and their
    partners. A list names latents of the first side; then only those are chosen."""
    full = [choose(sides[0], asked)]
    if not partners:
        return full
    full.append(
        [] if isinstance(wanted_latents(asked), list) else choose(sides[1], asked)
    )
    more = [pair[0][chosen] for pair, chosen in zip(partners, full, strict=True)]
    return [
        sorted({*chosen, *others[others >= 0].tolist()})
        for chosen, others in zip(full, reversed(more), strict=True)
    ]


def _matched(sides: list[Features]) -> Matching:
    a, b = sides
    if a.run.sae.d_model != b.run.sae.d_model:
        raise UserError(
            f"{a.run.folder} has d_model={a.run.sae.d_model} and {b.run.folder} "
            f"{b.run.sae.d_model}: they read different activations"
        )
    alive_a, alive_b = (side.arrays["n_fired"] > 0 for side in sides)
    return matching.compare(a.run, b.run, alive_a=alive_a, alive_b=alive_b)


def _partners(
    sides: list[Features], matched: Matching
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each side's partners in the other, and the cosines of the pairs."""
    partner, cosine = matched.partner, matched.cosine
    back = np.full(sides[1].run.sae.d_sae, -1)
    there = np.flatnonzero(partner >= 0)
    back[partner[there]] = there
    return [(partner, cosine), (back, np.where(back >= 0, cosine[back], 0.0))]


def assemble(data: dict[str, Any]) -> bytes:
    """The page, with its parts in one file. It may run no script but its own, whose
    hash is in the Content-Security-Policy, and load nothing."""
    folder = resources.files("vsae_jax") / "report/page"
    read = {n: (folder / f"{n}.js").read_text(encoding="utf-8") for n in _SCRIPTS}
    script = '"use strict";\n' + "\n".join(read[name] for name in _SCRIPTS)
    style = (folder / "style.css").read_text(encoding="utf-8")
    parts = {
        "script": script,
        "style": style,
        "script_hash": _csp_hash(script),
        "style_hash": _csp_hash(style),
        "data": "\n".join(_block(name, value) for name, value in data.items()),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page).encode()


def _block(name: str, value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}">{packed}</script>'


def _csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


if __name__ == "__main__":
    cli.main(command, DashboardConfig)
