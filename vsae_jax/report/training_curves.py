"""`vsae_jax.plot_training`: the training curves of a history or of a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsae_jax.runs.series import open_arms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_training(history: Mapping[str, Any] | str | Path) -> "Figure":
    """Loss, explained variance and share of dead latents over the steps, side by side.

    history: that of `fit`; or several by their names; or the folder of a run or of a
    grid. `figure.savefig("curves.svg")` writes the figure. Needs matplotlib, and raises
    UserError, a ValueError, where it is not installed.
    """
    from vsae_jax.report.figures import style, training

    with style.applied():
        if isinstance(history, str | Path):
            ((_, figure),) = training.draw(open_arms(history))
            return figure
        by_label = {"": history} if "step" in history else history
        colours = style.colours(list(by_label))
        return training.curves_of(
            [([h], label, {"color": colours[label]}) for label, h in by_label.items()]
        )
