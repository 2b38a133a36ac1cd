"""`python -m vsae_jax.convert`, `vsae_jax.load`, and evaluation of any format."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from autoencoders import assert_same, make, write
from safetensors.numpy import load_file, save_file
from tiny_runs import D_MODEL, TRAINING, call, copied, write_run

import vsae_jax
from vsae_jax import evaluate, interop, runs
from vsae_jax.autoencoder import sae
from vsae_jax.config import EvalConfig
from vsae_jax.interop import check
from vsae_jax.system.errors import UserError

FOREIGN = [name for name in interop.FORMATS if name != "vsae_jax"]
NOTE = "vsae_jax_export.json"


def converted(folder: Path, to: str, out: Path, **flags: object) -> Path:
    assert call("convert", input=folder, to=to, out=out, **flags) == 0
    return out


def said_by(capfd, **flags: object) -> str:
    assert call("convert", **flags) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not Path(str(flags["out"])).exists()
    return said


@pytest.mark.parametrize("to", FOREIGN)
def test_a_run_there_and_back(tiny_run, tmp_path, to, capfd):
    there = converted(tiny_run, to, tmp_path / "there")
    said = capfd.readouterr().out
    assert f"vsae_jax relu_topk, k 4, 16 -> 32 -> {to}" in said
    assert "self-check on 1,024 rows (rows): L0 4.0 of k 4" in said
    note = json.loads((there / NOTE).read_text())
    found, variance = note["self_check"], note["self_check"]["explained_variance"]
    assert found["rows"] == 1024 and found["max_abs_difference"] < 1e-5
    assert note["source"]["step"] == TRAINING["steps"] and note["k"] == 4
    back = converted(there, "vsae_jax", tmp_path / "back")
    run, again = runs.open_run(tiny_run), runs.open_run(back)
    assert again.train == run.train and again.data == run.data
    x = np.random.default_rng(0).normal(size=(64, D_MODEL)).astype("f4")
    x_hats = [
        sae.decode(r.variables, sae.encode(r.variables, x, config=r.sae), config=r.sae)
        for r in (run, again)
    ]
    np.testing.assert_allclose(x_hats[0], x_hats[1], rtol=1e-4, atol=1e-4)
    card = (there / "README.md").read_text()
    assert f"explained variance on 1024 rows (rows) | {variance:.4g} |" in card
    assert to in card and "b_dec subtracted from the input | yes" in card


def test_vsae_jax_to_vsae_jax_is_the_same_run(tiny_run, tmp_path):
    out = converted(tiny_run, "vsae_jax", tmp_path / "out")
    assert_same(interop.read(tiny_run), interop.read(out))
    name = runs.PARAMETERS
    assert (out / name).read_bytes() == (tiny_run / name).read_bytes()


def test_the_language_model_has_a_public_name(tiny_run, tmp_path):
    def named(name, **flags):
        out = tmp_path / name
        assert call("convert", input=run, to="saelens", out=out, **flags) == 0
        theirs = json.loads((out / "cfg.json").read_text())["metadata"]
        return theirs["model_name"], (out / "README.md").read_text()

    run = copied(tiny_run, tmp_path / "run")
    config = json.loads((run / runs.CONFIG).read_text())
    model = Path(shutil.copytree(config["data"]["model"], tmp_path / "secret" / "hf"))
    config["data"]["model"] = str(model)
    (run / runs.CONFIG).write_text(json.dumps(config))
    name, card = named("plain")
    assert name == "hf" and "secret" not in card
    name, card = named("named", model_name="me/mine")
    assert name == "me/mine" and 'base_model: "me/mine"' in card
    said = json.loads((model / "config.json").read_text())
    said["_name_or_path"] = "EleutherAI/pythia-70m"
    (model / "config.json").write_text(json.dumps(said))
    name, card = named("origin")
    assert name == "EleutherAI/pythia-70m" and "language model | EleutherAI" in card


def test_the_metrics_of_an_evaluated_run_are_in_its_card(tiny_run, tmp_path):
    run = copied(tiny_run, tmp_path / "run")
    (run / "evals").mkdir(exist_ok=True)
    metrics = {"ce_loss_score": 0.98765, "l0": 4.0}
    (run / "evals" / "core.json").write_text(json.dumps({"metrics": metrics}))
    card = (converted(run, "saelens", tmp_path / "o") / "README.md").read_text()
    assert "| loss recovered | 0.9877 |" in card and "| L0 | 4 |" in card


def test_a_kept_negative_value_is_refused(tiny_rows, tmp_path, capfd):
    rng = np.random.default_rng(0)
    arrays = {"w_enc": rng.normal(size=(16, 32)), "w_dec": rng.normal(size=(32, 16))}
    arrays["b_enc"] = np.full(32, -100.0)
    folder = write_run(tmp_path / "run", tiny_rows, arrays, variant="vsae_topk")
    out = tmp_path / "out"
    said = said_by(capfd, input=folder, to="saelens", out=out)
    assert "saelens has no topk, and relu_topk would drop the negative latents" in said
    assert "1024 of 1024 rows keep; write it with --to=openai" in said
    assert "--lossy=true" in said
    back = converted(converted(folder, "openai", out), "vsae_jax", tmp_path / "back")
    assert runs.open_run(back).sae.relu is False


@pytest.mark.parametrize("rule, to", [("topk", "saelens"), ("abstopk", "sparsify")])
def test_a_lossy_export_says_what_it_costs(tmp_path, rule, to, capfd):
    made = make(rule=rule, d_sae=7)
    shifted = made.params | {"b_enc": made.params["b_enc"] - 3}
    ae = dataclasses.replace(made, params=shifted)
    folder, out = write(ae, "vsae_jax", tmp_path / "in"), tmp_path / "out"
    converted(folder, to, out, lossy=True)
    x = check.generated_rows(ae, count=1024)
    p = {n: np.float64(a) for n, a in ae.params.items()}
    z = (x - p["b_dec"]) @ p["w_enc"] + p["b_enc"]
    order, positive = np.abs(z) if rule == "abstopk" else z, np.maximum(z, 0)
    kept = np.where(order >= np.sort(order)[:, -3, None], z, 0) @ p["w_dec"]
    left = np.where(positive >= np.sort(positive)[:, -3, None], positive, 0)
    x_hats = [kept + p["b_dec"], left @ p["w_dec"] + p["b_dec"]]
    share = (
        np.abs(x_hats[0] - x_hats[1]).max(1) > 1e-4 * np.abs(x_hats[0]).max()
    ).mean()
    total = np.square(x - x.mean(axis=0)).sum()
    before, after = (1 - np.square(x - x_hat).sum() / total for x_hat in x_hats)
    assert 0 < share <= 1
    note = (
        f"lossy: {to} has relu_topk for {rule} and drops negative latents; x_hat of "
        f"{100 * share:.1f} % of 1024 rows (generated) changes, explained variance "
        f"{before:.4f} before, {after:.4f} after"
    )
    assert json.loads((out / NOTE).read_text())["carried"] == [note]
    assert note in capfd.readouterr().out and note in (out / "README.md").read_text()
    loaded = vsae_jax.load(out)
    np.testing.assert_allclose(loaded.encode(x), left, rtol=1e-4, atol=1e-4)


def test_lossy_changes_nothing_where_nothing_is_lost(tiny_run, tmp_path):
    out = converted(tiny_run, "saelens", tmp_path / "out", lossy=True)
    assert json.loads((out / NOTE).read_text())["carried"] == []


def test_abstopk_goes_to_saelens_only(tmp_path, capfd):
    folder = write(make(rule="abstopk"), "vsae_jax", tmp_path / "in")
    said = said_by(capfd, input=folder, to="sparsify", out=tmp_path / "o")
    assert "sparsify has no abstopk" in said and "--to=saelens" in said
    out = converted(folder, "saelens", tmp_path / "o")
    assert json.loads((out / "cfg.json").read_text())["architecture"] == "abstopk"


@pytest.mark.parametrize("to", ["dictionary_learning", "sparsify"])
def test_layer_norm_is_refused_where_it_cannot_be_said(tmp_path, capfd, to):
    folder = write(make(layer_norm=True), "openai", tmp_path / "in")
    said = said_by(capfd, input=folder, to=to, out=tmp_path / "o")
    assert f"{to} cannot hold the per-row LayerNorm" in said
    out = converted(folder, "saelens", tmp_path / "o")
    config = json.loads((out / "cfg.json").read_text())
    assert config["normalize_activations"] == "layer_norm"


def test_swapped_weights_of_a_square_autoencoder_do_not_pass(tmp_path, capfd):
    """Shapes cannot tell; the note's checksum does."""
    folder = write(make(d_model=8, d_sae=8), "saelens", tmp_path / "in")
    path = folder / "sae_weights.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"W_enc": arrays["W_enc"].T.copy()}, path)
    said = said_by(capfd, input=folder, to="vsae_jax", out=tmp_path / "o")
    assert "does not belong to sae_weights.safetensors" in said


def test_a_self_check_that_fails_writes_nothing(tmp_path, capfd, monkeypatch):
    folder = write(make(), "vsae_jax", tmp_path / "in")
    module = interop.FORMATS["saelens"]
    other = make(seed=5)
    monkeypatch.setattr(module, "read", lambda _: other)
    said = said_by(capfd, input=folder, to="saelens", out=tmp_path / "o")
    assert "self-check: x_hat differs by up to" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_flags_that_are_refused(tiny_run, tiny_rows, tmp_path, capfd):
    out = tmp_path / "o"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert call("convert", input=tiny_run, to="openai", out=tmp_path / "full") == 2
    assert "full exists already; name a new folder" in capfd.readouterr().err
    assert call("convert", to="openai") == 2
    assert "--input and --out must be set" in capfd.readouterr().err
    wide = write(make(d_model=5), "saelens", tmp_path / "wide")
    said = said_by(capfd, input=wide, to="openai", out=out, activations=tiny_rows)
    assert "has d_model=16, the autoencoder 5" in said
    assert call("convert", input=tiny_run, to="pickle", out=out) == 2
    assert "'pickle' is not saelens|dictionary_learning" in capfd.readouterr().err


@pytest.mark.parametrize("to", interop.FORMATS)
def test_load_encodes_as_the_run_does(tiny_run, tmp_path, to):
    loaded = vsae_jax.load(converted(tiny_run, to, tmp_path / "out"))
    run = runs.open_run(tiny_run)
    x = np.random.default_rng(0).normal(size=(64, D_MODEL)).astype("f4")
    f = sae.encode(run.variables, x, config=run.sae)
    times = json.loads((tmp_path / "out" / NOTE).read_text())["latent_scale"]
    np.testing.assert_allclose(loaded.encode(x), f * times, rtol=1e-3, atol=1e-4)
    x_hat = sae.decode(run.variables, f, config=run.sae)
    np.testing.assert_allclose(loaded.decode(loaded.encode(x)), x_hat, atol=1e-4)
    np.testing.assert_array_equal(loaded(x), loaded.decode(loaded.encode(x)))
    assert loaded.config.k == 4 and loaded.data["layer"] == 0
    assert loaded.params["w_enc"].shape == (16, 32)


def test_load_normalises_rows_as_openai_does(tmp_path):
    loaded = vsae_jax.load(write(make(layer_norm=True), "openai", tmp_path / "o"))
    p = {n: np.float64(a) for n, a in loaded.params.items()}
    x = np.random.default_rng(0).normal(size=(9, 6)) * 5 + 2
    mean = x.mean(axis=1, keepdims=True)
    std = x.std(axis=1, keepdims=True, ddof=1)
    z = ((x - mean) / (std + 1e-5) - p["b_dec"]) @ p["w_enc"] + p["b_enc"]
    f = np.where(z >= np.sort(z)[:, -3, None], np.maximum(z, 0), 0)
    x_hat = (f @ p["w_dec"] + p["b_dec"]) * std + mean
    rows = x.astype("f4")
    np.testing.assert_allclose(loaded.encode(rows), f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loaded(rows), x_hat, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"decode\(f, rows=x\) needs x"):
        loaded.decode(loaded.encode(rows))


def test_load_is_jittable(tiny_run):
    loaded = vsae_jax.load(tiny_run)
    x = np.ones((3, D_MODEL), "f4")
    np.testing.assert_allclose(jax.jit(loaded)(x), loaded(x), rtol=1e-6)


@pytest.fixture
def core_of_run(tiny_run, tmp_path) -> dict:
    run = copied(tiny_run, tmp_path / "run")
    return evaluate.run(EvalConfig(run=str(run)))["run"]


@pytest.mark.parametrize("to", interop.FORMATS)
def test_every_format_is_evaluated_as_its_run(tiny_run, tmp_path, to, core_of_run):
    out = converted(tiny_run, to, tmp_path / "out")
    core = evaluate.run(EvalConfig(run=str(out)))["out"]
    assert core.keys() == core_of_run.keys()
    for name, value in core_of_run.items():
        if name != "l1":  # in the units of the latents
            assert core[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_what_is_not_known_is_asked_for(
    tiny_run, tiny_model, tiny_rows, tmp_path, core_of_run, capfd
):
    """The same autoencoder without the note that knows its run."""
    out = converted(tiny_run, "openai", tmp_path / "out")
    weights = out / "autoencoder.pt"
    (out / NOTE).unlink()
    note = {"run": str(out), "activations": str(tiny_rows)}
    for flags, said in [
        ({}, "does not say its layer; name it with --layer"),
        ({"layer": 0}, "names no language model; name it with --model"),
    ]:
        with pytest.raises(UserError, match=said):
            evaluate.run(EvalConfig(**note, **flags))
    known = {"layer": 0, "model": str(tiny_model)}
    with pytest.raises(
        UserError, match="names no folder of activations; name activations"
    ):
        evaluate.run(EvalConfig(run=str(out), **known))
    core = evaluate.run(EvalConfig(**note, **known))["out"]
    assert weights.is_file() and core["l0"] == pytest.approx(4)
    # Without the note, OpenAI's TopK normalises every row: another autoencoder.
    assert core["explained_variance"] != core_of_run["explained_variance"]


def test_the_layer_comes_from_saelens(tiny_run, tiny_model, tiny_rows, tmp_path):
    out = converted(tiny_run, "saelens", tmp_path / "out")
    (out / NOTE).unlink()
    flags = {"run": str(out), "model": str(tiny_model), "activations": str(tiny_rows)}
    core = json.loads(
        (evaluate.run(EvalConfig(**flags)) and out / "evals" / "core.json").read_text()
    )
    assert core["config"]["layer"] == 0 and core["config"]["preset"] is None
    with pytest.raises(UserError, match="--layer=1, but .* is of layer 0"):
        evaluate.run(EvalConfig(**flags, layer=1))
