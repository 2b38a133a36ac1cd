"""`python -m vsae_jax.train`: activations on disk to trained autoencoders."""

from collections.abc import Sequence
from pathlib import Path

from vsae_jax.config import TrainConfig, cli
from vsae_jax.system import processes
from vsae_jax.training import grid
from vsae_jax.training.loop import run_arms
from vsae_jax.training.plan import plan


def command(configs: Sequence[TrainConfig]) -> None:
    """One run, or a grid where flags held comma lists."""
    with processes.joined(configs[0]):
        if len(configs) == 1:
            run(configs[0])
        else:
            grid.run(configs)


def run(config: TrainConfig) -> Path:
    """Trains to the end, resuming where a run folder is already there.

    Returns the run folder. Raises UserError for what a user can mend and Interrupted
    when a signal stopped it after saving.
    """
    planned = plan(config)
    run_arms([planned])
    return planned.folder


if __name__ == "__main__":
    cli.main(command, TrainConfig)
