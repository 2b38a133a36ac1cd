"""Core: identity and zero autoencoders, float64 NumPy, and everything `--run` may be.

Numbers come from a real GPT-NeoX with random weights, so that its losses say nothing
about language but everything about the arithmetic.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lm_hf import SMALL, save_random
from tiny_models import make_stories, make_tiny_neox, write_jsonl
from tiny_runs import (
    CONTEXTS,
    D_MODEL,
    LENGTH,
    call,
    copied,
    identity_arrays,
    write_run,
)

from vsae_jax import evaluate, runs
from vsae_jax.activations.shards import Activations
from vsae_jax.evals import Subject, core
from vsae_jax.evals.quirks import Quirks
from vsae_jax.lm import load_language_model
from vsae_jax.system.errors import UserError

# By SAEBench's definition these are means over batches, not over tokens.
PER_BATCH = {"explained_variance_saebench", "explained_variance_legacy"}


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_language_model(str(tiny_model), backend="jax")


@pytest.fixture(scope="module")
def held_out(tiny_rows) -> np.ndarray:
    return Activations.open(tiny_rows).tokens(64, CONTEXTS)


@pytest.fixture(scope="module")
def identity_run(tiny_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity") / "run"
    return write_run(folder, tiny_rows, identity_arrays(), variant="relu")


@pytest.fixture(scope="module")
def zero_run(tiny_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero") / "run"
    arrays = identity_arrays() | {"w_dec": np.zeros((2 * D_MODEL, D_MODEL))}
    return write_run(folder, tiny_rows, arrays, variant="relu")


def measured(folder, lm, tokens, *, batch_size=16, **data) -> dict:
    """Core's metrics of a run on these tokens; `data` replaces what it was made of."""
    run = runs.open_run(folder)
    run = dataclasses.replace(run, data=run.data | data)
    result = core.run([Subject(run, lm, tokens, batch_size, config={})], Quirks())[0]
    return result["metrics"]


@pytest.fixture
def tiny_run(tiny_run, tmp_path) -> Path:
    """`evaluate` writes into the run's folder."""
    return copied(tiny_run, tmp_path / tiny_run.name)


def evaluated(folder, **flags) -> dict:
    """`evals/core.json` after the real command; NaN and Infinity are no JSON."""
    assert call("evaluate", run=folder, **flags) == 0

    def refuse(constant):
        raise ValueError(constant)

    text = (Path(folder) / "evals/core.json").read_text()
    return json.loads(text, parse_constant=refuse)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def autoencoder(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f and x_hat of a TopK or relu run, from its files alone, in float64."""
    p = {
        n: a.astype(np.float64) for n, a in load_file(folder / runs.PARAMETERS).items()
    }
    sae = json.loads((folder / "config.json").read_text())["sae"]
    x_n = p["scale"] * (x - p["mean"])
    f = (x_n - p["b_dec"] * sae["subtract_b_dec"]) @ p["w_enc"] + p["b_enc"]
    f = np.maximum(f, 0)
    if sae["sparsity"] == "topk":
        order = np.argsort(-f, axis=-1, kind="stable")
        np.put_along_axis(f, order[..., sae["k"] :], 0, axis=-1)
    return f, (f @ p["w_dec"] + p["b_dec"]) / p["scale"] + p["mean"]


def reference(
    folder: Path, lm, tokens, *, dropped=1, center=False, special=(0,), everywhere=False
) -> dict[str, float]:
    """Core by the book: docs/saebench.md 1, one position at a time; `everywhere`
    replaces the residual of special and dropped positions too."""
    residual = np.asarray(lm.residual(tokens, 0), np.float64)
    shift = residual.mean(-1, keepdims=True) if center else np.zeros(1)
    f, x_hat = autoencoder(folder, residual - shift)
    keep = ~np.isin(tokens, special)
    keep[:, :dropped] = False
    replaced = (keep | everywhere)[..., None]
    spliced = np.where(replaced, x_hat + shift, residual).astype(np.float32)
    splices = [lambda x: x, lambda _: spliced, lambda x: 0 * x]
    log_p = [log_softmax(a) for a in lm.logits(tokens, layer=0, splices=splices)]
    ce, kl = [[], [], []], [[], [], []]
    for row, time in zip(*np.nonzero(keep), strict=True):
        for i in range(3):
            p = log_p[0][row, time]
            kl[i].append(np.exp(p) @ (p - log_p[i][row, time]))
            if time + 1 < tokens.shape[1]:
                ce[i].append(-log_p[i][row, time, tokens[row, time + 1]])
    clean, sae, ablated = (np.mean(c) for c in ce)
    x, x_hat, f = (residual - shift)[keep], x_hat[keep], f[keep]
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
    ordinary = np.linalg.norm(x, axis=1) <= 3 * np.median(np.linalg.norm(x, axis=1))
    some = x[ordinary]
    return {
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": sae,
        "ce_loss_with_ablation": ablated,
        "ce_loss_score": (ablated - sae) / (ablated - clean),
        "kl_div_with_sae": np.mean(kl[1]),
        "kl_div_with_ablation": np.mean(kl[2]),
        "kl_div_score": 1 - np.mean(kl[1]) / np.mean(kl[2]),
        "explained_variance": 1
        - np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(0)) ** 2),
        "explained_variance_standardised": 1
        - np.mean(np.mean((x - x_hat) ** 2, axis=0) / x.var(0)),
        "explained_variance_ordinary_rows": 1
        - np.sum((some - x_hat[ordinary]) ** 2) / np.sum((some - some.mean(0)) ** 2),
        "share_ordinary_rows": ordinary.mean(),
        "cossim": np.mean((x * x_hat).sum(1) / np.maximum(norms, 1e-12)),
        "l0": (f != 0).sum(1).mean(),
        "frac_alive": (f > 0).any(0).mean(),
    }


def assert_close(metrics, expected, rel=1e-5):
    for name, value in expected.items():
        # A score is a quotient of small differences of losses.
        tolerance = 50 * rel if name == "ce_loss_score" else rel
        assert metrics[name] == pytest.approx(value, rel=tolerance, abs=rel), name


def test_an_identity_recovers_everything(identity_run):
    metrics = evaluated(identity_run)["metrics"]
    scores = (
        "ce_loss_score kl_div_score explained_variance explained_variance_saebench "
        "explained_variance_legacy cossim l2_ratio frac_alive"
    ).split()
    assert {n: metrics[n] for n in scores} == pytest.approx(
        dict.fromkeys(scores, 1), abs=1e-4
    )
    assert metrics["l0"] == D_MODEL
    assert metrics["kl_div_with_sae"] < 1e-6 < 0.1 < metrics["kl_div_with_ablation"]


def test_a_trained_run_equals_numpy(tiny_run, lm, held_out):
    result = evaluated(tiny_run)
    expected = reference(tiny_run, lm, held_out)
    assert_close(result["metrics"], expected)
    # So that the comparison would notice a position that should not count or change.
    for wrong in ({"dropped": 2}, {"special": ()}, {"everywhere": True}):
        other = reference(tiny_run, lm, held_out, **wrong)
        for name in ("ce_loss_with_sae", "kl_div_with_sae"):
            assert abs(other[name] - expected[name]) > 1e-4, (wrong, name)


def test_the_file_has_the_contracts_keys(tiny_run):
    result = evaluated(tiny_run)
    keys = (
        "ce_loss_score ce_loss_with_sae ce_loss_without_sae ce_loss_with_ablation "
        "kl_div_score explained_variance explained_variance_saebench cossim l0 "
        "frac_alive frac_alive_above_1e-4 frac_alive_above_1e-2 "
        "entropy_effective_latents"
    )
    assert set(keys.split()) <= result["metrics"].keys()
    assert all(isinstance(v, float) for v in result["metrics"].values())
    expected = {
        "n_tokens": 16 * LENGTH,
        "n_contexts": 16,
        "tokens_from": "held-out contexts",
        "dtype": "float32",
        "bos": "drop",
        "dropped_positions": 1,
        "layer": 0,
        "preset": "paper",
        "variant": "topk",
        "k": 4,
        "seed": 0,
    }
    assert {n: result["config"][n] for n in expected} == expected
    histogram = result["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never"] == 32


def test_zero_is_an_ablation_but_for_positions_that_are_left_alone(
    zero_run, lm, held_out
):
    metrics = evaluated(zero_run)["metrics"]
    expected = reference(zero_run, lm, held_out)
    assert_close(metrics, expected)
    assert abs(metrics["kl_div_score"]) > 1e-3
    assert metrics["explained_variance"] <= 0 and metrics["cossim"] == 0


def test_zero_is_an_ablation_where_every_position_counts(zero_run, lm):
    tokens = np.random.default_rng(0).integers(1, 300, (4, LENGTH), dtype=np.int32)
    metrics = measured(zero_run, lm, tokens, dropped_positions=0)
    assert metrics["ce_loss_score"] == pytest.approx(0, abs=1e-5)
    assert metrics["kl_div_score"] == pytest.approx(0, abs=1e-6)
    assert metrics["ce_loss_with_sae"] == metrics["ce_loss_with_ablation"]


@pytest.mark.parametrize("dropped", [0, 3])
def test_dropped_positions_are_neither_replaced_nor_counted(
    tiny_run, lm, held_out, dropped
):
    metrics = measured(tiny_run, lm, held_out, dropped_positions=dropped)
    assert_close(metrics, reference(tiny_run, lm, held_out, dropped=dropped))


def test_a_centred_run_gets_the_rows_mean_back(identity_run, zero_run, lm, held_out):
    metrics = measured(identity_run, lm, held_out, center_residual=True)
    for name in ("ce_loss_score", "kl_div_score", "explained_variance"):
        assert metrics[name] == pytest.approx(1, abs=1e-4), name
    metrics = measured(zero_run, lm, held_out, center_residual=True)
    expected = reference(zero_run, lm, held_out, center=True)
    assert_close(metrics, expected)
    plain = reference(zero_run, lm, held_out)
    assert abs(plain["explained_variance"] - expected["explained_variance"]) > 1e-3


def test_a_family_that_sees_the_rows_mean_gets_it_back_too(
    zero_run, held_out, tmp_path
):
    # GPT-NeoX's LayerNorms take it away again; Llama's RMSNorms do not.
    settings = SMALL | {"vocab_size": 320, "hidden_size": D_MODEL, "head_dim": 4}
    lm = load_language_model(save_random("Llama", settings, tmp_path))
    metrics = measured(zero_run, lm, held_out, center_residual=True)
    special = sorted(lm.special_ids)
    expected = reference(zero_run, lm, held_out, center=True, special=special)
    # A quotient of next to nothing: to this model an ablation is hardly a loss.
    del expected["ce_loss_score"]
    assert_close(metrics, expected)
    assert metrics["kl_div_with_sae"] != pytest.approx(
        measured(zero_run, lm, held_out)["kl_div_with_sae"], rel=1e-3
    )


def test_batch_size_and_padding_are_no_matter(tiny_run, lm, held_out):
    whole = measured(tiny_run, lm, held_out)
    # Leaves a last batch of one context and four of padding.
    parts = measured(tiny_run, lm, held_out, batch_size=5)
    assert parts.keys() == whole.keys()
    assert_close(parts, {n: v for n, v in whole.items() if n not in PER_BATCH})


def test_a_batch_larger_than_the_text_is_no_matter(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    metrics = evaluated(folder, batch_size=1000)["metrics"]
    assert metrics == evaluated(folder, batch_size=16)["metrics"]


def test_both_backends_agree(tiny_run, tmp_path):
    pytest.importorskip("torch")
    folder = copied(tiny_run, tmp_path / "run")
    ours = evaluated(folder, backend="jax")["metrics"]
    theirs = evaluated(folder, backend="transformers")["metrics"]
    assert theirs.keys() == ours.keys()
    assert_close(theirs, ours, rel=1e-4)


@pytest.mark.parametrize("backend", ["jax", "transformers"])
def test_a_language_model_in_bfloat16(tiny_run, tmp_path, backend):
    if backend == "transformers":
        pytest.importorskip("torch")
    folder = copied(tiny_run, tmp_path / "run")
    exact = evaluated(folder, backend="jax", lm_dtype="float32")
    rounded = evaluated(folder, backend=backend, lm_dtype="bfloat16")
    assert exact["config"]["lm_dtype"] == "float32"
    assert rounded["config"]["lm_dtype"] == "bfloat16"
    for name in ("ce_loss_without_sae", "ce_loss_with_sae", "explained_variance"):
        exactly = exact["metrics"][name]
        assert rounded["metrics"][name] == pytest.approx(exactly, abs=0.02)
        assert rounded["metrics"][name] != exactly


def test_a_run_trained_in_bfloat16_is_evaluated_in_float32(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    record = json.loads((folder / "config.json").read_text())
    record["sae"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(record))
    result = evaluated(folder)
    assert result["config"]["dtype"] == "float32"
    assert result["metrics"] == evaluated(tiny_run)["metrics"]


def test_fewer_tokens_are_the_first_held_out_contexts(tiny_run, lm, held_out, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    result = evaluated(folder, num_tokens=5 * LENGTH + 3)
    assert result["config"]["n_contexts"] == 5
    assert_close(result["metrics"], reference(tiny_run, lm, held_out[:5]))


def test_another_text_by_text_and_by_activations_is_the_same(
    tiny_run, extracted, tmp_path
):
    folder = copied(tiny_run, tmp_path / "run")
    corpus = write_jsonl(tmp_path / "other.jsonl", make_stories(60, seed=5))
    rows = extracted(dataset=corpus, num_tokens=40 * LENGTH)
    of_text = evaluated(folder, text=corpus, num_tokens=40 * LENGTH)
    of_rows = evaluated(folder, activations=rows)
    assert of_text["metrics"] == of_rows["metrics"]
    assert of_text["metrics"] != evaluated(tiny_run)["metrics"]
    assert of_text["config"]["n_contexts"] == of_rows["config"]["n_contexts"] == 40
    assert of_text["config"]["tokens_from"] == str(corpus)
    assert of_rows["config"]["tokens_from"] == str(rows)


def test_text_takes_another_column(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    stories = make_stories(60, seed=5)
    corpus = write_jsonl(tmp_path / "text.jsonl", stories)
    other = tmp_path / "story.jsonl"
    other.write_text("".join(json.dumps({"story": s}) + "\n" for s in stories))
    metrics = evaluated(folder, text=corpus, num_tokens=256)["metrics"]
    of_other = evaluated(folder, text=other, text_column="story", num_tokens=256)
    assert of_other["metrics"] == metrics


def test_moved_activations_are_recognised_as_the_runs(tiny_run, tiny_rows, tmp_path):
    rows = copied(tiny_rows, tmp_path / "rows")
    folder = copied(tiny_run, tmp_path / "run")
    result = evaluated(folder, activations=rows)
    assert result["config"]["tokens_from"] == "held-out contexts"
    assert result["metrics"] == evaluated(tiny_run)["metrics"]


def test_other_activations_of_the_same_text_are_noted(
    tiny_run, extracted, tmp_path, capsys
):
    folder = copied(tiny_run, tmp_path / "run")
    rows = extracted(num_tokens=20 * LENGTH)
    assert evaluated(folder, activations=rows)["config"]["n_contexts"] == 20
    assert "may have been seen in training" in capsys.readouterr().out


def test_another_model_of_the_same_shape_is_refused_unless_it_is_meant(
    tiny_run, tiny_model, tmp_path, capsys
):
    folder = copied(tiny_run, tmp_path / "run")
    other = make_tiny_neox(tmp_path / "other", seed=1)
    for command in ("evaluate", "features"):
        assert call(command, run=folder, model=other) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert f"--model={other} are not those of {tiny_model}" in line
        assert "--model_differs" in line
    assert not (folder / "evals").exists()
    result = evaluated(folder, model=other, model_differs=True)
    assert result["config"]["model"] == str(other)
    assert result["config"]["model_weights"] == "others than the run's"
    assert "other weights than in training" in (folder / "evals/summary.md").read_text()
    own = evaluated(copied(tiny_run, tmp_path / "own"))
    assert own["config"]["model_weights"] == "the run's"
    clean = "ce_loss_without_sae"
    assert result["metrics"][clean] != own["metrics"][clean]


def test_the_same_weights_elsewhere_are_the_runs(tiny_run, tiny_model, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    moved = copied(tiny_model, tmp_path / "moved")
    result = evaluated(folder, model=moved)
    assert result["config"]["model_weights"] == "the run's"


@pytest.mark.parametrize("activations_too", [False, True])
def test_a_run_without_a_hash_of_the_weights_is_noted_or_asks_its_activations(
    tiny_run, tiny_rows, tiny_corpus, tmp_path, capsys, activations_too
):
    """Older runs have none in config.json; some activations have none either."""
    folder = copied(tiny_run, tmp_path / "run")
    config = runs.read_json(folder / runs.CONFIG)
    del config["data"]["weights_hash"]
    if activations_too:
        config["train"]["activations"] = str(tmp_path / "gone")
    runs.write_json(folder / runs.CONFIG, config)
    result = evaluated(folder, text=tiny_corpus, num_tokens=320)
    known = "not known" if activations_too else "the run's"
    assert result["config"]["model_weights"] == known
    noted = "is not known: there are no hashes of both" in capsys.readouterr().out
    assert noted is activations_too


def test_encoder_norms_are_in_units_of_raw_activations(tiny_run, tmp_path):
    """As those of its export to SAELens, of which SAEBench would take them."""
    result = evaluated(copied(tiny_run, tmp_path / "run"))
    assert call("convert", input=tiny_run, to="saelens", out=tmp_path / "saelens") == 0
    exported = load_file(tmp_path / "saelens" / "sae_weights.safetensors")
    found = result["per_latent"]
    norms = np.linalg.norm(exported["W_enc"], axis=0)
    np.testing.assert_allclose(found["encoder_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(found["encoder_bias"], exported["b_enc"], atol=1e-5)
    stored = np.linalg.norm(load_file(tiny_run / runs.PARAMETERS)["w_enc"], axis=0)
    assert not np.allclose(found["encoder_norm"], stored, rtol=0.1)
    units = result["config"]["per_latent_units"]
    assert units["encoder_norm"] == "latent per unit of raw activation"


def test_a_grid_is_one_table_with_a_row_and_a_file_an_arm(tiny_grid, tmp_path, capsys):
    tiny_grid = copied(tiny_grid, tmp_path / "grid")
    assert call("evaluate", run=tiny_grid) == 0
    out = capsys.readouterr().out
    arms = [folder.name for folder in runs.run_folders(tiny_grid)]
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if "loss recovered" in line)
    assert [line.split()[0] for line in lines[header + 1 :]] == arms
    assert len({len(line) for line in lines[header:]}) == 1
    for arm in arms:
        path = tiny_grid / arm / "evals/core.json"
        assert f"wrote {path}" in lines
        alone = evaluated(tiny_grid / arm)["metrics"]
        assert f"{alone['explained_variance']:.4f}" in out


def test_the_folder_one_stands_in_has_a_name(tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run)
    assert call("evaluate", run=".") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("topk ")


def test_the_table():
    results = {
        "k-4": {"ce_loss_score": 0.98765, "l0": 63.97, "frac_alive": 1.0},
        "a_longer_name": {"ce_loss_score": None, "l0": 4.0, "frac_alive": 0.5},
    }
    results["k-4"]["cossim"] = results["a_longer_name"]["cossim"] = None
    head, *rows = evaluate.table(results).splitlines()
    assert re.split("  +", head.strip()) == ["loss recovered", "L0", "alive"]
    assert rows[0].split() == ["k-4", "0.9877", "64.0", "1.0000"]
    assert rows[1].split() == ["a_longer_name", "-", "4.0000", "0.5000"]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_the_table_after_probing_has_the_residuals_own_accuracies_beside():
    metrics = {"sae_test_accuracy": 0.8875, "llm_test_accuracy": 0.903}
    metrics |= {f"{x}_top_1_test_accuracy": 0.7 for x in ("sae", "llm")}
    head, row = evaluate.table({"topk": metrics}).splitlines()
    names = ["probe", "residual's", "top-1 probe", "residual's top-1"]
    assert re.split("  +", head.strip()) == names
    assert row.split() == ["topk", "0.8875", "0.9030", "0.7000", "0.7000"]


def test_text_of_which_nothing_counts_is_said(tiny_run, lm):
    tokens = np.zeros((2, LENGTH), np.int32)
    with pytest.raises(UserError, match="nothing to predict"):
        measured(tiny_run, lm, tokens)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("evaluate", {}),
        ("evaluate", {"evals": "sparse_probing"}),
        ("features", {}),
        ("maximise", {"latents": 0}),
        ("convert", {"to": "openai"}),
        ("dashboard", {}),
    ],
)
def test_parameters_that_are_not_finite_are_named_by_every_command(
    tiny_run, tmp_path, capsys, command, flags
):
    if "evals" in flags:
        lines = [json.dumps({"text": f"a {i}", "label": i % 2}) for i in range(40)]
        (tmp_path / "two.jsonl").write_text("\n".join(lines))
        flags = flags | {"labelled": tmp_path / "two.jsonl"}
    folder = copied(tiny_run, tmp_path / "run")
    shutil.rmtree(folder / "evals", ignore_errors=True)
    path = folder / runs.PARAMETERS
    arrays = load_file(path)
    arrays["b_dec"][3] = np.nan
    save_file(arrays, path)
    if command == "convert":
        flags = flags | {"input": folder, "out": tmp_path / "out"}
    else:
        flags = flags | {"run": folder}
    assert call(command, **flags) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert str(path) in line and "b_dec" in line and "NaN" in line
    assert not (folder / "evals").exists()
