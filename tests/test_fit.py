"""Training from Python: what rows it takes, and that it is the command's training."""

import inspect
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import D_MODEL, D_SAE, TRAINING, call

import vsae_jax
from vsae_jax import runs
from vsae_jax.config import TrainConfig
from vsae_jax.system.errors import UserError

# 640 rows are asked for; held_out and steps are TRAINING's.
TOPK = {**TRAINING, "variant": "topk", "progress": False}
SEEN = TRAINING["steps"] * TRAINING["batch_size"]


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(1000, D_MODEL)) * 3 + 1
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def of_array(array) -> vsae_jax.Fit:
    return vsae_jax.fit(array, **TOPK)


def assert_same(a: vsae_jax.TrainedSAE, b: vsae_jax.TrainedSAE) -> None:
    for part, arrays in a.variables.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, b.variables[part][name], name)


def test_a_folder_of_activations_gives_the_commands_bits(tiny_rows, tiny_run):
    fitted = vsae_jax.fit(tiny_rows, **TOPK)
    command = vsae_jax.load(tiny_run)
    assert_same(fitted.sae, command)
    assert (fitted.sae.sae, fitted.sae.data) == (command.sae, command.data)
    there = runs.read_history(tiny_run / runs.METRICS)
    assert list(fitted.history) == list(there)
    for name in there.keys() - {"rows_per_second"}:
        np.testing.assert_array_equal(fitted.history[name], there[name])
    assert repr(fitted.sae).endswith("not saved")


def test_with_out_it_is_the_commands_run(tiny_rows, tiny_run, tmp_path):
    rows = vsae_jax.open_activations(tiny_rows)
    sae, history = vsae_jax.fit(rows, out=tmp_path / "run", **TOPK)
    name = runs.PARAMETERS
    assert (tmp_path / "run" / name).read_bytes() == (tiny_run / name).read_bytes()
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        p.name for p in tiny_run.iterdir() if p.name in ("checkpoints", runs.CONFIG)
    }
    assert sae.folder == tmp_path / "run" and history["step"].tolist() == [20]
    again = vsae_jax.fit(rows, out=tmp_path / "run", **TOPK)
    assert_same(sae, again.sae)
    assert call("evaluate", run=tmp_path / "run", num_tokens=200) == 0


def test_an_array_a_file_and_other_kinds_are_the_same_rows(array, of_array, tmp_path):
    torch = pytest.importorskip("torch")
    np.save(tmp_path / "rows.npy", array)
    wide = np.asfortranarray(array.astype(np.float64))
    kinds = [str(tmp_path / "rows.npy"), jnp.asarray(array), torch.tensor(array), wide]
    for rows in kinds:
        assert_same(vsae_jax.fit(rows, **TOPK).sae, of_array.sae)


def test_an_arrays_rows_are_scaled_to_what_is_asked(array, of_array):
    sae, history = of_array
    norm = np.sqrt(np.square(array).sum(1).mean())
    np.testing.assert_allclose(sae.variables["norm"]["scale"], 100 / norm, rtol=1e-5)
    assert (sae.d_model, sae.d_sae, sae.k) == (D_MODEL, D_SAE, 4)
    assert sae.explained_variance == history["explained_variance"][-1] > 0
    assert sae.data["held_out_contexts"] == [800, 1000]
    assert set(history) >= {"step", "loss", "l0", "dead_fraction"}


def test_the_run_of_an_array_is_opened_by_commands(
    array, tiny_rows, tiny_model, tmp_path
):
    out = tmp_path / "run"
    kept = vsae_jax.fit(array, out=out, model=str(tiny_model), layer=0, **TOPK)
    assert "blocks.0.hook_resid_post" in repr(vsae_jax.load(out))
    assert_same(vsae_jax.load(out), kept.sae)
    flags = {"run": out, "activations": tiny_rows, "num_tokens": 200}
    assert call("evaluate", **flags) == 0
    assert call("convert", input=out, to="saelens", out=tmp_path / "saelens") == 0
    with pytest.raises(UserError, match="holds a run with another config"):
        vsae_jax.fit(array * 2, out=out, model=str(tiny_model), layer=0, **TOPK)


def test_of_rows_that_say_nothing_commands_ask(array, tiny_rows, tmp_path, capfd):
    vsae_jax.fit(array, out=tmp_path / "run", **TOPK)
    assert call("evaluate", run=tmp_path / "run", activations=tiny_rows) == 2
    assert "does not say its layer; name it with --layer" in capfd.readouterr().err


def test_batches_are_taken_in_their_order_whatever_their_length(array):
    rows = array[:SEEN]
    whole = vsae_jax.fit(iter([rows]), **TOPK).sae
    pieces = (jnp.asarray(part) for part in np.array_split(rows, 7))
    assert_same(vsae_jax.fit(pieces, **TOPK).sae, whole)
    assert_same(vsae_jax.fit([rows[:320], rows[320:]], **TOPK).sae, whole)
    reverse = vsae_jax.fit(iter([rows[::-1]]), **TOPK).sae
    assert np.any(reverse.params["w_enc"] != whole.params["w_enc"])


def test_a_list_of_batches_begins_again(array):
    few = [array[:100], array[100:320]]
    twice = iter(few * 2)
    assert_same(vsae_jax.fit(few, **TOPK).sae, vsae_jax.fit(twice, **TOPK).sae)


def test_bad_rows_of_an_array_are_left_out_where_asked(array):
    bad = array.copy()
    bad[17, 3] = np.nan
    sae = vsae_jax.fit(bad, bad_rows="skip", **TOPK).sae
    assert sae.data["left_out"].startswith("1 rows")
    mean_squared = sae.data["mean_squared_norm"]
    expected = np.square(np.delete(array, 17, 0).astype(np.float64)).sum(1).mean()
    np.testing.assert_allclose(mean_squared, expected, rtol=1e-9)


def nan_at(row: int):
    def rows(array):
        bad = array.copy()
        bad[row] = np.nan
        return bad

    return rows


@pytest.mark.parametrize(
    "rows, settings, said",
    [
        (None, {"d_sea": 8}, "fit has no keyword d_sea; did you mean d_sae?"),
        (None, {"activations": "x"}, "fit has no keyword activations"),
        (None, {"process_id": 1}, "fit has no keyword process_id"),
        (None, {"k": "8"}, "k='8' is not int"),
        (None, {"k": [8, 16]}, r"k=\[8, 16\] is not int"),
        (None, {"variant": "top"}, r"variant='top' is not Literal\['relu', 'topk'"),
        (None, {"k": 64}, "--k=64 must not exceed --d_sae=32"),
        (None, {"stream": True}, "stream=True goes on with the text of a folder"),
        (None, {"tensorboard": True}, "name it by out="),
        (lambda a: a.astype(int), {}, r"the array is int64\[1000, 16\]; expected an"),
        (lambda a: a[0], {}, r"the array is float32\[16\]; expected an array"),
        (lambda a: a[:0], {}, r"float32\[0, 16\]; expected an array"),
        (lambda a: a[:1], {}, "holds out all of them"),
        (lambda a: a * 0, {}, "the array: every activation row is 0"),
        (lambda a: 3, {}, "rows is a int; expected an array"),
        (lambda a: [], {}, "there is no batch"),
        (lambda a: [a, a[:, 1:]], {}, "with d_model=16 as the first"),
        (lambda a: iter([a[:300]]), {}, "the batches end after 300 rows"),
        (lambda a: [a], {"bad_rows": "skip"}, "bad_rows='skip' needs all rows"),
        (lambda a: [a], {"max_norm_multiple": 9.0}, "max_norm_multiple=9.0 needs all"),
        (nan_at(17), {}, "the array: 1 of 800 rows are NaN.*the first is row 17"),
        (lambda a: [nan_at(3)(a)], {}, "the batches: .*the first is row 3"),
        (lambda a: "nowhere", {}, "no activations in nowhere"),
        (lambda a: "nowhere.npy", {}, "nowhere.npy cannot be read"),
    ],
)
def test_mistakes_are_one_line(array, rows, settings, said):
    with pytest.raises(ValueError, match=said) as error:
        vsae_jax.fit(array if rows is None else rows(array), **{**TOPK, **settings})
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_a_folder_says_its_model_itself(tiny_rows):
    with pytest.raises(UserError, match="says its model and layer itself"):
        vsae_jax.fit(tiny_rows, layer=0, **TOPK)


def test_progress_is_the_commands_and_can_be_silenced(array, capfd):
    vsae_jax.fit(array, **TOPK)
    assert capfd.readouterr() == ("", "")
    vsae_jax.fit(array, **{**TOPK, "progress": True})
    out, err = capfd.readouterr()
    assert "topk (preset paper): d_model 16, d_sae 32, k 4" in out
    assert "20 of 20 steps" in err


def test_its_keywords_are_the_commands_flags():
    parameters = inspect.signature(vsae_jax.fit).parameters
    fields = TrainConfig.__dataclass_fields__
    ours = fields.keys() - {"activations", "coordinator", "num_processes", "process_id"}
    assert ours <= parameters.keys()
    assert all(parameters[n].default == fields[n].default for n in ours - {"out"})


def test_numpys_numbers_are_numbers(array, of_array):
    settings = {**TOPK, "k": np.int64(4), "held_out": np.float64(0.2)}
    assert_same(vsae_jax.fit(array, **settings).sae, of_array.sae)


def test_a_signal_is_an_interrupt(array):
    def batches():
        for number in range(10_000):
            if number == 200:
                os.kill(os.getpid(), signal.SIGTERM)
            yield array[:320]

    with pytest.raises(KeyboardInterrupt, match="stopped by a signal"):
        vsae_jax.fit(batches(), **{**TOPK, "steps": 5000})


def test_without_checkpoints_the_result_is_the_same(tiny_rows, tiny_run, tmp_path):
    out = tmp_path / "run"
    flags = {"activations": tiny_rows, "variant": "topk", "out": out, **TRAINING}
    assert call("train", checkpoint_every=0, **flags) == 0
    name = runs.PARAMETERS
    assert (out / name).read_bytes() == (tiny_run / name).read_bytes()
    assert not list((out / runs.CHECKPOINTS).iterdir())


def test_fitting_leaves_no_files(array, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    vsae_jax.fit(array, **TOPK)
    assert not list(tmp_path.iterdir())
