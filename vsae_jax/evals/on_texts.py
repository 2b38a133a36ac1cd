"""The evaluations on labelled texts. One pass of the language model over a set serves
all autoencoders, and an autoencoder's pooled latents serve all evaluations."""

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vsae_jax import lm
from vsae_jax.config import EvalConfig
from vsae_jax.evals import Subject, hub_sets, sampling, scr, sparse_probing, tpp
from vsae_jax.evals.encoding import CONTEXT, encode_texts, tokenise
from vsae_jax.evals.labelled import TextSet, read_sets
from vsae_jax.evals.quirks import Quirks
from vsae_jax.evals.sampling import Split
from vsae_jax.evals.tasks import Metrics, Task, mean_metrics
from vsae_jax.system.errors import UserError, missing_extra

EVALS: dict[str, ModuleType] = {
    "sparse_probing": sparse_probing,
    "scr": scr,
    "tpp": tpp,
}
# Under this name a result holds what each seed of the probes gave.
PER_SEED = "per_seed"
# Metrics by class, by set, by seed.
PerSeed = dict[int, dict[str, dict[str, Metrics]]]
# Bytes of pooled latents in memory at once.
_LATENT_BYTES = 2**31


class Planned(NamedTuple):
    """A set cut to the rows that are used, and those rows by class and by quadrant.

    evals: the evaluations that use it. about: what was there, and what of it is used.
    """

    name: str
    texts: list[str]
    split: Split
    quadrants: dict[str, Split]
    evals: list[str]
    about: dict[str, Any]


class Tokenised(NamedTuple):
    """A planned set, with its texts' tokens and notes."""

    planned: Planned
    tokens: list[Int[np.ndarray, " tokens"]]
    notes: list[str]


def run(
    subjects: Sequence[Subject],
    sets: Sequence[Tokenised],
    names: Sequence[str],
    config: EvalConfig,
    quirks: Quirks,
) -> dict[str, list[dict[str, Any]]]:
    """What each evaluation's JSON holds for each subject, by name. The subjects share
    their language model and layer."""
    seeds = range(config.seed, config.seed + config.probe_seeds)
    found: dict[str, list[PerSeed]] = {
        name: [{seed: {} for seed in seeds} for _ in subjects] for name in names
    }
    about: dict[str, dict[str, Any]] = {}
    for s in sets:
        planned = s.planned
        about[planned.name] = planned.about | {"notes": s.notes}
        print(f"{planned.name}: {_describe(planned.about)}")
        for name, i, seed, by_class in _scores(subjects, s, seeds, quirks):
            found[name][i][seed][planned.name] = by_class
    return {
        name: [
            _result(name, per_seed, subject, config, quirks, about)
            for per_seed, subject in zip(found[name], subjects, strict=True)
        ]
        for name in names
    }


def plan(s: TextSet, names: Sequence[str], config: EvalConfig) -> Planned:
    """The rows of a set that the evaluations need, renumbered among themselves."""
    names = [name for name in names if takes(name, s)]
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
        name=s.name,
        texts=[s.texts[row] for row in used],
        split=_renumbered(split, used),
        quadrants={pair: _renumbered(each, used) for pair, each in quadrants.items()},
        evals=names,
        about=_about(s, split, quadrants, used=len(used)),
    )


def _renumbered(split: Split, used: np.ndarray) -> Split:
    train, test = (
        {name: np.searchsorted(used, rows) for name, rows in part.items()}
        for part in split
    )
    return Split(train, test)


def notes(s: TextSet, planned: Planned) -> list[str]:
    """Notes on what makes a set's scores misleading."""
    said = list(s.notes)
    labels: dict[str, set[str]] = {}
    for text, label in zip(s.texts, s.labels.tolist(), strict=True):
        labels.setdefault(text, set()).add(label)
    several = [text for text, found in labels.items() if len(found) > 1]
    if several:
        said.append(
            f"{len(several):,} texts have more than one label, such as "
            f"{shortened(several[0])}: no probe can be right about all of them"
        )
    seen = repeated(planned)
    if seen:
        said.append(
            f"{len(seen):,} texts are both in train and in test, such as "
            f"{shortened(seen[0])}: what is remembered raises accuracies"
        )
    return said


def repeated(planned: Planned) -> list[str]:
    """The texts that a probe is both trained and tested on, in the set's order."""
    found: set[int] = set()
    for split in (planned.split, *planned.quadrants.values()):
        train, test = (
            {int(row) for rows in part.values() for row in rows} for part in split
        )
        seen = {planned.texts[row] for row in train}
        found |= {row for row in test if planned.texts[row] in seen}
    return list(dict.fromkeys(planned.texts[row] for row in sorted(found)))


def shortened(text: str) -> str:
    """The beginning of a text in quotation marks, on one line."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def read(
    subjects: Sequence[Subject],
    sets: Sequence[tuple[TextSet, Planned]],
    quirks: Quirks,
) -> list[Tokenised]:
    """The sets as the subjects' language model reads them; prints notes on them."""
    first = subjects[0]
    length = CONTEXT
    if first.lm.max_positions and first.lm.max_positions < CONTEXT:
        length = first.lm.max_positions
        if quirks.padding_leak:
            raise UserError(
                f"--model={first.lm.name} has {length} positions and SAEBench reads "
                f"texts in {CONTEXT}: leave out --saebench_compatible and the quirk "
                "padding_leak, and texts are cut to what the model can read"
            )
    bos = [first.lm.bos_id] if first.reader.has_bos else []
    tokenizer = lm.load_tokenizer(first.lm.files)
    found = []
    for s, planned in sets:
        tokens = tokenise(planned.texts, tokenizer, bos=bos, length=length)
        said = notes(s, planned)
        special = sorted(first.lm.special_ids)
        empty = sum(np.isin(row, special).all() for row in tokens)
        if empty:
            said.append(
                f"{empty:,} of {len(tokens):,} texts have only special tokens: their "
                "vectors are 0"
            )
        if length < CONTEXT:
            said.append(
                f"texts are cut to the {length} positions of the model, not {CONTEXT}"
            )
        for line in said:
            print(f"note: {s.name}: {line}")
        found.append(Tokenised(planned, tokens, said))
    return found


def open_sets(
    names: Sequence[str], config: EvalConfig
) -> list[tuple[TextSet, Planned]]:
    """The labelled sets, each with the rows that are used; refuses sets that lack what
    the evaluations need."""
    if "sparse_probing" in names and importlib.util.find_spec("sklearn") is None:
        raise missing_extra("scikit-learn", extra="analysis")
    sets = read_sets(config)
    for name in names:
        if not any(takes(name, s) for s in sets):
            needs = "with an attribute (--attribute_column)" if name == "scr" else ""
            raise UserError(
                f"--evals={name} needs a set of --labelled {needs}".rstrip()
            )
    for s in sets:
        values = [] if s.attributes is None else sorted(set(s.attributes.tolist()))
        if "scr" in names and takes("scr", s) and len(values) != 2:
            raise UserError(
                f"{s.name}: --attribute_column has {len(values)} values "
                f"({', '.join(map(repr, values[:3]))}, ...); scr needs two"
            )
    taken = [s for s in sets if any(takes(name, s) for name in names)]
    return [(s, plan(s, names, config)) for s in taken]


def takes(name: str, s: TextSet) -> bool:
    """Whether an evaluation uses a set."""
    if s.name in hub_sets.PROBING_ONLY:
        return name == "sparse_probing"
    return name != "scr" or s.attributes is not None


def _scores(
    subjects: Sequence[Subject], s: Tokenised, seeds: Sequence[int], quirks: Quirks
) -> Iterator[tuple[str, int, int, dict[str, Metrics]]]:
    """(evaluation, number of the subject, seed, metrics by class) of one set."""
    planned, tokens = s.planned, s.tokens
    prepared: dict[tuple[str, int], Any] = {}
    for group in _groups(subjects, len(tokens)):
        some = [subjects[i] for i in group]
        pooled, latents = encode_texts(some, tokens, stored_norms=quirks.stored_norms)
        split, quadrants = planned.split, planned.quadrants
        for name, seed in itertools.product(planned.evals, seeds):
            task = Task(planned.name, split, quadrants, pooled, seed, quirks)
            if (name, seed) not in prepared:
                prepared[name, seed] = EVALS[name].prepare(task)
            for i, own in zip(group, latents, strict=True):
                yield name, i, seed, EVALS[name].score(task, prepared[name, seed], own)


def _groups(subjects: Sequence[Subject], n_texts: int) -> Iterator[list[int]]:
    """Groups of subjects, by number, whose pooled latents fit into memory at once."""
    group, held = [], 0
    for i, subject in enumerate(subjects):
        size = n_texts * subject.run.sae.d_sae * 4
        if group and held + size > _LATENT_BYTES:
            yield group
            group, held = [], 0
        group.append(i)
        held += size
    yield group


def _about(
    s: TextSet, split: Split, quadrants: dict[str, Split], *, used: int
) -> dict[str, Any]:
    """What a set holds, and what of it is used."""
    return {
        "texts": len(s.texts),
        "used": used,
        "per_class": {
            name: {"train": len(rows), "test": len(split.test[name])}
            for name, rows in split.train.items()
        },
        "left_out": sorted(set(s.classes) - split.train.keys()) if split.train else [],
        "per_quadrant": {
            pair: {"train": len(quad.train["P-"]), "test": len(quad.test["P-"])}
            for pair, quad in quadrants.items()
        },
    }


def _describe(sizes: dict[str, Any]) -> str:
    parts = [f"{sizes['used']:,} of {sizes['texts']:,} texts"]
    if sizes["per_class"]:
        each = next(iter(sizes["per_class"].values()))
        count = len(sizes["per_class"])
        parts.append(f"{count} classes of {each['train']:,} + {each['test']:,}")
    if sizes["left_out"]:
        # A label may hold a terminal's control codes.
        small = (n if n.isprintable() else repr(n) for n in sizes["left_out"])
        parts.append(f"too small: {', '.join(small)}")
    if sizes["per_quadrant"]:
        least = min(each["train"] for each in sizes["per_quadrant"].values())
        count = len(sizes["per_quadrant"])
        parts.append(f"{count} pairs of labels, {least:,} or more a quadrant")
    return "; ".join(parts)


def _result(
    name: str,
    per_seed: PerSeed,
    subject: Subject,
    config: EvalConfig,
    quirks: Quirks,
    about: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    of_seeds = {str(seed): _of_seed(name, each) for seed, each in per_seed.items()}
    per_set = per_seed[config.seed]
    return {
        "metrics": mean_metrics([each["metrics"] for each in of_seeds.values()]),
        "per_class": {
            where: {
                label: mean_metrics([each[where][label] for each in per_seed.values()])
                for label in classes
            }
            for where, classes in per_set.items()
        },
        PER_SEED: of_seeds,
        "config": subject.config
        | {
            "tokens_from": "labelled texts",
            "n_tokens": None,
            "n_contexts": None,
            "sets": {name: about[name] for name in per_set},
            "train_size": config.train_size,
            "test_size": config.test_size,
            "eval_seed": config.seed,
            "probe_seeds": list(per_seed),
            "quirks": quirks.names,
            "decoder_norms": _norms(subject, quirks),
        },
    }


def _of_seed(name: str, per_set: dict[str, dict[str, Metrics]]) -> dict[str, Any]:
    """The means over all sets, and over the classes of each."""
    classes = {where: list(each.values()) for where, each in per_set.items()}
    means = {where: mean_metrics(each) for where, each in classes.items()}
    of_all = list(itertools.chain(*classes.values()))
    if EVALS[name].SETS_WEIGH_EQUALLY:
        of_all = list(means.values())
    return {"metrics": mean_metrics(of_all), "per_set": means}


def _norms(subject: Subject, quirks: Quirks) -> str:
    """The norms of the decoder's rows, and how those other than 1 were treated."""
    w_dec = np.asarray(subject.run.variables["params"]["w_dec"])
    norms = np.linalg.norm(w_dec, axis=1)
    least, most = float(norms.min()), float(norms.max())
    if max(abs(least - 1), abs(most - 1)) < 1e-3:
        return "1"
    done = "as stored" if quirks.stored_norms else "moved into the latents"
    return f"{least:.3g} to {most:.3g}, {done}"
