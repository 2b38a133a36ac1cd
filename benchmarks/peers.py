"""The peers' own trainers as workers, under an interpreter that has torch and them.

Nothing of theirs is here: each function drives a trainer by its public methods. Where
`task.checkout` names a folder the library is imported from it.
"""

import contextlib
import importlib
import sys
import threading
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.turns import Steps, Task, serve

TRAINING_STEPS = 20_000
AUXK = 1 / 32
Step = Callable[[int, torch.Tensor], Any]


def make(task: Task) -> tuple[Steps, dict[str, str]]:
    """The steps of one peer; bfloat16 is CPU autocast."""
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(task.rows, mmap_mode="c"))
    step = PEERS[task.implementation](task, rows)
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        for _ in range(count):
            step(done, rows[done % len(rows)])
            done += 1
        return 0.0

    return steps, {"torch": torch.__version__, **_version(task)}


def _autocast(task: Task):
    if task.mode == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)


def dictionary_learning(task: Task, rows: torch.Tensor) -> Step:
    """`TopKTrainer.update`; under autocast as its `trainSAE` does it on a GPU."""
    trainer = trainer_module(task.checkout, "top_k").TopKTrainer(
        steps=TRAINING_STEPS,
        activation_dim=rows.shape[-1],
        dict_size=task.d_sae,
        k=task.k,
        layer=0,
        lm_name="none",
        device="cpu",
    )
    return _update(task, trainer)


def authors_topk(task: Task, rows: torch.Tensor) -> Step:
    """`TopKTrainer.update` of the paper's authors, parameters in float32."""
    library = trainer_module(task.checkout, "top_k")
    device = torch.device("cpu")
    trainer = library.TopKTrainer(
        model_config=library.TopKConfig(
            rows.shape[-1], task.d_sae, task.k, dtype=torch.float32, device=device
        ),
        training_config=library.TopKTrainingConfig(steps=TRAINING_STEPS),
        layer=0,
        lm_name="none",
    )
    return _update(task, trainer)


def authors_vsae_topk(task: Task, rows: torch.Tensor) -> Step:
    """`VSAETopKTrainer.update` of the paper's authors, parameters in float32."""
    library = trainer_module(task.checkout, "vsae_topk")
    device = torch.device("cpu")
    trainer = library.VSAETopKTrainer(
        model_config=library.VSAETopKConfig(
            rows.shape[-1], task.d_sae, task.k, dtype=torch.float32, device=device
        ),
        training_config=library.VSAETopKTrainingConfig(
            steps=TRAINING_STEPS, kl_coeff=1.0
        ),
        layer=0,
        lm_name="none",
    )
    return _update(task, trainer)


def _update(task: Task, trainer: Any) -> Step:
    def step(done: int, x: torch.Tensor) -> None:
        with _autocast(task):
            trainer.update(done, x)

    return step


def trainer_module(checkout: str, trainer: str) -> types.ModuleType:
    """One trainer's module. Of a checkout the packages' `__init__` files are passed
    over: they import nnsight and transformer_lens, which no trainer here uses."""
    if checkout:
        folder = Path(checkout) / "dictionary_learning"
        if not (folder / "trainers" / f"{trainer}.py").is_file():
            raise ImportError(f"no dictionary_learning/trainers in {checkout}")
        for name, path in (("", folder), (".trainers", folder / "trainers")):
            package = types.ModuleType("dictionary_learning" + name)
            package.__path__ = [str(path)]
            sys.modules[package.__name__] = package
    return importlib.import_module(f"dictionary_learning.trainers.{trainer}")


def saelens(task: Task, rows: torch.Tensor) -> Step:
    """`SAETrainer.step` on a `TopKTrainingSAE`, as `fit` calls it; its own autocast."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = TopKTrainingSAEConfig(d_in=rows.shape[-1], d_sae=task.d_sae, k=task.k)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=TRAINING_STEPS * task.batch,
            train_batch_size_samples=task.batch,
            autocast=task.mode == "bfloat16",
            lr_end=3e-5,
        ),
        TopKTrainingSAE(config),
        iter(rows),
    )

    def step(_: int, x: torch.Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def sparsify_adam(task: Task, rows: torch.Tensor) -> Step:
    """`sparsify.Trainer.fit` with Adam."""
    return _sparsify(task, rows, optimizer="adam")


def sparsify_signum(task: Task, rows: torch.Tensor) -> Step:
    """`sparsify.Trainer.fit` with its default optimizer."""
    return _sparsify(task, rows, optimizer="signum")


def _sparsify(task: Task, rows: torch.Tensor, *, optimizer: Any) -> Step:
    """`fit` hooks a language model; here the model hands out the rows and waits, in
    `fit`'s own thread, until the next step is asked for."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    model = _RowsAsModel(rows.shape[-1])
    trainer = Trainer(
        TrainConfig(
            SparseCoderConfig(num_latents=task.d_sae, k=task.k),
            batch_size=1,
            optimizer=optimizer,
            auxk_alpha=AUXK,
            hookpoints=["rows"],
            save_every=TRAINING_STEPS + 2,
            log_to_wandb=False,
        ),
        _TokensOfBatches(task.batch),  # pyright: ignore[reportArgumentType]
        model,  # pyright: ignore[reportArgumentType]
    )

    def fit() -> None:
        # Autocast belongs to a thread.
        with _autocast(task):
            trainer.fit()

    return model.steps_of(fit)


class _TokensOfBatches(torch.utils.data.Dataset):
    """As many token ids as there are rows in a batch; their values mean nothing."""

    def __init__(self, batch: int):
        self._tokens = {"input_ids": torch.zeros(batch, dtype=torch.long)}

    def __len__(self) -> int:
        return TRAINING_STEPS

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        return self._tokens


class _RowsAsModel(torch.nn.Module):
    """What `sparsify.Trainer` needs of a language model whose one layer is `rows`."""

    def __init__(self, d_model: int):
        super().__init__()
        self.rows = torch.nn.Identity()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self._x = torch.zeros(1, d_model)
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._running, self._error = False, None

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._running:
            # The step before this one is complete when `fit` comes for the next rows.
            self._done.release()
            self._asked.acquire()
        return self.rows(self._x[None])

    def steps_of(self, fit: Callable[[], None]) -> Step:
        def run() -> None:
            try:
                fit()
            except Exception as error:  # handed to the main thread, which raises it
                self._error = error
                self._done.release()

        def step(_: int, x: torch.Tensor) -> None:
            if not self._running:
                self._running = True
                threading.Thread(target=run, daemon=True).start()
                self._done.acquire()
            self._x = x
            self._asked.release()
            self._done.acquire()
            if self._error:
                raise self._error

        return step


PEERS: dict[str, Callable[[Task, torch.Tensor], Step]] = {
    "dictionary_learning": dictionary_learning,
    "saelens": saelens,
    "sparsify_adam": sparsify_adam,
    "sparsify_signum": sparsify_signum,
    "authors_topk": authors_topk,
    "authors_vsae_topk": authors_vsae_topk,
}
_PACKAGES = {"saelens": "sae-lens", "sparsify": "eai-sparsify"}


def _version(task: Task) -> dict[str, str]:
    family = task.implementation.split("_")[0]
    package = _PACKAGES.get(family, "dictionary-learning")
    return {package: "checkout" if task.checkout else metadata.version(package)}


if __name__ == "__main__":
    serve(make)
