"""The evaluations on labelled texts: one pass of the language model over each set for
all autoencoders, whose pooled latents serve all evaluations."""

import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from vsae_jax import lm
from vsae_jax.config import EvalConfig
from vsae_jax.evals import Subject, hub_sets, sampling, scr, sparse_probing, tpp
from vsae_jax.evals.encoding import encode_texts, tokenise
from vsae_jax.evals.labelled import TextSet, read_sets
from vsae_jax.evals.quirks import Quirks
from vsae_jax.evals.sampling import Split
from vsae_jax.evals.tasks import Metrics, Task, mean_metrics
from vsae_jax.system.errors import UserError

EVALS: dict[str, ModuleType] = {
    "sparse_probing": sparse_probing,
    "scr": scr,
    "tpp": tpp,
}
# Pooled latents that are held at once.
_LATENT_BYTES = 2**31


class Planned(NamedTuple):
    """A set cut to the rows that are used, and these by class and by quadrant."""

    texts: list[str]
    split: Split
    quadrants: dict[str, Split]


def run(
    subjects: Sequence[Subject],
    sets: Sequence[TextSet],
    names: Sequence[str],
    config: EvalConfig,
    quirks: Quirks,
) -> dict[str, list[dict[str, Any]]]:
    """What each evaluation's JSON holds, by name, for each subject. The subjects share
    their language model and layer."""
    found: dict[str, list[dict[str, Any]]] = {n: [{} for _ in subjects] for n in names}
    sizes: dict[str, dict[str, Any]] = {}
    for s in sets:
        wanted = [name for name in names if _takes(name, s)]
        planned = plan(s, wanted, config)
        sizes[s.name] = _sizes(s, planned)
        print(f"{s.name}: {_describe(sizes[s.name])}")
        for name, i, by_class in _scores(subjects, s, planned, wanted, config, quirks):
            found[name][i][s.name] = by_class
    return {
        name: [
            _result(name, per_set, subject, config, quirks, sizes)
            for per_set, subject in zip(found[name], subjects, strict=True)
        ]
        for name in names
    }


def plan(s: TextSet, names: Sequence[str], config: EvalConfig) -> Planned:
    """Which rows the evaluations need, renumbered within those."""
    sizes: dict[str, int] = {
        name: getattr(config, name) for name in ("train_size", "test_size", "seed")
    }
    split, quadrants = Split({}, {}), {}
    if set(names) & {"sparse_probing", "tpp"}:
        split = sampling.by_class(s, **sizes)
        if len(split.train) < 2:
            raise UserError(
                f"{s.name}: fewer than two labels have {sampling.LEAST} texts or more "
                "(of each attribute); label more text"
            )
    if "scr" in names:
        pairs = hub_sets.SCR_PAIRS.get(s.name, itertools.combinations(s.classes, 2))
        found = {pair: sampling.by_quadrant(s, pair, **sizes) for pair in pairs}
        quadrants = {f"{p} / {n}": quad for (p, n), quad in found.items() if quad.train}
        if not quadrants:
            raise UserError(
                f"{s.name}: no two labels have {sampling.LEAST} texts or more "
                "with each attribute; label more text"
            )
    splits = [split, *quadrants.values()]
    parts = [part for each in splits for rows in each for part in rows.values()]
    used = np.unique(np.concatenate(parts))
    return Planned(
        [s.texts[row] for row in used],
        _renumbered(split, used),
        {pair: _renumbered(each, used) for pair, each in quadrants.items()},
    )


def _renumbered(split: Split, used: np.ndarray) -> Split:
    train, test = (
        {name: np.searchsorted(used, rows) for name, rows in part.items()}
        for part in split
    )
    return Split(train, test)


def open_sets(names: Sequence[str], config: EvalConfig) -> list[TextSet]:
    """The labelled sets, checked for what the evaluations need."""
    sets = read_sets(config)
    for name in names:
        if not any(_takes(name, s) for s in sets):
            needs = "with an attribute (--attribute_column)" if name == "scr" else ""
            raise UserError(
                f"--evals={name} needs a set of --labelled {needs}".rstrip()
            )
    for s in sets:
        values = [] if s.attributes is None else sorted(set(s.attributes.tolist()))
        if "scr" in names and _takes("scr", s) and len(values) != 2:
            raise UserError(
                f"{s.name}: --attribute_column has {len(values)} values "
                f"({', '.join(values[:3])}, ...); scr needs two"
            )
    return sets


def _takes(name: str, s: TextSet) -> bool:
    """Whether an evaluation uses a set."""
    if s.name in hub_sets.PROBING_ONLY:
        return name == "sparse_probing"
    return name != "scr" or s.attributes is not None


def _scores(
    subjects: Sequence[Subject],
    s: TextSet,
    planned: Planned,
    names: Sequence[str],
    config: EvalConfig,
    quirks: Quirks,
) -> Iterator[tuple[str, int, dict[str, Metrics]]]:
    """(evaluation, number of the subject, metrics by class) of one set."""
    first = subjects[0]
    bos = [] if first.run.data["bos"] == "none" else [first.lm.bos_id]
    tokenizer = lm.load_tokenizer(first.lm.name, revision=first.lm.revision)
    tokens = tokenise(planned.texts, tokenizer, bos=bos)
    prepared: dict[str, Any] = {}
    for group in _groups(subjects, len(tokens)):
        some = [subjects[i] for i in group]
        pooled, latents = encode_texts(some, tokens, stored_norms=quirks.stored_norms)
        split, quadrants = planned.split, planned.quadrants
        task = Task(s.name, split, quadrants, pooled, config.seed, quirks)
        for name in names:
            if name not in prepared:
                prepared[name] = EVALS[name].prepare(task)
            for i, own in zip(group, latents, strict=True):
                yield name, i, EVALS[name].score(task, prepared[name], own)


def _groups(subjects: Sequence[Subject], n_texts: int) -> Iterator[list[int]]:
    """Numbers of subjects whose pooled latents fit at once."""
    group, held = [], 0
    for i, subject in enumerate(subjects):
        size = n_texts * subject.run.sae.d_sae * 4
        if group and held + size > _LATENT_BYTES:
            yield group
            group, held = [], 0
        group.append(i)
        held += size
    yield group


def _sizes(s: TextSet, planned: Planned) -> dict[str, Any]:
    """What was there and what of it is used."""
    split = planned.split
    return {
        "texts": len(s.texts),
        "used": len(planned.texts),
        "per_class": {
            name: {"train": len(rows), "test": len(split.test[name])}
            for name, rows in split.train.items()
        },
        "left_out": sorted(set(s.classes) - split.train.keys()) if split.train else [],
        "per_quadrant": {
            pair: {"train": len(quad.train["P-"]), "test": len(quad.test["P-"])}
            for pair, quad in planned.quadrants.items()
        },
    }


def _describe(sizes: dict[str, Any]) -> str:
    parts = [f"{sizes['used']:,} of {sizes['texts']:,} texts"]
    if sizes["per_class"]:
        each = next(iter(sizes["per_class"].values()))
        count = len(sizes["per_class"])
        parts.append(f"{count} classes of {each['train']:,} + {each['test']:,}")
    if sizes["left_out"]:
        parts.append(f"too small: {', '.join(sizes['left_out'])}")
    if sizes["per_quadrant"]:
        least = min(each["train"] for each in sizes["per_quadrant"].values())
        count = len(sizes["per_quadrant"])
        parts.append(f"{count} pairs of labels, {least:,} or more a quadrant")
    return "; ".join(parts)


def _result(
    name: str,
    per_set: dict[str, dict[str, Metrics]],
    subject: Subject,
    config: EvalConfig,
    quirks: Quirks,
    sizes: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    if EVALS[name].SETS_WEIGH_EQUALLY:
        of_sets = [mean_metrics(list(each.values())) for each in per_set.values()]
    else:
        of_sets = [metrics for each in per_set.values() for metrics in each.values()]
    return {
        "metrics": mean_metrics(of_sets),
        "per_class": per_set,
        "config": subject.config
        | {
            "tokens_from": "labelled texts",
            "n_tokens": None,
            "n_contexts": None,
            "sets": {name: sizes[name] for name in per_set},
            "train_size": config.train_size,
            "test_size": config.test_size,
            "eval_seed": config.seed,
            "quirks": quirks.names,
            "decoder_norms": _norms(subject, quirks),
        },
    }


def _norms(subject: Subject, quirks: Quirks) -> str:
    """What was done about decoder rows that are not of norm 1."""
    w_dec = np.asarray(subject.run.variables["params"]["w_dec"])
    norms = np.linalg.norm(w_dec, axis=1)
    least, most = float(norms.min()), float(norms.max())
    if max(abs(least - 1), abs(most - 1)) < 1e-3:
        return "1"
    done = "as stored" if quirks.stored_norms else "moved into the latents"
    return f"{least:.3g} to {most:.3g}, {done}"
