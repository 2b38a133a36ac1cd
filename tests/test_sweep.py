"""A grid: a folder of run folders, each the run that its flags alone would make."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import TRAINING, call, copied

from vsae_jax import runs, sweep
from vsae_jax.config import TrainConfig

ARMS = [
    "variant-topk_beta-0.0",
    "variant-topk_beta-2.0",
    "variant-vsae_topk_beta-0.0",
    "variant-vsae_topk_beta-2.0",
]
GRID = {"variant": "topk,vsae_topk", "beta": "0,2"}


def parameters(folder: Path) -> bytes:
    return (folder / runs.PARAMETERS).read_bytes()


def summary(folder: Path) -> list[dict[str, str]]:
    with (folder / runs.SUMMARY).open(newline="") as file:
        return list(csv.DictReader(file))


def again(folder: Path, rows: Path, **flags: object) -> int:
    """The command that made the grid, or with other flags."""
    return call(
        "train", **{"activations": rows, "out": folder, **TRAINING, **GRID, **flags}
    )


def test_a_grid_is_one_run_folder_an_arm(tiny_grid):
    assert [folder.name for folder in runs.run_folders(tiny_grid)] == ARMS
    assert sorted(p.name for p in tiny_grid.iterdir()) == sorted(
        ["grid.json", "summary.csv", *ARMS]
    )
    for name in ARMS:
        run = runs.open_run(tiny_grid / name)
        assert name == f"variant-{run.train.variant}_beta-{run.train.beta}"


def test_grid_json_says_what_differs(tiny_grid):
    grid = json.loads((tiny_grid / "grid.json").read_text())
    assert grid["swept"] == ["variant", "beta"]
    assert grid["arms"][1] == {"folder": ARMS[1], "variant": "topk", "beta": 2.0}
    assert [arm["folder"] for arm in grid["arms"]] == ARMS


def test_summary_has_each_arms_last_metrics(tiny_grid):
    rows = summary(tiny_grid)
    assert [row["arm"] for row in rows] == ARMS
    for row in rows:
        lines = (tiny_grid / row["arm"] / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert row.keys() == {"arm", "variant", "beta", *last}
        assert {name: float(row[name]) for name in last} == last
        assert (last["step"], f"variant-{row['variant']}") == (
            TRAINING["steps"],
            row["arm"].split("_beta")[0],
        )


def test_an_arm_is_the_single_run_bit_for_bit(tiny_grid, tiny_run, tiny_rows, tmp_path):
    # tiny_run is topk with beta unset, which changes nothing there.
    assert parameters(tiny_grid / ARMS[0]) == parameters(tiny_run)
    assert parameters(tiny_grid / ARMS[1]) == parameters(tiny_run)
    single = tmp_path / "single"
    flags = {"activations": tiny_rows, "out": single, **TRAINING}
    assert call("train", variant="vsae_topk", beta=2, **flags) == 0
    assert parameters(tiny_grid / ARMS[3]) == parameters(single)
    assert len({parameters(tiny_grid / name) for name in ARMS}) == 3


def test_a_finished_grid_says_so_and_changes_nothing(
    tiny_grid, tiny_rows, tmp_path, capsys
):
    folder = copied(tiny_grid, tmp_path / "grid")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert again(folder, tiny_rows) == 0
    out = capsys.readouterr().out
    assert out.count("is finished; nothing to do") == len(ARMS)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_beta_of_a_topk_arm_is_said_to_change_nothing(tiny_grid, tiny_rows, capsys):
    assert again(tiny_grid, tiny_rows) == 0
    out = capsys.readouterr().out
    arms = out.split("\narm ")[1:]
    noted = ["--beta=2.0 changes nothing" in arm for arm in arms]
    assert noted == [name == ARMS[1] for name in ARMS]


def test_an_arm_that_is_missing_is_trained_and_the_others_are_not(
    tiny_grid, tiny_rows, tmp_path, capsys
):
    folder = copied(tiny_grid, tmp_path / "grid")
    expected, rows = parameters(folder / ARMS[0]), summary(folder)
    shutil.rmtree(folder / ARMS[0])
    (folder / runs.SUMMARY).unlink()
    capsys.readouterr()
    assert again(folder, tiny_rows) == 0
    assert capsys.readouterr().out.count("is finished; nothing to do") == 3
    assert parameters(folder / ARMS[0]) == expected

    def lasting(rows):
        return [{n: v for n, v in r.items() if n != "rows_per_second"} for r in rows]

    assert lasting(summary(folder)) == lasting(rows)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"beta": "0,2,4"}, "holds another grid; give another --out"),
        ({"seed": "0,1"}, "holds another grid"),
        ({"steps": 21}, "steps: 20 -> 21"),
        ({"variant": "topk", "beta": 0}, "is not empty and not a run folder"),
        ({"k": "4,64"}, "--k=64 must not exceed --d_sae=32"),
        ({"k_aux": "4,64"}, "--k_aux=64 must not exceed d_sae=32"),
    ],
)
def test_another_grid_in_the_folder_is_refused(
    tiny_grid, tiny_rows, flags, said, capsys
):
    before = {p: p.read_bytes() for p in tiny_grid.rglob("*") if p.is_file()}
    assert again(tiny_grid, tiny_rows, **flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {p: p.read_bytes() for p in tiny_grid.rglob("*") if p.is_file()} == before


def test_a_grid_in_a_runs_folder_is_refused(tiny_run, tiny_rows, capsys):
    assert again(tiny_run, tiny_rows) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not empty and not a grid's folder" in line
    assert not (tiny_run / "grid.json").exists()


def test_no_arm_is_trained_where_one_is_wrong(tiny_rows, tmp_path, capsys):
    out = tmp_path / "grid"
    assert again(out, tiny_rows, k_aux="4,64") == 2
    assert not out.exists()
    assert "--k_aux=64" in capsys.readouterr().err


def test_the_default_folder_is_named_by_what_is_swept_and_what_is_set(
    tiny_rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("in the way, so that nothing is trained")
    assert call("train", activations=tiny_rows, k="4,8", d_sae=32) == 2
    assert "runs/grid_k_vsae_topk_d_sae-32" in capsys.readouterr().err


def test_swept_fields_come_in_the_order_of_the_flags():
    arms = [TrainConfig(k=k, seed=s, beta=0.5) for s in (0, 1) for k in (64, 128)]
    assert sweep.swept_fields(arms) == ["k", "seed"]
    assert sweep.arm_name(arms[1], ["k", "seed"]) == "k-128_seed-0"


def test_unset_and_the_default_are_two_values():
    assert sweep.swept_fields([TrainConfig(), TrainConfig(lr="auto")]) == ["lr"]
