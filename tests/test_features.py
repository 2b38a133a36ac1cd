"""The command: planted latents are found, in every table and in Neuronpedia's files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from planted import rows_of, write_planted
from safetensors.numpy import load_file
from tiny_runs import D_MODEL, LENGTH, call, copied

from vsae_jax import lm, runs
from vsae_jax.activations.shards import Activations
from vsae_jax.config import EvalConfig
from vsae_jax.latents.feature_tables import open_source
from vsae_jax.latents.logit_effects import effects
from vsae_jax.latents.loss_effect import of_contexts
from vsae_jax.lm.token_text import token_texts


def read(run):
    with np.load(run / "features" / "features.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    return arrays, json.loads((run / "features" / "features.json").read_text())


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_rows):
    run = write_planted(tmp_path_factory.mktemp("planted") / "p", tiny_rows)
    flags = {"window": 3, "quantiles": 4, "top": 6}
    assert call("features", "--neuronpedia", "--loss_effect", run=run, **flags) == 0
    return run


@pytest.fixture(scope="module")
def held_out(planted):
    """Tokens of the held-out contexts, the first one's number, and what counts."""
    activations = Activations.open(planted.parent / "rows")
    start, stop = json.loads((planted / "config.json").read_text())["data"][
        "held_out_contexts"
    ]
    tokens = activations.tokens(start, stop)
    counts = ~np.isin(tokens, activations.manifest.special_ids)
    counts[:, 0] = False
    return tokens, start, counts


def test_every_latent_fires_on_its_own_tokens(planted, held_out):
    arrays, info = read(planted)
    tokens, start, counts = held_out
    assert arrays["n_tokens"] == counts.sum() == info["n_tokens"]
    values = rows_of(tokens)
    for i in range(D_MODEL):
        mine = counts & (tokens % D_MODEL == i)
        assert arrays["n_fired"][i] == mine.sum()
        expected = values[..., i][mine]
        assert arrays["max_activation"][i] == pytest.approx(expected.max(initial=0))
        np.testing.assert_allclose(
            arrays["mean_activation"][i], expected.sum() / counts.sum()
        )
        shown = arrays["top_ids"][i, :, 3]
        assert (shown[shown >= 0] % D_MODEL == i).all()
        contexts = arrays["top_context"][i]
        assert len(set(contexts[contexts >= 0])) == min(6, mine.any(1).sum())
    dead = arrays["n_fired"][D_MODEL:]
    assert not dead.any() and (arrays["top_context"][D_MODEL:] == -1).all()
    np.testing.assert_allclose(arrays["decoder_norm"], 1 / scale_of(planted), rtol=1e-6)


def scale_of(run):
    return float(load_file(run / "sae.safetensors")["scale"])


def test_windows_hold_the_tokens_and_the_activations_around(planted, held_out):
    arrays, _ = read(planted)
    tokens, start, counts = held_out
    values = rows_of(tokens)
    for kind in ("top", "quantile"):
        there = np.argwhere(arrays[f"{kind}_context"] >= 0)
        assert len(there)
        for at in map(tuple, there):
            context = arrays[f"{kind}_context"][at] - start
            for n in range(7):
                near = arrays[f"{kind}_position"][at] + n - 3
                shown = arrays[f"{kind}_ids"][at][n], arrays[f"{kind}_values"][at][n]
                inside = 0 <= near < LENGTH
                assert shown[0] == (tokens[context, near] if inside else -1)
                if inside and counts[context, near]:
                    assert shown[1] == pytest.approx(values[context, near, at[0]])
                else:
                    assert np.isnan(shown[1])


def test_logit_effects_are_the_final_norm_and_the_unembedding(planted, tiny_model):
    arrays, _ = read(planted)
    weights = load_file(tiny_model / "model.safetensors")
    unembed = weights["embed_out.weight"].astype(float)
    scale = weights["gpt_neox.final_layer_norm.weight"].astype(float)
    d = np.eye(D_MODEL)
    d = d - d.mean(1, keepdims=True)
    expected = (d / d.std(1, keepdims=True) * scale) @ unembed.T
    expected -= expected.mean(1, keepdims=True)
    for i in range(D_MODEL):
        best = np.argsort(-expected[i])[:10]
        assert arrays["top_logit_tokens"][i].tolist() == best.tolist()
        np.testing.assert_allclose(
            arrays["top_logits"][i], expected[i][best], rtol=2e-3
        )
        worst = np.argsort(expected[i])[:10]
        assert arrays["bottom_logit_tokens"][i].tolist() == worst.tolist()
        edges = np.linspace(*arrays["logit_range"][i], 51)
        counts = np.histogram(expected[i], edges)[0]
        assert arrays["logit_histogram"][i].sum() == expected.shape[1]
        assert np.abs(counts - arrays["logit_histogram"][i]).sum() <= 4
    # The other half of the decoder is the negative of the first.
    np.testing.assert_allclose(
        arrays["top_logits"][D_MODEL:], -arrays["bottom_logits"][:D_MODEL], rtol=1e-4
    )


def test_a_latent_planted_on_an_output_direction_promotes_that_token(tiny_model):
    model = lm.load_language_model(str(tiny_model))
    weights = load_file(tiny_model / "model.safetensors")
    unembed = weights["embed_out.weight"].astype(float)
    scale = weights["gpt_neox.final_layer_norm.weight"]
    # The direction whose effect on the token 7 is the largest for its length.
    direction = ((unembed[7] - unembed.mean(0)) * scale)[None, :]
    assert effects(model, direction)[0].argmax() == 7


def test_neighbours_are_the_nearest_decoder_rows(planted):
    arrays, _ = read(planted)
    assert (arrays["neighbour_cosine"] <= 1e-6).all()
    # A row's negative is further than all others, which are orthogonal to it.
    opposite = (np.arange(32) + D_MODEL) % 32
    assert not (arrays["neighbour_latents"] == opposite[:, None]).any()


def test_the_loss_effect_is_that_of_the_model_without_the_latent(planted, tiny_model):
    import jax.numpy as jnp

    source = open_source(planted, EvalConfig(run=str(planted)))
    arrays, _ = read(planted)
    i = int(np.argmax(arrays["n_fired"]))
    context, position = arrays["top_context"][i, 0], arrays["top_position"][i, 0]
    tokens = source.activations.tokens(context, context + 1)
    delta = np.zeros((1, LENGTH, D_MODEL), np.float32)
    delta[0, :, i] = rows_of(tokens)[0, :, i]
    delta[0, 0] = 0
    layer = source.run.data["layer"]
    clean, without = (
        np.asarray(source.lm.loss(tokens, layer=layer, splices=[splice])[0][0])
        for splice in (lambda r: r, lambda r: r - jnp.asarray(delta))
    )
    effect = of_contexts(source, np.array([i]), np.array([context]))[0]
    np.testing.assert_allclose(effect[1:], without - clean, atol=1e-5)
    assert np.isnan(effect[0]) and np.abs(effect[1:]).max() > 1e-3
    # Before the latent first fires nothing changes.
    first = np.flatnonzero(delta[0, :, i])[0]
    np.testing.assert_allclose(effect[1 : first + 1], 0, atol=1e-6)
    shown = arrays["top_loss_effect"][i, 0, 3]
    assert shown == pytest.approx(effect[position], abs=1e-5)


def test_neuronpedia_learns_no_local_path(planted, tmp_path):
    for flags, expected in (({}, None), ({"model_name": "me/mine"}, "me/mine")):
        run = copied(planted, tmp_path / (expected or "plain").replace("/", "-"))
        assert call("features", run=run, neuronpedia=True, **flags) == 0
        info = runs.read_json(run / "features" / "features.json")
        batch = runs.read_json(run / "features" / "neuronpedia" / "batch-0.json")
        expected = expected or Path(info["model"]).name
        assert batch["model_id"] == info["model_name"] == expected
        assert str(Path(info["model"]).parent) not in batch["model_id"]


def test_neuronpedias_files_say_the_same(planted):
    arrays, info = read(planted)
    files = sorted((planted / "features" / "neuronpedia").glob("batch-*.json"))
    found = [f for file in files for f in json.loads(file.read_text())["features"]]
    alive = np.flatnonzero(arrays["n_fired"])
    assert [f["feature_index"] for f in found] == alive.tolist()
    one, i = found[0], int(alive[0])
    assert one["frac_nonzero"] == arrays["firing_rate"][i]
    assert sum(one["freq_hist_data_bar_heights"]) == arrays["n_fired"][i]
    bars = np.array(one["freq_hist_data_bar_values"])
    mean = np.average(bars, weights=one["freq_hist_data_bar_heights"])
    assert mean == pytest.approx(arrays["mean_when_active"][i], rel=0.02)
    assert len(one["pos_str"]) == len(one["neg_values"]) == 10
    assert sum(one["logits_hist_data_bar_heights"]) == 320
    peaks = [max(a["values"]) for a in one["activations"][:6]]
    assert peaks[0] == pytest.approx(arrays["max_activation"][i], rel=1e-4)
    assert all(len(a["tokens"]) == len(a["values"]) for a in one["activations"])
    expected_text = [info["tokens"][str(t)] for t in arrays["top_ids"][i, 0] if t >= 0]
    assert one["activations"][0]["tokens"] == expected_text


def test_a_trained_topk_agrees_with_its_evaluation(tiny_run, tmp_path):
    run = copied(tiny_run, tmp_path / "run")
    assert call("features", run=run) == 0
    assert call("evaluate", run=run) == 0
    arrays, _ = read(run)
    metrics = json.loads((run / "evals" / "core.json").read_text())["metrics"]
    alive = (arrays["n_fired"] > 0).mean()
    assert alive == pytest.approx(metrics["frac_alive"], abs=1 / 32)
    assert arrays["firing_rate"].sum() == pytest.approx(metrics["l0"], rel=1e-3)
    before = (run / "features" / "features.npz").read_bytes()
    assert call("features", run=run) == 0
    assert read(run)[0].keys() == arrays.keys()
    for name, array in read(run)[0].items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert len((run / "features" / "features.npz").read_bytes()) == len(before)


def test_a_converted_autoencoder_is_looked_at_too(
    tiny_run, tiny_rows, tiny_model, tmp_path
):
    out = tmp_path / "saelens"
    assert call("convert", input=tiny_run, to="saelens", out=out) == 0
    assert call("features", run=out, activations=tiny_rows, model=tiny_model) == 0
    assert read(out)[1]["contexts"][0] == 64 or read(out)[1]["contexts"][0] == 0


def test_tokens_that_are_no_text_show_their_bytes(tiny_model):
    tokenizer = lm.load_tokenizer(str(tiny_model))
    ids = tokenizer("a \u00e9 \u202e\n")["input_ids"]
    texts = token_texts(tokenizer, [0, *ids])
    assert texts[0] == "<|endoftext|>"
    joined = "".join(texts[i] for i in ids)
    assert joined.startswith("a") and "\n" in joined and "\\xe2" in joined


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--run is not set"),
        ({"run": "nowhere"}, "is not a folder"),
        ({"run": ".", "quantiles": 101}, "--quantiles=101 must not exceed 100"),
        ({"run": ".", "window": 0}, "--window=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(flags, said, capsys):
    assert call("features", **flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_activations_of_another_layer_are_refused(tiny_run, extracted, capsys):
    other = extracted(layer=1)
    assert call("features", run=tiny_run, activations=other) == 2
    assert "has layer=1 but" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["features", "dashboard"])
def test_help_is_printed(module):
    done = subprocess.run(
        [sys.executable, "-m", f"vsae_jax.{module}", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--run=TEXT" in done.stdout
