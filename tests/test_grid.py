"""A grid: a folder of run folders, each the run that its flags alone would make."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from planted import write_rows
from tiny_runs import TRAINING, call, copied

from vsae_jax import runs
from vsae_jax.config import TrainConfig
from vsae_jax.training import grid, groups
from vsae_jax.training.checkpoint import Checkpoints

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
        # beta is what was asked for, also where it changes nothing.
        assert row["beta"] == row["arm"].rsplit("-", 1)[1]
        last.pop("beta")
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
    shutil.rmtree(folder / ARMS[3])
    capsys.readouterr()
    assert again(folder, tiny_rows) == 0
    out, err = capsys.readouterr()
    assert out.count("is finished; nothing to do") == 2
    number = r"-?[\d.e-]+"
    assert re.search(f"EV {number} to {number} over 2 arms, dead up to {number}", err)
    assert parameters(folder / ARMS[0]) == expected

    def lasting(rows):
        return [{n: v for n, v in r.items() if n != "rows_per_second"} for r in rows]

    assert lasting(summary(folder)) == lasting(rows)


def test_a_grid_grows_by_another_value_of_a_flag(
    tiny_grid, tiny_rows, tmp_path, capsys
):
    folder = copied(tiny_grid, tmp_path / "grid")
    before = {arm: parameters(folder / arm) for arm in ARMS}
    capsys.readouterr()
    assert again(folder, tiny_rows, beta="0,2,4") == 0
    assert capsys.readouterr().out.count("is finished; nothing to do") == len(ARMS)
    assert {arm: parameters(folder / arm) for arm in ARMS} == before
    arms = [row["arm"] for row in summary(folder)]
    assert len(arms) == len(set(arms)) == 6
    assert set(ARMS) < set(arms)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"beta": "0,4"}, "holds another grid; give another --out"),
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


def test_every_arm_may_diverge_alone_and_be_trained_again(tiny_rows, tmp_path, capsys):
    """Arms of other lengths share no pass; each is named, none stops the others."""
    flags = {**TRAINING, "activations": tiny_rows, "out": tmp_path / "grid"}
    flags |= {"variant": "topk", "decoder_norm": "free", "steps": "5,6"}
    for _ in range(2):
        assert call("train", **flags, lr=3e38, log_every=1) == 2
        assert "2 of 2 arms diverged (steps-5, steps-6)" in capsys.readouterr().err
    assert call("train", **flags, lr=1e-3) == 0
    assert [row["arm"] for row in summary(tmp_path / "grid")] == ["steps-5", "steps-6"]


def test_shares_in_an_arms_name_make_no_folder(tiny_rows, tmp_path):
    flags = {**TRAINING, "activations": tiny_rows, "out": tmp_path / "grid", "steps": 2}
    assert call("train", **flags, prefixes="1/4:1/2,1/8:1/2", variant="topk") == 0
    names = ["prefixes-1of4:1of2", "prefixes-1of8:1of2"]
    assert [f.name for f in runs.run_folders(tmp_path / "grid")] == names
    assert runs.open_run(tmp_path / "grid" / names[1]).train.prefixes == "1/8:1/2"


def test_a_summary_has_the_columns_of_every_arm(tiny_grid, tiny_rows, tmp_path):
    """As after an older version, whose metrics had fewer."""
    folder = copied(tiny_grid, tmp_path / "grid")
    metrics = folder / ARMS[2] / runs.METRICS
    *earlier, last = metrics.read_text().splitlines()
    last = json.dumps(json.loads(last) | {"younger": 3.5})
    metrics.write_text("\n".join([*earlier, last]) + "\n")
    assert again(folder, tiny_rows) == 0
    assert [row["younger"] for row in summary(folder)] == ["", "", "3.5", ""]


@pytest.mark.parametrize("damaged", [{}, {"swept": ["beta"]}, {"arms": []}])
def test_a_damaged_grid_json_is_refused(
    tiny_grid, tiny_rows, tmp_path, damaged, capsys
):
    folder = copied(tiny_grid, tmp_path / "grid")
    (folder / "grid.json").write_text(json.dumps(damaged))
    assert again(folder, tiny_rows) == 2
    assert "holds another grid" in capsys.readouterr().err


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
    assert grid.swept_fields(arms) == ["k", "seed"]
    assert grid.arm_name(arms[1], ["k", "seed"]) == "k-128_seed-0"


def test_unset_and_the_default_are_two_values():
    assert grid.swept_fields([TrainConfig(), TrainConfig(lr="auto")]) == ["lr"]


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / runs.METRICS).read_text()
    read = [json.loads(line) for line in text.splitlines()]
    return [{n: v for n, v in r.items() if n != "rows_per_second"} for r in read]


MIXED = {
    "variant": "topk,vsae_topk",
    "k": "2,4",
    "lr": "1e-3,1e-2",
    "seed": "0,1",
    "steps": 50,
    "dead_after_tokens": 64,
}


@pytest.fixture(scope="module")
def mixed(tiny_rows, tmp_path_factory) -> dict[str, Path]:
    """One grid of 16 arms, its arms one after another and at once."""
    folders = {}
    for how in ("loop", "vmap"):
        folders[how] = tmp_path_factory.mktemp(how) / "grid"
        flags = {**TRAINING, **MIXED, "out": folders[how], "arms": how}
        assert call("train", activations=tiny_rows, **flags) == 0
    return folders


def test_arms_at_once_equal_arms_one_after_another(mixed):
    for loop, vmap in zip(*(runs.run_folders(f) for f in mixed.values()), strict=True):
        one, other = runs.open_run(loop), runs.open_run(vmap)
        for name, array in one.variables["params"].items():
            np.testing.assert_allclose(
                other.variables["params"][name],
                array,
                rtol=1e-6,
                atol=1e-6,
                err_msg=name,
            )


@pytest.mark.parametrize(
    "variant, k, lr, seed", [("topk", 2, 1e-2, 1), ("vsae_topk", 4, 1e-3, 0)]
)
def test_an_arm_of_a_mixed_grid_is_its_single_run(
    mixed, tiny_rows, tmp_path, variant, k, lr, seed
):
    name = f"variant-{variant}_k-{k}_lr-{lr}_seed-{seed}"
    arm = {"variant": variant, "k": k, "lr": lr, "seed": seed}
    flags = {**TRAINING, **MIXED, **arm, "out": tmp_path / "single"}
    assert call("train", activations=tiny_rows, **flags) == 0
    assert parameters(tmp_path / "single") == parameters(mixed["loop"] / name)
    assert lines(tmp_path / "single") == lines(mixed["loop"] / name)


def test_arms_of_other_rows_do_not_take_the_first_arms_batches(tiny_rows, tmp_path):
    """No flag sweeps them; from Python arms may differ in them."""
    other = write_rows(tmp_path / "other", tiny_rows)
    given = {"activations": str(tiny_rows), "out": str(tmp_path / "grid"), **TRAINING}
    changes = {
        "as_it_is": {},
        "folder": {"activations": str(other)},
        "order": {"data_seed": 1},
        "held_out": {"held_out": 0.3},
        "norms": {"max_norm_multiple": 1.1},
    }
    arms = [TrainConfig(**given | change) for change in changes.values()]
    grid.run(arms, names=list(changes))
    found = {name: parameters(tmp_path / "grid" / name) for name in changes}
    assert len(set(found.values())) == len(changes)
    for name, change in changes.items():
        alone = given | {"out": tmp_path / name} | change
        assert call("train", **alone) == 0
        assert parameters(tmp_path / name) == found[name], name
    # Each arm is evaluated on what it has not seen.
    assert call("evaluate", run=tmp_path / "grid", evals="core") == 0
    for name in ("as_it_is", "held_out"):
        assert call("evaluate", run=tmp_path / name, evals="core") == 0
        one, other = (
            json.loads((folder / name / "evals" / "core.json").read_text())["metrics"]
            for folder in (tmp_path / "grid", tmp_path)
        )
        assert one == pytest.approx(other, rel=1e-5), name


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_a_grid_that_is_stopped_goes_on_as_a_whole(
    mixed, tiny_rows, tmp_path, monkeypatch, how, capsys
):
    folder = tmp_path / "grid"
    flags = {**TRAINING, **MIXED, "out": folder, "arms": how, "checkpoint_every": 10}
    save, saved = Checkpoints.save, []

    def killed(self, state, **options):
        if len(saved) == 20:  # in the middle of the arms' second checkpoints
            raise KeyboardInterrupt
        saved.append(int(state.step))
        save(self, state, **options)

    monkeypatch.setattr(Checkpoints, "save", killed)
    assert call("train", activations=tiny_rows, **flags) == 130
    assert saved == [10] * 16 + [20] * 4
    monkeypatch.setattr(Checkpoints, "save", save)
    capsys.readouterr()
    assert call("train", activations=tiny_rows, **flags) == 0
    assert capsys.readouterr().out.count("going on from step 10\n") == 1
    for arm in runs.run_folders(folder):
        assert parameters(arm) == parameters(mixed[how] / arm.name)
        assert lines(arm)[-1] == lines(mixed[how] / arm.name)[-1]


def test_a_grid_too_large_for_memory_takes_several_passes(
    mixed, tiny_rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(groups, "free_bytes", lambda: 10 * 16 * 32 * 4 * 32)
    folder = tmp_path / "grid"
    flags = {**TRAINING, **MIXED, "out": folder}
    capsys.readouterr()
    assert call("train", activations=tiny_rows, **flags) == 0
    said = capsys.readouterr().out
    assert "passes" in said and said.count("compiled in") > 1
    for arm in runs.run_folders(folder):
        assert parameters(arm) == parameters(mixed["loop"] / arm.name)


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_an_arm_that_diverges_leaves_the_others(
    tiny_grid, tiny_rows, tmp_path, how, capsys
):
    folder = tmp_path / "grid"
    flags = {**TRAINING, "out": folder, "variant": "topk", "arms": how}
    flags |= {"lr": "1e-3,3e38", "decoder_norm": "free", "log_every": 5}
    for _ in range(2):  # started again it says the same
        capsys.readouterr()
        assert call("train", activations=tiny_rows, **flags) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        assert "1 of 2 arms diverged (lr-3e+38)" in line
    assert (folder / "lr-0.001" / runs.PARAMETERS).is_file()
    assert not (folder / "lr-3e+38" / runs.PARAMETERS).exists()
    assert [row["arm"] for row in summary(folder)] == ["lr-0.001"]
    assert runs.run_folders(folder) == [folder / "lr-0.001"]
