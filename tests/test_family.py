"""What every variant must do: a row here is a row of `config.presets.VARIANTS`."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import D_MODEL, D_SAE, TRAINING, call

import vsae_jax
from vsae_jax import interop, runs
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sparsifiers import sparsifier_of
from vsae_jax.config import SAEConfig, TrainConfig
from vsae_jax.config.presets import VARIANTS
from vsae_jax.system.errors import UserError
from vsae_jax.training.plan import explain, plan

# The formats that cannot say what a variant keeps, and why; of those of today's table
# that keep negative latents, test_convert.py.
REFUSED = {
    "batch_topk": {"sparsify": "no batch_topk", "openai": "thresholds of a batch_topk"},
    "jump_relu": {"sparsify": "no jump_relu", "openai": "thresholds of a jump_relu"},
}
REFUSED["matryoshka"] = REFUSED["batch_topk"]
REFUSED["gated"] = {"sparsify": "no gated", "openai": "gate of a gated"}
REFUSED |= {f"vsae_{name}": formats for name, formats in REFUSED.items()}
_BY_SIGMA = "gate of a vaease autoencoder, 1 - sigma"
REFUSED["vaease"] = {"saelens": _BY_SIGMA, "dictionary_learning": _BY_SIGMA}
REFUSED["vaease"] |= {"openai": _BY_SIGMA, "sparsify": "no vaease"}


def traced_number(variant: str) -> tuple[str, tuple[float, float]]:
    """A number of the variant that two arms of one compiled step differ in."""
    sparsity, gate = VARIANTS[variant]["sparsity"], VARIANTS[variant]["gate"]
    if gate != "none":
        return ("gate_l1", (1.0, 30.0)) if gate == "path" else ("beta", (0.1, 1.0))
    if "topk" in sparsity:
        return "k", (3, 4)
    if sparsity == "jump_relu":
        return "target_l0", (4.0, 8.0)
    return ("beta", (0.1, 1.0)) if variant == "vsae" else ("l1", (0.1, 1.0))


@pytest.fixture(scope="module")
def rows(tiny_rows) -> np.ndarray:
    return np.asarray(Activations.open(tiny_rows).rows(0, 200), np.float32)


@pytest.fixture(scope="module", params=VARIANTS)
def grid(request, tiny_rows, tmp_path_factory) -> Path:
    """Two arms of a variant that one step trains, in a folder named by it."""
    out = tmp_path_factory.mktemp("family") / request.param
    name, values = traced_number(request.param)
    flags = {**TRAINING, name: ",".join(map(str, values)), "checkpoint_every": 10}
    assert call("train", **flags, **where(out, tiny_rows)) == 0
    return out


def where(out: Path, rows: Path, *, variant: str = "") -> dict[str, object]:
    return {"activations": rows, "variant": variant or out.name, "out": out}


def arm(grid: Path) -> Path:
    """The grid's second arm."""
    return runs.run_folders(grid)[1]


def parameters(folder: Path) -> bytes:
    return (folder / runs.PARAMETERS).read_bytes()


def test_an_arm_is_the_single_run(grid, tiny_rows, tmp_path):
    name, values = traced_number(grid.name)
    flags = {**TRAINING, name: values[1]}
    single = where(tmp_path / "single", tiny_rows, variant=grid.name)
    assert call("train", **flags, **single) == 0
    assert parameters(tmp_path / "single") == parameters(arm(grid))
    first = parameters(runs.run_folders(grid)[0])
    assert first != parameters(arm(grid))


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(grid, tiny_rows, tmp_path):
    """As if killed after its checkpoint of step 10 of 20."""
    folder = tmp_path / "stopped"
    name, values = traced_number(grid.name)
    flags = {**TRAINING, name: values[1], "checkpoint_every": 10}
    flags |= where(folder, tiny_rows, variant=grid.name)
    assert call("train", **flags) == 0
    (folder / runs.PARAMETERS).unlink()
    shutil.rmtree(folder / runs.CHECKPOINTS / "20")
    assert call("train", **flags) == 0
    assert parameters(folder) == parameters(arm(grid))


def expected_latents(run, rows: np.ndarray) -> np.ndarray:
    """f by the formula of each sparsifier, in float64."""
    p = {n: np.asarray(a, np.float64) for n, a in run.params.items()}
    norm = {n: np.asarray(a, np.float64) for n, a in run.variables["norm"].items()}
    x = norm["scale"] * (rows.astype(np.float64) - norm["mean"])
    x = x - p["b_dec"] if run.config.subtract_b_dec else x
    z = x @ p["w_enc"] + p["b_enc"]
    gate = z > 0
    if run.config.gate == "path":
        z = np.exp(p["r_mag"]) * (x @ p["w_enc"]) + p["b_mag"]
    z = np.maximum(z, 0) if run.config.relu else z
    if run.config.gate == "path":
        return np.where(gate, z, 0)
    if run.config.gate == "sigma":
        gate = 1 - np.exp(0.5 * (x @ p["w_var"] + p["b_var"]))
        return np.where(gate > run.config.closed_below, gate * z, 0)
    sparsity = run.config.sparsity
    if sparsity == "topk":
        return np.where(z >= np.sort(z, axis=1)[:, [-run.config.k]], z, 0)
    cut = {"none": -np.inf, "batch_topk": norm.get("threshold")}
    return np.where(z > cut.get(sparsity, p.get("theta")), z, 0)


def test_an_opened_run_encodes_by_its_formula(grid, rows):
    run = vsae_jax.load(arm(grid))
    f = np.asarray(run.encode(rows))
    expected = expected_latents(run, rows)
    size = np.abs(expected).max()
    assert size > 0
    near = np.abs(f - expected) > 1e-4 * size
    # A value at a threshold may fall on either side of it.
    assert near.mean() < 1e-3


def test_a_folded_run_is_the_same_on_raw_rows(grid, rows):
    run = vsae_jax.load(arm(grid))
    x_hat = np.asarray(run(rows))
    f = np.asarray(run.encode(rows))
    scale = float(run.variables["norm"]["scale"])
    for units, times in (("scaled", 1.0), ("raw", 1 / scale)):
        folded, config = sae.fold(run.variables, run.config, units=units)
        got = sae.encode(folded, jnp.asarray(rows), config=config)
        otherwise = np.abs(np.asarray(got) / times - f) > 1e-3 * np.abs(f).max()
        assert otherwise.mean() < 1e-3
        back = np.asarray(sae.decode(folded, got, config=config))
        difference = np.abs(back - x_hat).max(axis=1)
        assert np.median(difference) < 1e-4 * np.abs(x_hat).max()


@pytest.mark.parametrize("to", interop.FORMATS)
def test_a_run_there_and_back(grid, rows, to, tmp_path, capfd):
    variant, out = grid.name, tmp_path / "out"
    status = call("convert", input=arm(grid), to=to, out=out)
    said = REFUSED.get(variant, {}).get(to)
    if said or status:
        assert status == 2
        (line,) = capfd.readouterr().err.splitlines()
        # relu has no other variant, so a format without it is for TopK alone.
        assert (said or ("negative" if "vsae" in variant else "only TopK")) in line
        return
    there, own = vsae_jax.load(out), vsae_jax.load(arm(grid))
    for name in ("sparsity", "gate", "prefixes"):
        assert getattr(there.config, name) == getattr(own.config, name)
    assert there.config.k == own.config.k or not own.config.has_k
    size = np.abs(own(rows)).max()
    difference = np.abs(np.asarray(there(rows)) - np.asarray(own(rows))).max(axis=1)
    assert np.mean(difference > 1e-4 * size) < 0.02
    again = tmp_path / "again"
    assert call("convert", input=out, to="vsae_jax", out=again) == 0
    np.testing.assert_array_equal(vsae_jax.load(again)(rows), there(rows))


@pytest.mark.parametrize("grid", ["gated", "matryoshka", "vaease"], indirect=True)
def test_an_arm_is_evaluated_and_looked_at(grid):
    run = arm(grid)
    assert call("evaluate", run=run, evals="core") == 0
    metrics = json.loads((run / "evals" / "core.json").read_text())["metrics"]
    assert 0 < metrics["l0"] <= D_SAE and metrics["explained_variance"] < 1
    assert call("features", run=run) == 0
    with np.load(run / "features" / "features.npz") as stored:
        np.testing.assert_allclose(stored["firing_rate"].sum(), metrics["l0"], 1e-3)


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"variant": "batch_topk", "selection": "magnitude"}, "no negative latent"),
        ({"variant": "vsae_jump_relu", "selection": "magnitude"}, "no negative latent"),
        ({"variant": "batch_topk", "batch_size": 2**26}, "below 2^31"),
        ({"variant": "vsae_topk", "l0": 1.0}, "--l0=1.0 cannot be combined"),
        (
            {"variant": "vsae_topk", "noise_at": "input", "variance": "learned"},
            "--noise_at=input cannot be combined with --variance=learned",
        ),
        ({"variant": "batch_topk", "threshold_decay": 1.0}, "must be below 1"),
        ({"variant": "jump_relu", "bandwidth": 0.0}, "--bandwidth=0.0 must be above 0"),
        ({"variant": "batch_topk", "k": 33}, "--k=33 must not exceed --d_sae=32"),
        ({"variant": "matryoshka", "k": 33}, "--k=33 must not exceed --d_sae=32"),
        (
            {"variant": "vaease", "variance": "fixed"},
            "gate=sigma needs variance=learne",
        ),
        ({"variant": "topk", "gate": "path"}, "the gate chooses the latents"),
        (
            {"variant": "gated", "auxk": 0.1},
            "AuxK trains the sizes of latents and open",
        ),
        ({"variant": "matryoshka", "d_sae": 8}, "must be rising shares or numbers"),
        ({"variant": "matryoshka", "prefixes": "1/2:1/0"}, "must be rising shares"),
        ({"variant": "matryoshka", "prefixes": "16:32"}, "and fewer than all"),
        ({"variant": "vaease", "closed_below": 1.0}, "must be below 1"),
    ],
)
def test_what_cannot_be_combined_is_refused(flags, said, tiny_rows, tmp_path, capsys):
    values = {**TRAINING, "activations": tiny_rows, "out": tmp_path / "run"} | flags
    assert call("train", **values) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"nested": 2.0}, "--nested changes nothing without --prefixes"),
        ({"gate_l1": 2.0}, "--gate_l1 changes nothing without --gate=path"),
        ({"variant": "vaease"}, "no other library's format can hold a gate by sigma"),
    ],
)
def test_what_does_nothing_is_said_at_the_start(flags, said, tiny_rows, capsys):
    values = {"variant": "topk", **TRAINING, "activations": str(tiny_rows)} | flags
    explain(plan(TrainConfig(**values)))
    assert f"note: {said}" in capsys.readouterr().out


def test_the_running_threshold_is_a_mean_of_each_batchs_smallest():
    config = SAEConfig(d_model=D_MODEL, d_sae=4, sparsity="batch_topk", k=1)
    sparsifier = sparsifier_of(config)
    numbers = {"k": 1, "threshold_decay": jnp.float32(0.75)}
    threshold, seen = jnp.zeros(()), []
    batches = ([[-1, -2, -3, -4]], [[3, 8, 5, 1], [2, 1, 1, 1]], [[9, 1, 1, 1]])
    for batch in batches:
        out = sparsifier.apply(
            jnp.asarray(batch, jnp.float32),
            {"threshold": threshold},
            numbers,
            config=config,
        )
        threshold = out.buffers["threshold"]
        seen.append(float(threshold))
    # Nothing above 0 leaves it; the first is taken as it is; then a quarter of 9.
    assert seen == [0.0, 5.0, 0.75 * 5 + 0.25 * 9]


def test_one_threshold_for_all_latents_is_a_batch_topk_only_then():
    params = {"w_enc": np.eye(3), "b_enc": np.zeros(3), "w_dec": np.eye(3)}
    params |= {"b_dec": np.zeros(3), "theta": np.float32([1, 1, 2])}
    ae = interop.canonical.foreign(params, rule="jump_relu")
    with pytest.raises(UserError, match="the latents' thresholds differ"):
        interop.canonical.with_rule(ae, "batch_topk")
