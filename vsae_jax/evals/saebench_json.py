"""Our results in the schema of SAEBench 0.6's own result files.

Each evaluation has a file, `evals/saebench/<eval_type_id>_eval_results.json`. Values
that are not known are null where the schema allows it. As in SAEBench's files, -1
stands for what is not a number.
"""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vsae_jax.evals import Subject, ablation, sparse_probing
from vsae_jax.evals.encoding import CONTEXT
from vsae_jax.evals.tasks import mean_metrics
from vsae_jax.system.version import VERSION

TYPES = {
    "core": "core",
    "sparse_probing": "sparse_probing",
    "scr": "scr",
    "tpp": "tpp",
    "absorption": "absorption_first_letter",
}
_CORE = {
    "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
    "model_performance_preservation": "ce_loss_score ce_loss_with_ablation "
    "ce_loss_with_sae ce_loss_without_sae",
    "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
    "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
    "sparsity": "l0 l1",
    "misc_metrics": "freq_over_1_percent freq_over_10_percent "
    "normalized_freq_over_1_percent normalized_freq_over_10_percent "
    "average_max_encoder_cosine_sim average_max_decoder_cosine_sim frac_alive",
}


def path_of(folder: Path, name: str) -> Path:
    """Where an evaluation's file lies, under the folder `evals`."""
    return folder / "saebench" / f"{TYPES[name]}_eval_results.json"


def has_schema_of(name: str, result: Mapping[str, Any]) -> bool:
    """Whether SAEBench would write something: it has the evaluation, and it was not
    refused."""
    return name in _PARTS and bool(result["metrics"])


def in_their_schema(
    subject: Subject, name: str, result: dict[str, Any]
) -> dict[str, Any] | None:
    """What SAEBench would write; None for an evaluation that it does not have, or that
    was refused, for which it writes nothing."""
    if not has_schema_of(name, result):
        return None
    config, metrics, details = _PARTS[name](result)
    return {
        "eval_type_id": TYPES[name],
        "eval_config": config | {"model_name": result["config"]["model"]},
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": f"vsae_jax {VERSION}",
        "sae_lens_id": subject.run.folder.resolve().name,
        "sae_lens_release_id": "vsae_jax",
        "sae_lens_version": None,
        "sae_cfg_dict": {
            "architecture": subject.run.sae.sparsity,
            "d_in": subject.run.sae.d_model,
            "d_sae": subject.run.sae.d_sae,
            "hook_name": subject.reader.place.name,
            "hook_layer": subject.reader.layer,
            "model_name": result["config"]["model"],
            "dtype": "float32",
        },
        "eval_result_unstructured": {"config": result["config"]},
    }


Parts = tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]


def _core(result: dict[str, Any]) -> Parts:
    values, about = result["metrics"], result["config"]
    metrics: dict[str, Any] = {
        category: {name: _number(values[name]) for name in names.split()}
        for category, names in _CORE.items()
    }
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": about["n_tokens"],
        "total_tokens_eval_sparsity_variance": about["n_tokens"],
    }
    columns = result["per_latent"]
    rows = zip(*columns.values(), strict=True)
    details = [
        {"index": i} | {n: _number(v) for n, v in zip(columns, row, strict=True)}
        for i, row in enumerate(rows)
    ]
    flags = "kl ce_loss l2_norms sparsity_metrics variance_metrics".split()
    flags += ["featurewise_density_statistics", "featurewise_weight_based_metrics"]
    config = {f"compute_{flag}": True for flag in flags}
    config |= {"llm_dtype": about["lm_dtype"], "context_size": about["context_length"]}
    config["dataset"] = about["tokens_from"]
    config["exclude_special_tokens_from_reconstruction"] = True
    return config, metrics, details


def _sparse_probing(result: dict[str, Any]) -> Parts:
    about = result["config"]
    config = _of_texts(about) | {
        "probe_train_set_size": about["train_size"],
        "probe_test_set_size": about["test_size"],
        "k_values": list(sparse_probing.KS),
    }
    values = result["metrics"]
    metrics = {
        side: {n: v for n, v in values.items() if n.startswith(f"{side}_")}
        for side in ("llm", "sae")
    }
    details = [
        {"dataset_name": name} | mean_metrics(list(classes.values()))
        for name, classes in result["per_class"].items()
    ]
    return config, metrics, details


def _perturbation(result: dict[str, Any], name: str) -> Parts:
    about = result["config"]
    config = _of_texts(about) | {
        "perform_scr": name == "scr",
        "train_set_size": about["train_size"],
        "test_set_size": about["test_size"],
        "n_values": list(ablation.NS),
    }
    if name == "scr":
        details = {
            f"{where}_scr_{pair}": metrics
            for where, pairs in result["per_class"].items()
            for pair, metrics in pairs.items()
        }
    else:
        details = {
            f"{where}_tpp": mean_metrics(list(classes.values()))
            for where, classes in result["per_class"].items()
        }
    each = [{"dataset_name": n} | _thresholds(m) for n, m in details.items()]
    return config, {f"{name}_metrics": _thresholds(result["metrics"])}, each


def _absorption(result: dict[str, Any]) -> Parts:
    names = (
        "mean_absorption_fraction",
        "full_absorption_rate",
        "num_full_absorption",
        "num_probe_true_positives",
        "num_split_features",
    )
    details = [
        {"first_letter": letter} | {name: values[name] for name in names}
        for letter, values in result["per_letter"].items()
        if "num_split_features" in values
    ]
    about = result["config"]
    config = {"random_seed": about["eval_seed"], "llm_dtype": about["lm_dtype"]}
    metrics = {name: _number(value) for name, value in result["metrics"].items()}
    return config, {"mean": metrics}, details


_PARTS = {
    "core": _core,
    "sparse_probing": _sparse_probing,
    "scr": lambda result: _perturbation(result, "scr"),
    "tpp": lambda result: _perturbation(result, "tpp"),
    "absorption": _absorption,
}


def _of_texts(about: dict[str, Any]) -> dict[str, Any]:
    return {
        "random_seed": about["eval_seed"],
        "dataset_names": list(about["sets"]),
        "context_length": CONTEXT,
        "llm_batch_size": about["batch_size"],
        "llm_dtype": about["lm_dtype"],
    }


def _thresholds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if "_threshold_" in name}


def _number(value: float | None) -> float:
    return -1.0 if value is None else value
