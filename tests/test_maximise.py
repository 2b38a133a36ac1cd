"""The synthetic maximiser: it finds planted tokens, and reports what they really do."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import D_MODEL, D_SAE, LENGTH, call, copied, write_run

from vsae_jax import lm
from vsae_jax.autoencoder import sae
from vsae_jax.interop.loading import open_any

FAST = {"length": 3, "steps": 200, "restarts": 16, "num_tokens": 400}
# Latent i fires on the tokens PLANTED[i], which are in the corpus; latent 2 on BOS,
# which is no text.
PLANTED = ([260, 273, 289], [69, 308], [0])


@pytest.fixture(scope="module")
def planted_model(tiny_model, tmp_path_factory):
    """The tiny model with a direction of its own for each planted set."""
    folder = copied(tiny_model, tmp_path_factory.mktemp("planted") / "model")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["gpt_neox.embed_in.weight"]
    for direction, ids in enumerate(PLANTED):
        embedding[:, direction] = 0
        embedding[ids, direction] = 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def planted(tiny_rows, tmp_path_factory):
    """Latent i reads direction i, above 4 alone; latent 3 too, but always below 0."""
    w_enc, b_enc = np.zeros((D_MODEL, D_SAE)), np.full(D_SAE, -4.0)
    w_enc[range(3), range(3)] = 1
    w_enc[0, 3], b_enc[3] = 0.1, -50
    arrays = {"w_enc": w_enc, "b_enc": b_enc, "w_dec": w_enc.T}
    folder = tmp_path_factory.mktemp("planted") / "run"
    return write_run(folder, tiny_rows, arrays, variant="topk", k=2)


@pytest.fixture(scope="module")
def found(planted, planted_model):
    """The files of latents 0 to 3."""
    flags = {"run": planted, "model": planted_model, "latents": "0,1,2,3"}
    flags |= {"model_differs": True}
    assert call("maximise", **flags, **FAST) == 0
    return [
        json.loads((planted / "maximised" / f"{i}.json").read_text()) for i in range(4)
    ]


@pytest.mark.parametrize("latent", [0, 1])
def test_it_finds_the_planted_tokens(found, latent):
    synthetic = found[latent]["synthetic"]
    assert synthetic["token_ids"][-1] in PLANTED[latent]
    assert synthetic["activations"][-1] > 0


def test_the_context_climbs_too(found, planted, planted_model):
    """Better than any of many random contexts before the planted tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, (400, 4))
    tokens[:, 0], tokens[:, -1] = 0, rng.choice(PLANTED[0], 400)
    random = _fresh(planted, planted_model, tokens)[:, -1, 0]
    assert max(found[0]["synthetic"]["activations"]) > random.max()


def test_activations_are_those_of_a_fresh_pass_over_the_tokens(
    found, planted, planted_model
):
    for latent in (0, 1):
        synthetic = found[latent]["synthetic"]
        tokens = np.array([synthetic["token_ids"]])
        fresh = _fresh(planted, planted_model, tokens)[0, :, latent]
        fresh[0] = 0  # BOS has no row
        np.testing.assert_allclose(synthetic["activations"], fresh, atol=1e-5)
        assert synthetic["pre_activation"] == pytest.approx(fresh.max(), abs=1e-5)
        assert fresh.max() > 0
        assert max(synthetic["restarts"]) == max(synthetic["activations"])


def test_the_real_sequence_is_the_best_of_the_held_out_text(
    found, planted, planted_model
):
    run = open_any(planted)
    start, _ = run.data["held_out_contexts"]
    tokens = np.load(f"{run.train.activations}/tokens-00002.npy")[start - 64 :]
    tokens = tokens[: 400 // LENGTH]
    fresh = _fresh(planted, planted_model, tokens)
    fresh[:, 0] = 0
    fresh[tokens == 0] = 0
    for latent in (0, 1):
        real = found[latent]["real"]
        best = fresh[..., latent].max()
        assert best > 0
        assert real["activations"][real["peak"]] == pytest.approx(best, abs=1e-5)
        where = real["context"], real["position"]
        assert fresh[where][latent] == pytest.approx(best, abs=1e-5)
        assert tokens[where] == real["token_ids"][-1]
        assert len(real["tokens"]) == len(real["activations"]) <= FAST["length"]


def test_special_tokens_are_not_text(found):
    assert 0 not in found[2]["synthetic"]["token_ids"][1:]


def test_a_latent_that_is_never_selected_says_so(found):
    """Its gradient is that of the pre-activation, which has one where f has none."""
    synthetic = found[3]["synthetic"]
    assert synthetic["activations"] == [0, 0, 0, 0]
    assert -50 < synthetic["pre_activation"] < -45
    assert synthetic["token_ids"][-1] in PLANTED[0]


def test_bos_stays_and_has_no_activation(found):
    for file in found:
        assert file["synthetic"]["token_ids"][0] == 0
        assert file["synthetic"]["tokens"][0] == "<|endoftext|>"
        assert file["synthetic"]["activations"][0] == 0


def test_the_seed_decides(planted, planted_model, found):
    flags = {"run": planted, "model": planted_model, "latents": "0", **FAST}
    flags |= {"model_differs": True}
    assert call("maximise", **flags) == 0
    path = planted / "maximised" / "0.json"
    assert json.loads(path.read_text())["synthetic"] == found[0]["synthetic"]
    assert call("maximise", seed=1, **flags) == 0
    again = json.loads(path.read_text())["synthetic"]
    assert again["restarts"] != found[0]["synthetic"]["restarts"]


def test_contexts_without_bos_have_none(extracted, planted, tmp_path):
    rows = extracted(bos="none")
    arrays = {
        n: np.asarray(a) for n, a in open_any(planted).variables["params"].items()
    }
    run = write_run(tmp_path / "run", rows, arrays, variant="topk", k=2)
    assert call("maximise", run=run, latents=0, **FAST) == 0
    found = json.loads((run / "maximised" / "0.json").read_text())
    assert len(found["synthetic"]["token_ids"]) == FAST["length"]
    assert 0 not in found["synthetic"]["token_ids"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"latents": "32"}, "--latents=32 must be from 0 to 31"),
        ({"latents": "0,x"}, "--latents=0,x is not a comma list"),
        ({"latents": ""}, "--latents is not set"),
        ({"run": ""}, "--run is not set"),
        ({"cold": 0}, "--cold=0.0 must be above 0"),
        ({"run": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_one_line(planted, flags, said, capfd):
    assert call("maximise", **{"run": planted, "latents": "0"} | flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line


def test_only_models_with_gradients(planted, tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert call("maximise", run=planted, latents="0", model=tmp_path) == 2
    assert "--backend=jax does not run mamba" in capfd.readouterr().err


def _fresh(run_folder, model_folder, tokens: np.ndarray) -> np.ndarray:
    """f `[contexts, time, d_sae]` of tokens."""
    run = open_any(run_folder)
    model = lm.load_language_model(str(model_folder), backend="jax")
    x = np.asarray(model.residual(tokens, run.data["layer"]))
    f = sae.encode(run.variables, x.reshape(-1, D_MODEL), config=run.sae)
    return np.array(f).reshape(*tokens.shape, -1)
