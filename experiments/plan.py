"""What a study would take: arms, steps, disk, memory, time, before anything is done."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from experiments.study import Arms, Study
from vsae_jax import runs
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.runs import series
from vsae_jax.system.progress import size
from vsae_jax.training import groups

# Of the matrix products of a step, what two CPU cores and a large GPU have reached
# (docs/results.md; the GPU's number is an estimate: a tenth of its bfloat16 peak).
_RATES = {"two CPU cores": 6e10, "one H100 (estimate)": 1e14}
_PYTHIA_70M = 512
# Float32 parameters and two moments in each of two checkpoints, and the parameters once
# more.
_COPIES = 7


class Needs(NamedTuple):
    """Of one grid. operations: multiplications and additions of all steps."""

    arms: int
    steps: int
    disk: int
    memory: int
    operations: float


def table(study: Study, parts: Sequence[ModuleType]) -> str:
    """One row a grid; grids that several parts share are counted once."""
    grids = {n: a for part in parts for n, a in part.grids(study).items()}
    needs = {name: of_grid(study, arms) for name, arms in grids.items()}
    rows = [["grid", "arms", "steps", "disk", "memory", *_RATES]]
    rows += [[name, *_cells(n)] for name, n in needs.items()]
    if needs:
        rows.append(["all", *_cells(_total(list(needs.values())))])
    return (
        f"{series.markdown(rows)}\n\nactivations: {_rows(study)}; time: of the "
        "matrix products in training alone, evaluations about as much again"
    )


def of_grid(study: Study, arms: Arms) -> Needs:
    """Adds up what its arms take; they are in memory together."""
    each = [_of_arm(study, config) for config in arms.values()]
    return _total(each)


def _of_arm(study: Study, config: TrainConfig) -> Needs:
    d_model = d_model_of(study, config)
    resolved = resolve_train(config, d_model=d_model)
    static = sae_config(resolved, d_model=d_model, dtype="float32")
    # Six products a row: two forward and four backward, each two operations.
    operations = 12 * resolved.batch_size * d_model * static.d_sae * resolved.steps
    return Needs(
        arms=1,
        steps=resolved.steps,
        disk=_COPIES * groups.bytes_of_parameters(static),
        memory=groups.bytes_of_one(static, batch_size=resolved.batch_size),
        operations=float(operations),
    )


def d_model_of(study: Study, config: TrainConfig) -> int:
    """Of the synthetic rows, or of the language model: a local one's own, else that of
    Pythia-70M."""
    of_features = {"truth": study.scale.truth, "family": study.scale.family.truth}
    name = Path(config.activations).name.split("-")[0]
    if name in of_features:
        return of_features[name].d_model
    path = Path(study.model) / "config.json"
    return runs.read_json(path)["hidden_size"] if path.is_file() else _PYTHIA_70M


def _total(needs: Sequence[Needs]) -> Needs:
    arms, steps, disk, memory, operations = (
        sum(values) for values in zip(*needs, strict=True)
    )
    return Needs(int(arms), int(steps), int(disk), int(memory), float(operations))


def _cells(needs: Needs) -> list[str]:
    times = [_time(needs.operations / rate) for rate in _RATES.values()]
    return [
        f"{needs.arms:,}",
        f"{needs.steps:,}",
        size(needs.disk),
        size(needs.memory),
        *times,
    ]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"


def _rows(study: Study) -> str:
    d_model = d_model_of(study, TrainConfig())
    bytes_each = 2 * d_model * study.scale.text.num_tokens
    n = 2 * len(study.scale.text.layers)
    return f"{n} folders of {size(bytes_each)}"
