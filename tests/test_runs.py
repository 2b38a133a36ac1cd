"""Run folders: what is written comes back, and what is damaged is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import D_MODEL, D_SAE, copied

from vsae_jax import __version__, runs
from vsae_jax.activations.manifest import read_manifest
from vsae_jax.config import SAEConfig
from vsae_jax.system.errors import UserError

LEARNED = SAEConfig(d_model=3, d_sae=5, k=2, variance="learned")
SHAPES = {
    "w_enc": (3, 5),
    "b_enc": (5,),
    "w_dec": (5, 3),
    "b_dec": (3,),
    "w_var": (3, 5),
    "b_var": (5,),
}


@pytest.fixture
def variables() -> dict:
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=shape) for n, shape in SHAPES.items()}
    norm = {"scale": abs(rng.normal()), "mean": rng.normal(size=3)}
    return {
        part: {n: np.float32(array) for n, array in arrays.items()}
        for part, arrays in {"params": params, "norm": norm}.items()
    }


@pytest.fixture
def path(tmp_path, variables) -> Path:
    path = tmp_path / "sae.safetensors"
    runs.write_parameters(path, variables)
    return path


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parameters_come_back_bit_for_bit(path, variables):
    read = runs.read_parameters(path, LEARNED)
    assert read.keys() == variables.keys()
    for part, arrays in variables.items():
        assert read[part].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[part][name], array)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    plain = path.parent / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_file_is_float32_under_the_contracts_names(tmp_path, variables):
    transposed = variables["params"]["w_enc"].astype(np.float64).T.copy().T
    params = variables["params"] | {"w_enc": transposed}
    runs.write_parameters(tmp_path / "p", variables | {"params": params})
    arrays = load_file(tmp_path / "p")
    assert {n: a.shape for n, a in arrays.items()} == SHAPES | {
        "scale": (),
        "mean": (3,),
    }
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(arrays["w_enc"], variables["params"]["w_enc"])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"w_enc": np.zeros((5, 3), np.float32)}, "w_enc: (3, 5) -> (5, 3)"),
        ({"w_var": None}, "w_var: (3, 5) -> None"),
        ({"threshold": np.zeros(5, np.float32)}, "threshold: None -> (5,)"),
    ],
)
def test_other_arrays_than_the_configs_are_named(path, change, said):
    arrays = {**load_file(path), **change}
    save_file({n: a for n, a in arrays.items() if a is not None}, path)
    assert said in refused(runs.read_parameters, path, LEARNED)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("params", "w_enc", np.nan, "2 of 15 numbers of w_enc are NaN or infinite"),
        ("params", "b_dec", np.inf, "2 of 3 numbers of b_dec are NaN or infinite"),
        ("norm", "mean", -np.inf, "2 of 3 numbers of mean are NaN or infinite"),
        ("norm", "scale", np.nan, "1 of 1 numbers of scale are NaN or infinite"),
        ("norm", "scale", 0.0, "scale is 0.0, not above 0"),
        ("norm", "scale", -1.0, "scale is -1.0, not above 0"),
    ],
)
def test_numbers_that_are_none_are_named_when_a_run_is_opened(
    path, variables, part, name, value, said
):
    variables[part][name] = np.array(variables[part][name])
    variables[part][name].flat[:2] = value
    runs.write_parameters(path, variables)
    message = refused(runs.read_parameters, path, LEARNED)
    assert said in message and str(path) in message


def test_numbers_of_another_kind_are_named(path):
    save_file(load_file(path) | {"b_enc": np.zeros(5)}, path)
    assert "b_enc is of float64" in refused(runs.read_parameters, path, LEARNED)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_parameter_file_cut_short_is_named(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} cannot be read" in refused(runs.read_parameters, path, LEARNED)


def test_a_trained_run_is_read_with_all_that_is_known_of_it(tiny_run, tiny_rows):
    run, manifest = runs.open_run(tiny_run), read_manifest(tiny_rows)
    assert run.folder == tiny_run
    assert (run.sae.d_model, run.sae.d_sae, run.sae.k) == (D_MODEL, D_SAE, 4)
    assert (run.train.variant, run.train.preset) == ("topk", "paper")
    assert run.data["manifest"] == manifest.hash
    assert run.data["held_out_contexts"] == [64, 80]
    assert (run.data["model"], run.data["layer"]) == (manifest.model, 0)
    for name, array in load_file(tiny_run / "sae.safetensors").items():
        part = "norm" if name in ("scale", "mean") else "params"
        np.testing.assert_array_equal(run.variables[part][name], array)


def test_config_json_has_versions_and_device(tiny_run):
    record = json.loads((tiny_run / "config.json").read_text())
    assert record["versions"]["vsae_jax"] == __version__
    assert set(record) == {"train", "sae", "data", "versions", "device"}


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("config.json", "{", "is not valid JSON"),
        ("config.json", "[1]", "holds list"),
        ("config.json", '{"train": {}, "sae": {}}', "lacks data"),
        ("config.json", "\xff", "is not valid JSON"),
        ("config.json", "[" * 100_000, "is not valid JSON"),
        ("config.json", None, "it has no config.json"),
        ("sae.safetensors", None, "is not finished"),
        ("sae.safetensors", "x", "cannot be read"),
    ],
)
def test_a_damaged_run_is_named(tiny_run, tmp_path, name, text, said):
    path = copied(tiny_run, tmp_path / "run") / name
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    message = refused(runs.open_run, tmp_path / "run")
    assert said in message and str(tmp_path / "run") in message


def test_a_config_of_another_version_is_named(tiny_run, tmp_path):
    path = copied(tiny_run, tmp_path / "run") / "config.json"
    record = json.loads(path.read_text())
    del record["train"]["lr"]
    record["sae"]["gate"] = True
    path.write_text(json.dumps(record))
    assert "SAEConfig does not match this version at gate" in refused(
        runs.open_run, tmp_path / "run"
    )
    del record["sae"]["gate"]
    path.write_text(json.dumps(record))
    assert "TrainConfig does not match this version at lr" in refused(
        runs.open_run, tmp_path / "run"
    )


@pytest.mark.parametrize(
    "data, named",
    [
        ([], "manifest, model"),
        ({"layer": "0"}, "layer"),
        ({"center_residual": 0}, "center_residual"),
        ({"held_out_contexts": [64]}, "held_out_contexts"),
        ({"held_out_contexts": ["64", "80"]}, "held_out_contexts"),
    ],
)
def test_data_of_another_type_is_named(tiny_run, tmp_path, data, named):
    path = copied(tiny_run, tmp_path / "run") / "config.json"
    record = json.loads(path.read_text())
    record["data"] = record["data"] | data if isinstance(data, dict) else data
    path.write_text(json.dumps(record))
    message = refused(runs.open_run, tmp_path / "run")
    assert f"data does not match this version at {named}" in message


def test_a_run_is_its_own_only_folder(tiny_run):
    assert runs.run_folders(tiny_run) == [tiny_run]


def test_a_grids_folders_come_in_the_grids_order(tmp_path):
    arms = [{"folder": f"k-{k}"} for k in (8, 16, 4)]
    runs.write_json(tmp_path / "grid.json", {"arms": arms})
    folders = runs.run_folders(str(tmp_path))
    assert [folder.name for folder in folders] == ["k-8", "k-16", "k-4"]
    assert {folder.parent for folder in folders} == {tmp_path}


@pytest.mark.parametrize("name", ["../other", "/etc", "a/b", "..", ".", "", 3, None])
def test_a_grid_that_names_a_folder_elsewhere_is_refused(tmp_path, name):
    runs.write_json(tmp_path / "grid.json", {"arms": [{"folder": name}]})
    message = refused(runs.run_folders, tmp_path)
    assert f"grid.json: {name!r} is not a folder in the grid" in message


def test_an_arm_with_a_name_too_long_for_a_folder_is_refused(tmp_path):
    runs.write_json(tmp_path / runs.GRID, {"arms": ["9" * 5000]})
    with pytest.raises(UserError, match="too long for a folder"):
        runs.run_folders(tmp_path)


@pytest.mark.parametrize("grid", [{}, {"arms": []}, {"arms": "abc"}])
def test_a_grid_without_arms_is_refused(tmp_path, grid):
    runs.write_json(tmp_path / "grid.json", grid)
    assert "names no arms" in refused(runs.run_folders, tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "value.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        runs.write_json(path, {"a": float("nan")})
    assert runs.read_json(path) == {"a": 1}


def test_metrics_past_a_step_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in (10, 20, 30)]
    path.write_text("".join(lines) + '{"step": 4')
    runs.keep_metrics_up_to(path, 30)
    assert path.read_text() == "".join(lines)
    runs.keep_metrics_up_to(path, 20)
    assert path.read_text() == "".join(lines[:2])
    runs.keep_metrics_up_to(path, 5)
    assert path.read_text() == ""


def test_metrics_that_are_not_there_are_no_fault(tmp_path):
    runs.keep_metrics_up_to(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_moved_run_is_the_same_run(tiny_run, tmp_path):
    moved = shutil.copytree(tiny_run, tmp_path / "elsewhere")
    there, here = runs.open_run(moved), runs.open_run(tiny_run)
    assert (there.train, there.sae, there.data) == (here.train, here.sae, here.data)


def test_a_run_of_before_a_runtime_flag_opens(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    stored = json.loads((folder / "config.json").read_text())
    del stored["train"]["arms"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert runs.open_run(folder).train == runs.open_run(tiny_run).train
    del stored["train"]["k"]
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="does not match this version at k"):
        runs.open_run(folder)
