"""Autoencoders of what attention and MLPs add: each command goes where the rows came
from."""

import json

import numpy as np
import pytest
from test_core import assert_close, autoencoder, evaluated, log_softmax
from tiny_runs import D_MODEL, D_SAE, call, copied, write_run

from vsae_jax import lm as language_models
from vsae_jax import load, runs
from vsae_jax.activations.shards import Activations
from vsae_jax.config import EvalConfig, Hook
from vsae_jax.evals.encoding import residuals_at
from vsae_jax.latents.feature_tables import open_source
from vsae_jax.latents.loss_effect import of_contexts
from vsae_jax.runs.opening import subject_of

SITES = ["mlp_out", "attn_out"]


@pytest.fixture(scope="module")
def serial_model(tiny_model, tmp_path_factory):
    """The tiny model with serial blocks."""
    folder = copied(tiny_model, tmp_path_factory.mktemp("serial") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["use_parallel_residual"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def lm(serial_model):
    return language_models.load_language_model(str(serial_model))


@pytest.fixture(scope="module")
def runs_of(extracted, serial_model, tmp_path_factory):
    """A run of random parameters for each site, by name."""
    rows = extracted(model=serial_model, site=",".join(SITES))
    rng = np.random.default_rng(0)
    w = rng.normal(size=(D_MODEL, D_SAE)) / 4
    arrays = {"w_enc": w, "w_dec": w.T}
    folder = tmp_path_factory.mktemp("sites")
    return {
        site: write_run(
            folder / site, rows / Hook(0, site).name, arrays, variant="topk", k=8
        )
        for site in SITES
    }


@pytest.fixture(params=SITES)
def hook(request) -> Hook:
    return Hook(0, request.param)


@pytest.fixture
def run(runs_of, hook, tmp_path):
    return copied(runs_of[hook.site], tmp_path / "run")


def held_out(run) -> np.ndarray:
    opened = runs.open_run(run)
    start, stop = opened.data["held_out_contexts"]
    return Activations.open(opened.train.activations).tokens(start, stop)


def core_by_the_book(run, lm, hook) -> dict[str, float]:
    """What the model loses, by splices at the hook."""
    tokens = held_out(run)
    x = np.asarray(lm.at(tokens, [hook])[0], np.float64)
    f, x_hat = autoencoder(run, x)
    keep = ~np.isin(tokens, [0])
    keep[:, :1] = False
    spliced = np.where(keep[..., None], x_hat, x).astype(np.float32)
    splices = [lambda x: x, lambda _: spliced, lambda x: 0 * x]
    logits = lm.logits(tokens, layer=0, site=hook.site, splices=splices)
    log_p = [log_softmax(a) for a in logits]
    targets = np.where(keep[:, :-1], tokens[:, 1:], -1)
    rows, time = np.nonzero(targets >= 0)
    ce = [-p[rows, time, targets[rows, time]].mean() for p in log_p]
    kl = [(np.exp(log_p[0]) * (log_p[0] - p)).sum(-1)[keep].mean() for p in log_p]
    error, centred = (x - x_hat)[keep], x[keep] - x[keep].mean(0)
    return {
        "ce_loss_without_sae": ce[0],
        "ce_loss_with_sae": ce[1],
        "ce_loss_with_ablation": ce[2],
        "kl_div_with_sae": kl[1],
        "kl_div_with_ablation": kl[2],
        "explained_variance": 1 - np.sum(error**2) / np.sum(centred**2),
        "l0": (f != 0).sum(-1)[keep].mean(),
    }


def test_core_splices_there(run, lm, hook):
    result = evaluated(run, saebench_json=True)
    assert result["config"]["hook_name"] == hook.name
    expected = core_by_the_book(run, lm, hook)
    assert_close(result["metrics"], expected)
    # So that the comparison would notice another place.
    other = core_by_the_book(run, lm, Hook(0))
    assert abs(other["ce_loss_with_sae"] - expected["ce_loss_with_sae"]) > 1e-3
    (theirs,) = (run / "evals/saebench").iterdir()
    assert json.loads(theirs.read_text())["sae_cfg_dict"]["hook_name"] == hook.name


def test_core_through_transformers(run, hook):
    pytest.importorskip("torch")
    ours = evaluated(run)["metrics"]
    theirs = evaluated(run, backend="transformers")["metrics"]
    assert_close(theirs, {n: ours[n] for n in ours if n.startswith("ce_loss_with")})


def test_an_export_knows_its_hook(run, hook, tmp_path):
    out = tmp_path / "saelens"
    assert call("convert", input=run, to="saelens", out=out) == 0
    config = json.loads((out / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == hook.name
    (out / "vsae_jax_export.json").unlink()
    assert load(out).reader.hook == hook
    opened = runs.open_run(run)
    flags = {"model": opened.data["model"], "activations": opened.train.activations}
    there = evaluated(out, **flags)
    assert there["config"]["hook_name"] == hook.name


def test_dictionary_learning_names_the_site(run, hook, tmp_path):
    out = tmp_path / "theirs"
    assert call("convert", input=run, to="dictionary_learning", out=out) == 0
    (out / "vsae_jax_export.json").unlink()
    assert load(out).reader.hook == hook


def test_an_sae_without_a_site_takes_that_of_the_activations(run, hook, tmp_path):
    out = tmp_path / "openai"
    assert call("convert", input=run, to="openai", out=out) == 0
    (out / "vsae_jax_export.json").unlink()
    arrays = runs.open_run(run)
    flags = {"model": arrays.data["model"], "layer": 0}
    result = evaluated(out, activations=arrays.train.activations, **flags)
    assert result["config"]["hook_name"] == hook.name


def test_the_loss_effect_is_of_the_latent_there(run, lm, hook):
    source = open_source(run, EvalConfig(run=str(run)))
    tokens = source.activations.tokens(70, 71)
    (x,) = lm.at(tokens, [hook])
    reader = source.run.reader
    f = np.array(reader.encode(np.asarray(x)))[0]
    latent = int(np.argmax((f[1:] > 0).sum(0)))
    delta = np.outer(f[:, latent], reader.directions[latent])[None].astype(np.float32)
    delta[0, 0] = 0
    clean, without = (
        np.asarray(lm.loss(tokens, layer=0, site=hook.site, splices=[splice])[0][0])
        for splice in (lambda v: v, lambda v: v - delta)
    )
    effect = of_contexts(source, np.array([latent]), np.array([70]))[0]
    np.testing.assert_allclose(effect[1:], without - clean, atol=1e-5)
    assert np.abs(effect[1:]).max() > 1e-3


def test_rows_of_the_other_site_are_refused(runs_of, run, hook, capsys):
    (other,) = set(SITES) - {hook.site}
    rows = runs.open_run(runs_of[other]).train.activations
    assert call("features", run=run, activations=rows) == 2
    assert f"has site={other} but {run}" in capsys.readouterr().err


def test_texts_are_read_there(run, lm, hook):
    subject = subject_of(
        runs.open_run(run),
        EvalConfig(run=str(run)),
        language_models.load_language_model,
    )
    tokens = [held_out(run)[0][:9]]
    rows = residuals_at(subject, tokens, np.array([5]))
    (expected,) = lm.at(tokens[0][None], [hook])
    np.testing.assert_allclose(rows[0], expected[0, 5], atol=1e-5)


def test_maximise_climbs_there(runs_of, lm, tmp_path):
    run, hook = copied(runs_of["attn_out"], tmp_path / "run"), Hook(0, "attn_out")
    flags = {"latents": 0, "length": 3, "steps": 2, "restarts": 2, "num_tokens": 64}
    assert call("maximise", run=run, **flags) == 0
    found = json.loads((run / "maximised/0.json").read_text())["synthetic"]
    (x,) = lm.at(np.array([found["token_ids"]]), [hook])
    f = np.array(runs.open_run(run).encode(np.asarray(x)))[0, :, 0]
    f[0] = 0
    np.testing.assert_allclose(found["activations"], f, atol=1e-5)


def test_a_hook_that_is_none_of_ours_is_named(run, hook, capsys):
    out = run.with_name("elsewhere")
    assert call("convert", input=run, to="saelens", out=out) == 0
    (out / "vsae_jax_export.json").unlink()
    config = json.loads((out / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.attn.hook_z"
    (out / "cfg.json").write_text(json.dumps(config))
    assert call("evaluate", run=out, layer=0) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "reads blocks.0.attn.hook_z; only the residual stream" in error


def test_a_config_whose_layer_contradicts_its_hook(run, capsys):
    record = json.loads((run / "config.json").read_text())
    record["data"]["layer"] = 1
    (run / "config.json").write_text(json.dumps(record))
    assert call("evaluate", run=run) == 2
    assert "at hook_name or layer" in capsys.readouterr().err
