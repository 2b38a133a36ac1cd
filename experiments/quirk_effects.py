"""What each of SAEBench's quirks changes in the scores of one autoencoder.

Claim (docs/saebench.md 7): SAEBench 0.6 has bugs and habits that move its numbers.

    python -m experiments.quirk_effects --run=RUN --labelled=FILE.jsonl \
        --label_column=category --attribute_column=rating

Prints one Markdown row per quirk: each main score with that quirk alone, beside ours
(none) and SAEBench's (all). What was found is in docs/results.md.
"""

from collections.abc import Sequence
from typing import Any

from vsae_jax import lm
from vsae_jax.config import EvalConfig, cli
from vsae_jax.evals import Subject, core, on_texts
from vsae_jax.evals.encoding import encode_texts, tokenise
from vsae_jax.evals.quirks import NAMES, Quirks, read_quirks
from vsae_jax.evals.subjects import open_subjects
from vsae_jax.evals.tasks import Task, mean_metrics

OF_CORE = ("mean_in_variance", "batch_sums", "kl_underflow")
SHOWN = {
    "explained_variance": "expl. var.",
    "mse": "mse",
    "kl_div_score": "KL score",
    "llm_test_accuracy": "LM probe",
    "sae_test_accuracy": "SAE probe",
    "sae_top_1_test_accuracy": "top-1",
    "tpp_threshold_10_total_metric": "TPP 10",
    "tpp_threshold_100_total_metric": "TPP 100",
    "scr_metric_threshold_10": "SCR 10",
    "scr_metric_threshold_100": "SCR 100",
}


def command(configs: Sequence[EvalConfig]) -> None:
    """Prints the table."""
    config = configs[0]
    ((subject, *_), *_) = open_subjects(config)
    cases = {"ours": Quirks()}
    cases |= {name: read_quirks(name, all_of_them=False) for name in NAMES}
    cases["all of them"] = read_quirks("", all_of_them=True)
    of_core = {
        name: core.run([subject], quirks)[0]["metrics"]
        for name, quirks in cases.items()
        if name in ("ours", "all of them", *OF_CORE)
    }
    others = {name: quirks for name, quirks in cases.items() if name not in OF_CORE}
    of_texts = _of_texts(subject, config, others)
    print(f"| quirk | {' | '.join(SHOWN.values())} |\n|{'---|' * (len(SHOWN) + 1)}")
    for name in cases:
        found = of_core.get(name, {}) | of_texts.get(name, {})
        cells = [f"{found[n]:.4f}" if n in found else "" for n in SHOWN]
        print(f"| {name} | {' | '.join(cells)} |")


def _of_texts(
    subject: Subject, config: EvalConfig, cases: dict[str, Quirks]
) -> dict[str, dict[str, Any]]:
    """Scores on the first labelled set; it is encoded once for each kind of norms."""
    names = list(on_texts.EVALS)
    s, planned = on_texts.open_sets(names, config)[0]
    tokenizer = lm.load_tokenizer(subject.lm.files)
    tokens = tokenise(planned.texts, tokenizer, bos=[subject.lm.bos_id])
    encoded = {
        stored: encode_texts([subject], tokens, stored_norms=stored)
        for stored in (False, True)
    }
    found: dict[str, dict[str, Any]] = {}
    for name, quirks in cases.items():
        pooled, (latents,) = encoded[quirks.stored_norms]
        split, quadrants = planned.split, planned.quadrants
        task = Task(s.name, split, quadrants, pooled, config.seed, quirks)
        for module in on_texts.EVALS.values():
            by_class = module.score(task, module.prepare(task), latents)
            found.setdefault(name, {}).update(mean_metrics(list(by_class.values())))
    return found


if __name__ == "__main__":
    cli.main(command, EvalConfig)
