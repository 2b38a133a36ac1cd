"""SAEBench 0.6 beside `evaluate` on labelled texts: the same numbers, and how fast?

    python -m benchmarks.saebench_texts --runs=RUN --model=FOLDER \
        --labelled=FILE.jsonl --label_column=category --attribute_column=rating \
        --out=NEW_DIR --saebench=PYTHON [--train_size=1000 --test_size=400] \
        [--evals=sparse_probing]

PYTHON as for `benchmarks.saebench`. Both get the same tokens, samples and probes;
theirs run through SAEBench's own functions, with the run as SAELens loads our export.
The model runs in float32. Our quirks are all on, but for `resample`, whose draws are
torch's. Expected: 1e-5 for pooled and ablated vectors, accuracies within one test row.
Ours runs twice (compiled the second time), theirs once.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.saebench import by_saelens, hooked

ABLATED = 20
SCR_NAMES = {
    "attribute": "male / female",
    "label": "professor / nurse",
    "biased": "male_professor / female_nurse",
}


def main() -> None:
    """Runs both sides on every run and prints the tables."""
    flags = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for name in ("runs", "model", "labelled", "out", "saebench"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--label_column", default="label")
    flags.add_argument("--attribute_column", default="")
    flags.add_argument("--train_size", type=int, default=1000)
    flags.add_argument("--test_size", type=int, default=400)
    flags.add_argument("--evals", default="sparse_probing,tpp,scr")
    a = flags.parse_args()
    for run in a.runs.split(","):
        folder = Path(a.out) / Path(run).name
        ours(run, folder, a)
        command = [a.saebench, "-m", "benchmarks.saebench_texts", "there", folder]
        # jaxtyping 0.3.11 refuses the shapes of SAEBench 0.6's own probes.
        env = os.environ | {"JAXTYPING_DISABLE": "1"}
        subprocess.run([*command, a.model], check=True, env=env)
        compare(folder)


def ours(run: str, folder: Path, a: argparse.Namespace) -> None:
    """Our results, with all that the other side needs to do the same."""
    from vsae_jax import convert
    from vsae_jax.config import ConvertConfig, EvalConfig
    from vsae_jax.evals import on_texts, quirks, subjects

    convert.run(ConvertConfig(input=run, out=str(folder / "sae"), to="saelens"))
    flags = {
        name: getattr(a, name)
        for name in "model labelled label_column attribute_column train_size "
        "test_size".split()
    }
    config = EvalConfig(run=run, num_tokens=128, lm_dtype="float32", **flags)
    ((subject,),) = subjects.open_subjects(config)
    switches = quirks.read_quirks("", all_of_them=True)
    switches = dataclasses.replace(switches, resample=False)
    names = a.evals.split(",")
    if not a.attribute_column:
        names = [name for name in names if name != "scr"]
    ((s, planned),) = on_texts.open_sets(names, config)
    seconds: list[dict[str, float]] = []
    for _ in range(2):
        found, arrays, times = measure(subject, s.name, planned, names, switches)
        seconds.append(times)
    found["seconds"] = {"first": seconds[0], "second": seconds[1]}
    np.savez(folder / "shared.npz", allow_pickle=False, **arrays)
    (folder / "ours.json").write_text(json.dumps(found))


def measure(
    subject: Any, name: str, planned: Any, names: list[str], switches: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, float]]:
    """Our metrics, the arrays that are shared or compared, and seconds."""
    from vsae_jax import lm
    from vsae_jax.evals import encoding, on_texts
    from vsae_jax.evals.tasks import Task

    clock, times = time.perf_counter, {}
    tokenizer = lm.load_tokenizer(subject.lm.files)
    bos = [subject.lm.bos_id]
    tokens = encoding.tokenise(planned.texts, tokenizer, bos=bos)
    start = clock()
    pooled, (latents,) = encoding.encode_texts([subject], tokens, stored_norms=True)
    times["encoding"] = clock() - start
    split, quadrants = planned.split, planned.quadrants
    task = Task(name, split, quadrants, pooled, 42, switches)
    found: dict[str, Any] = {}
    prepared: dict[str, Any] = {}
    for each in names:
        start = clock()
        prepared[each] = on_texts.EVALS[each].prepare(task)
        times[f"{each}, the model's probes"] = clock() - start
        start = clock()
        found[each] = on_texts.EVALS[each].score(task, prepared[each], latents)
        times[each] = clock() - start
    pad = min(subject.lm.special_ids)
    padded = np.full((len(tokens), encoding.CONTEXT), pad, np.int64)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    arrays = {
        "tokens": padded,
        "special": np.array(sorted(subject.lm.special_ids)),
        "pooled_x": pooled.x,
        "pooled_f": latents.pooled,
    }
    for part in ("train", "test"):
        for each, own in getattr(split, part).items():
            arrays[f"class {part} {each}"] = own
        for each, own in task.samples(part, "").items():
            arrays[f"rows {part} {each}"] = own.rows
            arrays[f"labels {part} {each}"] = own.labels
    if "tpp" in names:
        arrays |= of_tpp(task, prepared["tpp"].fitted, latents)
    if "scr" in names:
        arrays |= of_scr(task, prepared["scr"])
        pair = next(iter(quadrants))
        found["scr"] = {pair: found["scr"][pair]}
    return found, arrays, times


def of_tpp(task: Any, fitted: Any, latents: Any) -> dict[str, np.ndarray]:
    """All probes, and for the first class the effects and an ablation."""
    from vsae_jax.evals import ablation

    first = next(iter(task.split.test))
    sample = task.samples("train", "")[first]
    effects = ablation.effects(
        latents, sample, fitted.weights(first)[0], positive_only=True
    )
    chosen = ablation.strongest(effects, ABLATED, surplus=False)
    rows = task.split.test[first]
    ablated = ablation.ablated_pooled(
        latents, task.pooled, rows, chosen, padding_leak=True
    )
    probes = {f"probe {c}": np.append(*fitted.weights(c)) for c in task.split.test}
    return {"effects": effects, "chosen": chosen, "ablated": ablated, **probes}


def of_scr(task: Any, prepared: Any) -> dict[str, np.ndarray]:
    """Rows, samples and probes of the first pair of labels."""
    from vsae_jax.evals import scr

    pair, split = next(iter(task.quadrants.items()))
    arrays = {}
    for part in ("train", "test"):
        rows = getattr(split, part)
        for name, sides in scr.TASKS.items():
            size = len(rows["P-"]) * (2 if name == "biased" else 1)
            for side, quadrants in zip(("yes", "no"), sides, strict=True):
                own = [rows[quadrant][:size] for quadrant in quadrants]
                arrays[f"scr {part} {name} {side}"] = np.concatenate(own)
        for name, own in scr.samples(task, pair, split, part, "").items():
            arrays[f"scr rows {part} {name}"] = own.rows
            arrays[f"scr labels {part} {name}"] = own.labels
    for name in scr.TASKS:
        w, b = prepared.fitted[pair].weights(name)
        arrays[f"scr probe {name}"] = np.append(w, b)
    return arrays


def there(folder: Path, model: str) -> None:
    """SAEBench's own functions on the same tokens, samples and probes."""
    from types import SimpleNamespace

    import torch
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils import activation_collection as collection
    from sae_bench.sae_bench_utils import general_utils

    torch.set_grad_enabled(False)
    shared = dict(np.load(folder / "shared.npz"))
    sae = by_saelens(folder / "sae", model)
    _, sae, _ = general_utils.load_and_format_sae("ours", sae, "cpu")
    options = sae.cfg.model_from_pretrained_kwargs or {}
    language_model, _ = hooked(model, **options)
    special = shared["special"].tolist()
    ids = (special * 3)[:3]
    language_model.tokenizer = SimpleNamespace(
        pad_token_id=ids[0],
        eos_token_id=ids[1],
        bos_token_id=ids[2],
        padding_side="right",
    )
    # Their tokenizer is replaced by one that only knows its special tokens.
    hook = sae.cfg.metadata.hook_name
    layer = int(hook.split(".")[1])
    clock, times, found = time.perf_counter, {}, {}
    start = clock()
    tokens = torch.from_numpy(shared["tokens"])
    acts = collection.get_llm_activations(
        tokens, language_model, 64, layer, hook, mask_bos_pad_eos_tokens=True
    )
    times["the model's activations"] = clock() - start
    classes = [n.removeprefix("class test ") for n in shared if "class test " in n]
    parts = {
        part: {c: acts[shared[f"class {part} {c}"]] for c in classes}
        for part in ("train", "test")
    }
    injected = Injected(shared, classes, torch)
    probe_training.prepare_probe_data = injected
    start = clock()
    pooled = {
        part: collection.get_sae_meaned_activations(each, sae, 125)
        for part, each in parts.items()
    }
    times["encoding"] = clock() - start
    start = clock()
    _, accuracies = probe_training.train_probe_on_activations(
        pooled["train"],
        pooled["test"],
        use_sklearn=False,
        batch_size=250,
        epochs=100,
        lr=1e-2,
    )
    found["sae_test_accuracy"] = accuracies
    torch.set_grad_enabled(False)
    for k in (1, 2, 5):
        _, accuracies = probe_training.train_probe_on_activations(
            pooled["train"], pooled["test"], select_top_k=k
        )
        found[f"sae_top_{k}_test_accuracy"] = accuracies
    torch.set_grad_enabled(False)
    times["sparse_probing"] = clock() - start
    x = collection.create_meaned_model_activations(parts["test"])
    found["differences"] = {
        "pooled x": gap(x, shared["pooled_x"], shared, classes),
        "pooled latents": gap(pooled["test"], shared["pooled_f"], shared, classes),
    }
    if "effects" in shared:
        start = clock()
        tpp_there(parts, x, shared, sae, classes, found)
        times["tpp"] = clock() - start
    if any(name.startswith("scr ") for name in shared):
        start = clock()
        found["scr"] = scr_there(acts, shared, sae, injected)
        times["scr, one pair"] = clock() - start
    found["seconds"] = times
    (folder / "theirs.json").write_text(json.dumps(found))


class Injected:
    """SAEBench's `prepare_probe_data` with our samples: the rows of a part's classes
    one after another, at the places that we drew."""

    def __init__(self, shared: dict[str, np.ndarray], classes: list[str], torch: Any):
        self.torch, self.places = torch, {}
        for part in ("train", "test"):
            order = np.concatenate([shared[f"class {part} {c}"] for c in classes])
            place = {row: i for i, row in enumerate(order)}
            for c in classes:
                rows = [place[row] for row in shared[f"rows {part} {c}"]]
                self.add(c, len(order), rows, shared[f"labels {part} {c}"])

    def add(self, name: str, total: int, rows: list[int], labels: np.ndarray) -> None:
        """A sample of `name` where all its activations have `total` rows."""
        self.places[name, total] = (rows, labels)

    def __call__(
        self, activations: dict[str, Any], name: str, perform_scr: bool = False
    ) -> Any:
        every = self.torch.cat(list(activations.values()))
        rows, labels = self.places[name, len(every)]
        return every[rows], self.torch.from_numpy(labels.astype(np.int32))


def tpp_there(
    parts: dict[str, dict[str, Any]],
    x: dict[str, Any],
    shared: dict[str, np.ndarray],
    sae: Any,
    classes: list[str],
    found: dict[str, Any],
) -> None:
    """Puts TPP, an ablation and the effects into `found`; `x` are pooled vectors."""
    import torch
    from sae_bench.evals.scr_and_tpp import main as perturbation
    from sae_bench.evals.sparse_probing import probe_training

    probes = {c: as_probe(shared[f"probe {c}"], probe_training, torch) for c in classes}
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[shared["chosen"]] = True
    first = parts["test"][classes[0]]
    ablated = perturbation.ablated_precomputed_activations(first, sae, mask, 125)
    found["differences"]["ablated x"] = largest(ablated.numpy(), shared["ablated"])
    effects = perturbation.get_all_node_effects_for_one_sae(
        sae, probes, classes, False, parts["train"], 125
    )
    ours = shared["effects"]
    found["differences"]["effects"] = largest(effects[classes[0]].numpy(), ours)
    after = perturbation.perform_feature_ablations(
        probes, sae, 125, parts["test"], effects, usable(sae), classes, 500, False
    )
    clean = perturbation.get_probe_test_accuracy(probes, classes, x, 500, False)
    _, found["tpp"] = perturbation.create_tpp_plotting_dict(after, clean)
    found["positive_effects"] = {
        c: int((each > 0).sum()) for c, each in effects.items()
    }


def usable(sae: Any) -> list[int]:
    """Numbers of ablated latents that there are."""
    return [n for n in (2, 5, 10, 20, 50, 100, 500) if n <= sae.cfg.d_sae]


def scr_there(
    acts: Any, shared: dict[str, np.ndarray], sae: Any, injected: Any
) -> dict[str, float]:
    """SCR of the first pair of labels."""
    import torch
    from sae_bench.evals.scr_and_tpp import main as perturbation
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils import activation_collection as collection

    parts: dict[str, dict[str, Any]] = {"train": {}, "test": {}}
    for part, each in parts.items():
        order = []
        for name, theirs in SCR_NAMES.items():
            for side, key in (("yes", theirs), ("no", f"not {theirs}")):
                rows = shared[f"scr {part} {name} {side}"]
                each[key] = acts[rows]
                order.append((name, rows))
        total = sum(len(rows) for _, rows in order)
        start = 0
        for name, theirs in SCR_NAMES.items():
            own = np.concatenate([rows for n, rows in order if n == name])
            place = {row: start + i for i, row in enumerate(own)}
            rows = [place[row] for row in shared[f"scr rows {part} {name}"]]
            injected.add(theirs, total, rows, shared[f"scr labels {part} {name}"])
            start += len(own)
    names = list(SCR_NAMES.values())
    probes = {
        theirs: as_probe(shared[f"scr probe {name}"], probe_training, torch)
        for name, theirs in SCR_NAMES.items()
    }
    x = collection.create_meaned_model_activations(parts["test"])
    clean = perturbation.get_probe_test_accuracy(probes, names, x, 500, True)
    effects = perturbation.get_all_node_effects_for_one_sae(
        sae, probes, names, True, parts["train"], 125
    )
    after = perturbation.perform_feature_ablations(
        probes, sae, 125, parts["test"], effects, usable(sae), names, 500, True
    )
    return perturbation.get_scr_plotting_dict(after, clean)


def as_probe(values: np.ndarray, probe_training: Any, torch: Any) -> Any:
    """Our probe as SAEBench's."""
    probe = probe_training.Probe(len(values) - 1, torch.float32)
    weight = torch.from_numpy(values[:-1].astype(np.float32))[None]
    bias = torch.from_numpy(values[-1:].astype(np.float32))
    probe.net.load_state_dict({"weight": weight, "bias": bias})
    return probe


def gap(theirs: dict[str, Any], ours: np.ndarray, shared: Any, classes: list[str]):
    """The largest difference over the test rows of all classes."""
    return max(
        largest(theirs[c].numpy(), ours[shared[f"class test {c}"]]) for c in classes
    )


def largest(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(theirs - ours).max() / max(np.abs(theirs).max(), 1e-30))


def compare(folder: Path) -> None:
    """Differences of vectors, accuracies in test rows, and seconds."""
    own, theirs = (
        json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "theirs")
    )
    print(f"\n{folder.name}\n\n| | largest difference |\n|---|---|")
    for name, value in theirs["differences"].items():
        print(f"| {name} | {value:.1e} |")
    for name in ("sae_top_1", "sae_top_2", "sae_top_5", "sae"):
        key = f"{name}_test_accuracy"
        worst = max(
            abs(own["sparse_probing"][c][key] - v) for c, v in theirs[key].items()
        )
        print(f"| {key}, by class | {worst:.4f} |")
    for eval_name in ("tpp", "scr"):
        if eval_name in theirs:
            for n, worst in by_number(own, theirs, eval_name).items():
                print(f"| {eval_name}, {n} latents ablated | {worst:.4f} |")
    if "tpp" in theirs:
        print(f"\npositive effects by class: {theirs['positive_effects']}")
    print(
        "\n| seconds | ours, first | ours | SAEBench | ratio |\n|---|---|---|---|---|"
    )
    first, second = (own["seconds"][name] for name in ("first", "second"))
    for name, value in theirs["seconds"].items():
        mine = second.get(name.partition(",")[0])
        if mine is None:
            print(f"| {name} | | | {value:.2f} | |")
            continue
        start = first[name.partition(",")[0]]
        print(
            f"| {name} | {start:.2f} | {mine:.2f} | {value:.2f} | {value / mine:.1f} |"
        )


def by_number(own: Any, theirs: Any, name: str) -> dict[int, float]:
    """The largest difference of any score, by the number of ablated latents."""
    worst: dict[int, float] = {}
    pairs = [(own["tpp"][c], v) for c, v in theirs["tpp"].items()]
    if name == "scr":
        pairs = [(next(iter(own["scr"].values())), theirs["scr"])]
    for mine, other in pairs:
        for key, value in other.items():
            n = int(key.split("threshold_")[1].split("_")[0])
            worst[n] = max(worst.get(n, 0.0), abs(mine[key] - value))
    return dict(sorted(worst.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["there"]:
        there(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
