"""Where training metrics go: metrics.jsonl always, TensorBoard and wandb by flag."""

import errno
import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

from vsae_jax import runs
from vsae_jax.config import TrainConfig
from vsae_jax.config.fields import to_json
from vsae_jax.system import processes
from vsae_jax.system.errors import missing_extra
from vsae_jax.system.files import naming


class Logger(Protocol):
    """Takes one line of metrics at a time."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of the interval that ends with `step`."""
        ...

    def close(self) -> None:
        """Ends the record."""
        ...


# Flag -> the package that it needs.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(config: TrainConfig) -> None:
    """Refuses a logger whose package is not installed."""
    for name, package in _PACKAGES.items():
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra=name)


def open_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """The loggers that the config asks for. Only the first of several processes has
    any."""
    if not processes.first():
        return []
    loggers: list[Logger] = [JsonLines(folder / runs.METRICS)]
    if config.tensorboard:
        loggers.append(TensorBoard(folder))
    if config.wandb:
        loggers.append(Wandb(config, folder))
    return loggers


class JsonLines:
    """One JSON object per line, written at once."""

    def __init__(self, path: Path):
        # Unbuffered, so that `close` does not try a line again that failed.
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        line = runs.metrics_line({"step": step, **metrics}).encode()
        with naming(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard events in the run folder, through tensorboardX."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; WANDB_MODE and the other variables of wandb apply."""

    def __init__(self, config: TrainConfig, folder: Path):
        import wandb

        self._run: Any = wandb.init(
            project="vsae_jax", name=folder.name, dir=folder, config=to_json(config)
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()
