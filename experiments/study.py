"""The folder of a study: its activations, its grids of arms, their evaluations.

    OUT/rows/<preset>-<layer>/   activations
    OUT/texts/                   labelled texts
    OUT/grids/<grid>/<arm>/      one run folder per arm
    OUT/figures/                 what the report shows

Everything that is there and finished is left alone, so that a study that was stopped
goes on.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from experiments.scales import Scale
from vsae_jax import evaluate, extract, features, runs
from vsae_jax.activations import text
from vsae_jax.config import EvalConfig, ExtractConfig, TrainConfig
from vsae_jax.evals.on_texts import PER_SEED
from vsae_jax.runs.series import Arm, open_arms
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file
from vsae_jax.training import grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arms = dict[str, TrainConfig]
BUNDLED = Path(str(resources.files("vsae_jax") / "data/neox-stories"))
STORIES = BUNDLED / "sampled_stories.jsonl"
_EXPLAINED = "explained_variance"
_WITHOUT_LABELS = ("core", "stability", "predictability", "absorption")
_SEED = re.compile(r"(.*)_seed-(\d+)")


@dataclass(frozen=True)
class Study:
    """One size of the study in one folder; `labelled` are flags of evaluations on
    texts, which are made on at least `probe_seeds`. With `only_look` nothing is
    extracted, trained or evaluated: parts show what is there."""

    scale: Scale
    out: Path
    labelled: Mapping[str, Any]
    only_look: bool = False
    probe_seeds: int = 1

    @property
    def model(self) -> str:
        """Hub id or folder of the language model."""
        return self.scale.text.model or str(BUNDLED)

    @property
    def dataset(self) -> str:
        """Hub id or file of the text."""
        return self.scale.text.dataset or str(STORIES)

    @property
    def layer(self) -> int:
        """Where the controlled arms read: the first of the scale's layers."""
        return self.scale.text.layers[0]

    def rows_path(self, preset: str, layer: int) -> Path:
        """Where the activations under a preset of `extract` are."""
        return self.out / "rows" / f"{preset}-{layer}"

    def rows(self, preset: str, layer: int, **fields: Any) -> Path:
        """Activations, extracted where they are not there yet."""
        out = fields.pop("out", self.rows_path(preset, layer))
        if self.only_look:
            return out
        settings = {
            "preset": preset,
            "model": self.model,
            "backend": self.scale.text.backend,
            "layer": layer,
            "dataset": self.dataset,
            "num_tokens": self.scale.text.num_tokens,
            "out": str(out),
        }
        extract.run(ExtractConfig(**{**settings, **fields}))
        return out

    def train(self, name: str, arms: Arms) -> Path:
        """Trains arms, by the names of their folders, as one grid."""
        folder = self.grid(name)
        if not self.only_look and not all(is_over(folder / arm) for arm in arms):
            say(f"training {name}: {len(arms)} arms")
            given: dict[str, Any] = {"out": str(folder)}
            # Minutes a grid there, and its checkpoints would fill a disk.
            given |= {"checkpoint_every": 0} if jax.default_backend() == "gpu" else {}
            configs = [replace(config, **given) for config in arms.values()]
            try:
                grid.run(configs, names=list(arms))
            except UserError as error:
                # An arm that diverged is a result: it is missing in the tables.
                if not all(is_over(folder / arm) for arm in arms):
                    raise
                print(error)
        return folder

    def grid(self, name: str) -> Path:
        """The folder of a grid."""
        return self.out / "grids" / name

    def has(self, name: str) -> bool:
        """Whether a grid was begun."""
        return self.grid(name).is_dir()

    def arms(self, name: str) -> list[Arm]:
        """The arms of a grid that did not diverge; none where `only_look` finds no
        grid."""
        return (
            open_arms(self.grid(name)) if self.has(name) or not self.only_look else []
        )

    @property
    def tuning_documents(self) -> int:
        """How many of the last documents are set aside for `tuning_text`."""
        return self.scale.text.tuning_documents if self.scale.text.dataset else 0

    def tuning_text(self) -> str:
        """A file of the last documents, which nothing is trained or evaluated on but
        the search for learning rates; "" where none are set aside."""
        n, path = self.tuning_documents, self.out / "texts" / "tuning.jsonl"
        if not n:
            return ""
        if not path.is_file():
            found = text.documents(self.dataset, split="train", text_column="text")
            lines = (json.dumps({"text": each}) + "\n" for each in deque(found, n))
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, "".join(lines).encode())
        return str(path)

    def evaluate(self, name: str, evals: str, **fields: Any) -> None:
        """Evaluates the arms of a grid that were not evaluated yet, or on fewer probe
        seeds; `fields` are further flags of `evaluate`."""
        if self.only_look:
            return
        texts = evals not in _WITHOUT_LABELS
        on_texts = {**self.labelled, "probe_seeds": self.probe_seeds} if texts else {}
        config = EvalConfig(
            run=str(self.grid(name)),
            evals=evals,
            only_missing=True,
            train_size=self.scale.train_size,
            test_size=self.scale.test_size,
            **{"num_tokens": self.scale.eval_tokens} | on_texts | fields,
        )
        if evaluate.to_evaluate(config):
            say(f"evaluating {name}: {evals}")
            evaluate.run(config)

    def metrics(
        self, name: str, evals: str = "core", probe: int | None = None
    ) -> dict[str, dict[int, Any]]:
        """Each kind of arm: its metrics by seed, of all these evaluations; arms without
        the first of them are left out, and measures of those that are not there yet.
        Metrics of texts are means over probe seeds, or those of one of `probes`. Where
        massive rows are not trained on, `explained_variance` is that of ordinary rows,
        and that of all of them is `explained_variance_all_rows`."""
        found: dict[str, dict[int, Any]] = {}
        for arm, results in self._results(name, evals):
            kind, seed = kind_and_seed(arm.folder.name)
            merged = found.setdefault(kind, {}).setdefault(seed, {})
            for result in results.values():
                merged |= measures(result, probe)
            massive = self.scale.text.max_norm_multiple is not None
            if massive and _EXPLAINED in merged:
                merged["explained_variance_all_rows"] = merged[_EXPLAINED]
                merged[_EXPLAINED] = merged[f"{_EXPLAINED}_ordinary_rows"]
        return found

    def of_kinds(self, kinds: Sequence[str], name: str, evals: str) -> dict:
        """`metrics`; refuses a grid without these kinds, as one is that was begun."""
        found = self.metrics(name, evals)
        if missing := [kind for kind in kinds if kind not in found]:
            raise UserError(f"{name}: {', '.join(missing)} is not evaluated yet")
        return found

    def probes(self, name: str, evals: str) -> range:
        """Numbers of the probe seeds that all evaluated arms of a grid have; empty for
        evaluations without probes."""
        each = [
            len(result.get(PER_SEED, [0]))
            for _, results in self._results(name, evals)
            for which, result in results.items()
            if which not in _WITHOUT_LABELS
        ]
        return range(min(each, default=0))

    def _results(self, name: str, evals: str) -> Iterator[tuple[Arm, dict[str, Any]]]:
        """The arms that have the first of these evaluations, and what the files that
        are there hold, by evaluation."""
        for arm in self.arms(name):
            folder = arm.folder / runs.EVALS
            paths = {each: folder / f"{each}.json" for each in evals.split(",")}
            there = {e: runs.read_json(p) for e, p in paths.items() if p.is_file()}
            if next(iter(paths)) in there:
                yield arm, there

    def find_features(self, arms: Sequence[Arm], tokens: int, **fields: Any) -> None:
        """Feature passes of arms that have none yet."""
        if self.only_look:
            return
        for arm in arms:
            if not (arm.folder / features.FOLDER / features.ARRAYS).is_file():
                say(f"features of {arm.folder.name}")
                features.run(
                    features.FeaturesConfig(
                        run=str(arm.folder), num_tokens=tokens, **fields
                    )
                )

    def save(self, name: str, figure: "Figure", *, kind: str = "svg") -> Path:
        """Writes a figure of the report; `kind` is png where points are many."""
        from vsae_jax.report.figures import style

        with style.applied():
            paths = style.save(figure, self.out / "figures" / name)
        kept = next(path for path in paths if path.suffix == f".{kind}")
        for path in paths:
            if path != kept:
                path.unlink()
        return kept


def is_over(folder: Path) -> bool:
    """Whether a run is finished, or diverged."""
    return any((folder / name).is_file() for name in (runs.PARAMETERS, runs.DIVERGED))


def kind_and_seed(name: str) -> tuple[str, int]:
    """`topk_noise`, 3 from `topk_noise_seed-3`."""
    match = _SEED.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} does not end in _seed-N")
    return match[1], int(match[2])


def measures(
    result: Mapping[str, Any], probe: int | None = None
) -> dict[str, float | None]:
    """The metrics of an evaluation, or of one of its probe seeds where it has any, and
    what the study derives from them: the number of alive latents, the mean nearest
    decoder cosine of those, and the means of SCR and TPP over 2 to 50 ablated latents,
    so that no number of them is picked."""
    found = dict(result["metrics"])
    if probe is not None and PER_SEED in result:
        found = dict(list(result[PER_SEED].values())[probe]["metrics"])
    latents = result.get("per_latent", {})
    if "feature_density" in latents:
        density = latents["feature_density"]
        near = latents["max_decoder_cosine_sim"]
        alive = [c for d, c in zip(density, near, strict=True) if d]
        found["alive"] = float(len(alive))
        found["decoder_cosine"] = sum(alive) / len(alive) if alive else None
    for name, template in _OVER_N.items():
        values = [found.get(template.format(n)) for n in _NS]
        if all(value is not None for value in values):
            found[name] = sum(v for v in values if v is not None) / len(values)
    return found


_NS = (2, 5, 10, 20, 50)
_OVER_N = {
    "scr": "scr_metric_threshold_{}",
    "tpp": "tpp_threshold_{}_total_metric",
    "tpp_unintended": "tpp_threshold_{}_unintended_diff_only",
}


def say(text: str) -> None:
    """A line that stands out among those of the commands."""
    print(f"\n=== {text}", flush=True)
