"""Do the peers' trainers and ours end at the same place?

    python -m benchmarks.trained --peers=PYTHON --activations=DIR --out=DIR \\
        [--steps=1000] [--batch_size=256] [--d_sae=512] [--k=32] [--lr=1e-3]

PYTHON has torch, sae-lens 6 and dictionary-learning (benchmarks/RESULTS.md says how to
make it); `trained_peers.py` drives their trainers there, and files are the interface:
one array of training rows, which both sides read in its order, scaled to norm 1, and
one of held-out rows. Each library trains three seeds of every kind of autoencoder that
it has, and for each of them ours is trained with its settings as flags (`FLAGS`). Where
a trainer does something that no flag of ours says, it is trained once more with that
one thing changed in it (`CHANGED`). Both encode the held-out rows as they would a
user's. The last column names the measures whose means differ by more than twice the
standard error of their difference. What is there already in --out is left.
"""

import argparse
import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import vsae_jax
from benchmarks.family import on_rows
from vsae_jax.activations.shards import Activations
from vsae_jax.runs.series import markdown, spread

PEERS = Path(__file__).with_name("trained_peers.py")
MEASURES = ("explained_variance", "l0", "alive")
DEFAULTS = {"steps": 1000, "batch_size": 256, "d_sae": 512, "k": 32}
# What both sides are given besides, for rows of norm 1. Latents are dead after 5 % of
# the steps; the rate rises for 5 % of them and falls in the last fifth.
NUMBERS: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "l1": 0.16,
    "gate_l1": 0.32,
    "l0": 0.003,
    "bandwidth": 0.02,
    "threshold_init": 0.1,
    "auxk": 1 / 32,
    "prefixes": [1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "held_out_rows": 20_000,
}
_AUXK = ("topk", "batch_topk", "matryoshka")
_GROUPS = len(NUMBERS["prefixes"]) + 1
_SHIFTED = {"b_dec_init": "zeros", "subtract_b_dec": True}
# Decoder rows of SAELens are free, and start at 0.1; where it weighs a penalty by their
# norms ours has unit rows: the same function, which Adam does not train alike.
_FREE = _SHIFTED | {"decoder_norm": "free", "decoder_init_norm": 0.1}
_UNIT = _SHIFTED | {"decoder_norm": "unit", "decoder_init_norm": 0.1}
# Neither of these two trainers clips.
_UNCLIPPED = _SHIFTED | {"clip_norm": 1e6, "decoder_norm": "unit"}
_MEDIAN = {"b_dec_init": "geometric_median", "auxk_units": "variance"}
# What each library does with a kind, in our flags.
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "saelens": {
        "relu": _UNIT | {"l1": NUMBERS["l1"]},
        "topk": _FREE,
        "batch_topk": _FREE | {"threshold_decay": 0.99},
        "matryoshka": _FREE | {"threshold_decay": 0.99},
        "jump_relu": _FREE
        | {"decoder_init_norm": 1.0, "target_l0": 0.0, "l0": NUMBERS["l0"]},
        "gated": _UNIT | {"gate_l1": NUMBERS["gate_l1"]},
    },
    "dictionary_learning": {
        "relu": _UNCLIPPED | {"l1": NUMBERS["l1"], "decoder_init_norm": 0.1},
        "topk": _MEDIAN,
        "batch_topk": _MEDIAN | {"threshold_decay": 0.999},
        # Its errors are divided by the number of groups twice.
        "matryoshka": _MEDIAN
        | {"threshold_decay": 0.999, "auxk": NUMBERS["auxk"] * _GROUPS**2}
        | {"clip_norm": float(_GROUPS**2)},
        "jump_relu": {"l0": 1.0, "adam_b1": 0.0},
        "gated": _UNCLIPPED | {"gate_l1": NUMBERS["gate_l1"], "adam_b1": 0.0},
    },
}

# What is changed in their trainers, and whether ours is changed with it.
CHANGED = {
    "saelens": {
        "relu": "unit rows",
        "batch_topk": "no AuxK",
        "matryoshka": "no AuxK",
        "jump_relu": "log theta",
        "gated": "unit rows, frozen copy",
    },
    "dictionary_learning": {
        "relu": "first step",
        "matryoshka": "no AuxK",
        "jump_relu": "log theta, counting z",
        "gated": "first step",
    },
}
ROWS = [
    (library, kind, changed)
    for library, kinds in FLAGS.items()
    for kind in kinds
    for changed in ("", CHANGED[library].get(kind))
    if changed is not None
]


def main() -> None:
    """Writes the rows, trains both sides at once, and prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("peers", "activations", "out"):
        flags.add_argument(f"--{name}", required=True)
    for name, value in DEFAULTS.items():
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--lr", type=float, default=1e-3)
    a = flags.parse_args()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = NUMBERS | {name: getattr(a, name) for name in (*DEFAULTS, "lr")}
    settings |= {"warmup": a.steps // 20, "decay_start": a.steps * 4 // 5}
    text, path = json.dumps(settings | {"rows": ROWS}), out / "settings.json"
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{out} has a table of other settings; name another --out")
    write_rows(Path(a.activations), out, settings)
    path.write_text(text)
    theirs = subprocess.Popen([a.peers, PEERS, out])
    try:
        train(out, settings)
    finally:
        if theirs.wait():
            raise SystemExit(f"{PEERS.name} ended with status {theirs.returncode}")
    print(table(out))
    print((out / "versions.txt").read_text())


def write_rows(activations: Path, out: Path, settings: dict[str, Any]) -> None:
    """`train.npy`, rows in a random order, as many as are trained on, and
    `held_out.npy`, of the last 5 % of the contexts; mean squared norm 1."""
    rows = Activations.open(activations)
    split = rows.n_contexts * 19 // 20 * rows.rows_per_context
    x = np.asarray(rows.rows(0, rows.n_rows), np.float32)
    x /= np.sqrt(np.square(x).sum(axis=1).mean())
    rng, n = np.random.default_rng(0), settings["steps"] * settings["batch_size"]
    orders = [rng.permutation(split) for _ in range(-(-n // split))]
    np.save(out / "train.npy", x[np.concatenate(orders)[:n]])
    np.save(out / "held_out.npy", x[split:][: settings["held_out_rows"]])


def train(out: Path, settings: dict[str, Any]) -> None:
    """Ours, once by each library's settings; `ours_<library>-<kind>-<seed>.json`."""
    rows, held_out = (np.load(out / f"{name}.npy") for name in ("train", "held_out"))
    for library, kind, changed in ROWS:
        if changed and changed != "no AuxK":
            continue  # theirs alone is another
        given = flags_of(library, kind, settings)
        given |= {"auxk": 0.0} if changed else {}
        for seed in settings["seeds"]:
            path = out / f"{stem_of_ours(library, kind, changed)}-{seed}.json"
            if not path.is_file():
                batches = iter(rows.reshape(settings["steps"], -1, rows.shape[1]))
                fit = vsae_jax.fit(batches, progress=False, seed=seed, **given)
                point = on_rows(fit.sae.reader, held_out, seed=seed)
                path.write_text(json.dumps({n: getattr(point, n) for n in MEASURES}))


def stem_of_ours(library: str, kind: str, changed: str) -> str:
    """What our results beside a row of theirs are called."""
    return f"ours_{library}-{kind}" + ("-no AuxK" if changed == "no AuxK" else "")


def flags_of(library: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The flags with which ours does what the library is asked to do."""
    same = ("steps", "batch_size", "d_sae", "lr", "bandwidth", "threshold_init")
    flags: dict[str, Any] = {name: settings[name] for name in same} | {
        "preset": "baseline",
        "variant": kind,
        "k": settings["k"],
        "input_scale": "none",
        "lr_warmup_steps": settings["warmup"],
        "lr_decay_start": settings["decay_start"],
        "kl_warmup_steps": settings["warmup"],
        "dead_after_tokens": settings["steps"] // 20 * settings["batch_size"],
        "adam_b1": 0.9,
        "auxk": settings["auxk"] if kind in _AUXK else 0.0,
    }
    if kind == "jump_relu":
        flags["target_l0"] = float(settings["k"])
    if kind == "matryoshka":
        widths = [int(share * settings["d_sae"]) for share in settings["prefixes"]]
        flags["prefixes"] = ":".join(map(str, widths))
    return flags | FLAGS[library][kind]


def table(out: Path) -> str:
    """A row a library and kind: each measure of both, and which of them differ."""
    short = {"explained_variance": "expl. var.", "l0": "L0", "alive": "alive"}
    head = ["library", "kind", "changed in theirs"]
    for name in MEASURES:
        head += [f"{short[name]}, theirs", "ours"]
    lines = [[*head, "differ"]]
    for library, kind, changed in ROWS:
        theirs = f"{library}-{kind}-{changed or 'as it is'}"
        both = [values(out, s) for s in (theirs, stem_of_ours(library, kind, changed))]
        cells, differ = [], []
        for name, digits in zip(MEASURES, (4, 2, 3), strict=True):
            a, b = ([one[name] for one in side] for side in both)
            if abs(statistics.fmean(b) - statistics.fmean(a)) > 2 * standard_error(
                a, b
            ):
                differ.append(short[name])
            cells += [spread(side, digits=digits) for side in (a, b)]
        lines.append([library, kind, changed or "-", *cells, ", ".join(differ) or "-"])
    return markdown(lines)


def values(out: Path, stem: str) -> list[dict[str, float]]:
    """The measures of every seed."""
    paths = sorted(out.glob(f"{stem}-[0-9].json"))
    return [json.loads(path.read_text()) for path in paths]


def standard_error(a: list[float], b: list[float]) -> float:
    """Of the difference of two means."""
    return math.sqrt(sum(statistics.variance(x) / len(x) for x in (a, b)))


if __name__ == "__main__":
    main()
