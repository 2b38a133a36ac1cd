"""`python -m vsae_jax.train`: from activations on disk to trained autoencoders."""

from collections.abc import Sequence
from pathlib import Path

from vsae_jax.config import TrainConfig, cli
from vsae_jax.system import processes
from vsae_jax.training import grid
from vsae_jax.training.loop import run_arms
from vsae_jax.training.plan import plan


def command(configs: Sequence[TrainConfig]) -> None:
    """Trains one run, or a grid if flags are comma lists."""
    with processes.joined(configs[0]):
        if len(configs) == 1:
            run(configs[0])
        else:
            grid.run(configs)


def run(config: TrainConfig) -> Path:
    """Trains to the end, or resumes a run folder that exists; returns that folder.

    Raises UserError for what a user can fix, and Interrupted if a signal stopped it,
    after saving.
    """
    planned = plan(config)
    run_arms([planned])
    return planned.folder


if __name__ == "__main__":
    cli.main(command, TrainConfig)
