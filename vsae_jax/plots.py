"""`python -m vsae_jax.plots --run=GRID`: the paper's figures from the files of runs.

    training        loss, explained variance, dead latents: metrics.jsonl over steps
    core            figure 3: evals/core.json over k
    scr, tpp        figures 4 and 5: evals/scr.json, tpp.json over the number of
                    ablated latents (the paper calls it a threshold)
    sparse_probing  evals/sparse_probing.json over k
    features        figures 6 and 7: a page for each latent in maximised/
    max_activations figures 8 and 9, not clipped: features/features.npz
    maps            figures 10 and 11: maps/maps.npz
    cosines         cosines between decoder rows: maps/maps.npz and the parameters

Each is written as SVG and PNG. Where a file is missing, the command that makes it is
named.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vsae_jax.config import PlotsConfig, cli
from vsae_jax.runs.series import Arm, MissingFile, open_arms
from vsae_jax.system.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Sequence[Arm]], "Iterator[tuple[str, Figure]]"]


def command(configs: Sequence[PlotsConfig]) -> None:
    """Draws the figures."""
    run(configs[0])


def run(c: PlotsConfig) -> list[Path]:
    """Writes the figures; returns the files."""
    known = figures()
    names = [name.strip() for name in c.figures.split(",")] if c.figures else known
    for name in names:
        if name not in known:
            there = ", ".join(known)
            raise UserError(f"--figures={name} is not known; there is {there}")
    arms = open_arms(c.run)
    out = Path(c.out) if c.out else Path(c.run) / "figures"
    written: list[Path] = []
    for name in names:
        try:
            written += _draw(known[name], arms, out)
        except MissingFile as error:
            if c.figures:
                raise
            print(f"{name} is left out: {error}")
    if not written:
        raise UserError(f"{c.run} has no files to draw figures from yet")
    return written


def _draw(draw: Draw, arms: Sequence[Arm], out: Path) -> list[Path]:
    from vsae_jax.report.figures import style

    written = []
    with style.applied():
        for name, figure in draw(arms):
            written += style.save(figure, out / name)
            print(f"wrote {out / name}.svg and .png")
    return written


def figures() -> dict[str, Draw]:
    """Every figure by its name: that of training first, then in the paper's order."""
    from vsae_jax.report.figures import features, histograms, lines, maps, training

    return {
        "training": training.draw,
        **{name: partial(lines.draw, name) for name in lines.FIGURES},
        "features": features.pages,
        "max_activations": histograms.max_activations,
        "maps": maps.panels,
        "cosines": maps.cosines,
    }


if __name__ == "__main__":
    cli.main(command, PlotsConfig)
