"""The study: its intervals, effects, verdicts and labels from numbers that are known,
its plan, and the whole of it at scale `smoke`."""

import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from experiments import (
    ablation,
    claims,
    cross,
    kept,
    labels,
    plan,
    primary,
    questions,
    report,
    reproduce,
    signal_to_noise,
)
from experiments.effects import effects_figure
from experiments.paired import Interval, difference, holm, interval, over_probes
from experiments.reproduce import PARTS, ReproduceConfig, open_study
from experiments.scales import SCALES
from experiments.study import STORIES, Study, kind_and_seed, measures
from vsae_jax import runs
from vsae_jax.config import cli
from vsae_jax.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_a_figure_of_effects_says_which_side_is_better():
    seeds = {seed: float(seed) for seed in range(3)}
    of = dict.fromkeys(("alive", "decoder_cosine"), difference(seeds, seeds))
    figure = effects_figure({"topk_noise": of}, "against topk")
    sides = {ax.get_title(): ax.get_xlabel() for ax in figure.axes}
    assert sides == {"alive": "better →", "nearest cosine": "← better"}


def test_the_map_of_norms_has_a_colour_bar_and_no_minus_zero():
    values = iter((-0.001, -0.3, 0.1, -2.0) * len(signal_to_noise.DECODERS))
    measures = ("explained_variance", "alive", "entropy_effective_latents")
    cells = []
    for decoder in signal_to_noise.DECODERS:
        for norm in (1.0, 3.0):
            for beta in (0.0, 0.1):
                of = dict.fromkeys(measures, next(values))
                vsae = dict.fromkeys((0, 1), of)
                topk = dict.fromkeys((0, 1), dict.fromkeys(measures, 0.0))
                cells.append(signal_to_noise.Cell(norm, beta, decoder, vsae, topk))
    figure = signal_to_noise.draw(cells)
    bars = [ax for ax in figure.axes if ax.get_ylabel() == "vSAE - TopK"]
    assert len(bars) == len(signal_to_noise.DECODERS) * len(measures)
    said = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"0.00", "-0.30", "0.10", "-2.00"} <= said
    assert not {"-0", "-0.00"} & said


def test_an_interval_is_scipys():
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    low, high = stats.t.interval(
        0.95, 4, loc=statistics.fmean(values), scale=stats.sem(values)
    )
    found = interval(values)
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert found.n == 5


def test_differences_are_paired_over_the_seeds_that_both_have():
    # Seeds differ by 100, arms by 1 to 1.2: only pairs show it.
    a = {0: 1.0, 1: 101.1, 2: 201.2, 3: 7.0}
    b = {2: 200.0, 1: 100.0, 0: 0.0}
    found = difference(a, b)
    assert found.n == 3
    assert found.mean == pytest.approx(1.1)
    assert found.sign == 1
    assert difference(b, a).sign == -1


def test_a_single_seed_proves_nothing():
    found = difference({0: 5.0}, {0: 0.0})
    assert math.isnan(found.low)
    assert found.sign == 0
    assert str(found) == "+5.0000 (n=1)"
    assert difference({0: 5.0, 1: 5.0}, {0: 4.0, 1: 4.0}).sign == 0


def test_an_interval_has_two_digits_of_what_it_leaves_open():
    assert str(Interval(0.123456, 0.123, 0.1239, 5)) == "+0.12346 [+0.12300, +0.12390]"
    assert str(Interval(-217.2, -228.4, -206.0, 5)) == "-217 [-228, -206]"


def test_p_is_scipys_and_holm_is_a_step_down():
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    assert interval(values).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    # 3 p, then 2 p, then p, none below the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    unknown = [0.02, math.nan, 0.001]
    assert holm(unknown) == pytest.approx([0.02, math.nan, 0.002], nan_ok=True)


def test_noise_of_probes_is_told_from_that_of_training():
    # Three training seeds at 1, 2, 3, and two probe seeds at +- 0.1 around each.
    probes = [{s: s + sign * 0.1 for s in (1, 2, 3)} for sign in (-1, 1)]
    zero = dict.fromkeys((1, 2, 3), 0.0)
    means = {s: float(s) for s in zero}

    def of(probe):
        return difference(means if probe is None else probes[probe], zero)

    found = over_probes(of, range(2))
    assert found.probe_sd == pytest.approx(math.sqrt(0.02))
    assert found.noise == "1 / 0.14"
    assert str(found) == str(of(None))
    assert over_probes(of, range(1)).noise == ""
    del probes[1][3]
    assert over_probes(of, range(2)) == of(None)


def test_too_few_probe_seeds_are_refused(capsys):
    argv = ["reproduce", "--dry_run", "--probe_seeds=0"]
    assert cli.run(reproduce.command, ReproduceConfig, argv) == 2
    assert "--probe_seeds=0 must be at least 1" in capsys.readouterr().err


def test_metrics_of_texts_are_those_of_each_probe_seed_and_their_mean(tmp_path):
    study = Study(SCALES["smoke"], tmp_path, labelled={})
    arms = [study.grid("g") / f"topk_seed-{seed}" for seed in (0, 1)]
    study.grid("g").mkdir(parents=True)
    names = [arm.name for arm in arms]
    (study.grid("g") / runs.GRID).write_text(json.dumps({"arms": names}))
    for arm in arms:
        for name, seeds in (("core", ()), ("tpp", (42, 43)), ("scr", (42, 43, 44))):
            of = {str(s): {"metrics": {name: s}, "per_set": {}} for s in seeds}
            result = {"metrics": {name: 9.0}} | ({"per_seed": of} if seeds else {})
            path = arm / runs.EVALS / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
    assert study.probes("g", "core") == range(0)
    assert study.probes("g", "core,scr,tpp") == range(2)
    means = study.metrics("g", "core,scr,tpp")["topk"]
    second = study.metrics("g", "core,scr,tpp", 1)["topk"]
    assert means == dict.fromkeys((0, 1), {"core": 9, "scr": 9, "tpp": 9})
    assert second == dict.fromkeys((0, 1), {"core": 9, "scr": 43, "tpp": 43})


def test_a_long_table_is_a_file_beside_the_report(tmp_path):
    long = [["arm", "value"], *([f"a{i}", "**1**"] for i in range(13))]
    short = [["arm"], ["b"]]
    section = report.Section("All arms", "", "", [long, short])
    report.write(tmp_path / "report", "t", "s", [section])
    text = (tmp_path / "report.md").read_text()
    assert "[tables/all_arms_1.csv](tables/all_arms_1.csv): 13 rows." in text
    assert "a12" not in text
    assert "| b |" in text
    lines = (tmp_path / "tables/all_arms_1.csv").read_text().splitlines()
    assert lines[:2] == ["arm,value", "a0,1"]
    assert len(lines) == 14


UP, DOWN = Interval(1, 0.5, 1.5, 3), Interval(-1, -1.5, -0.5, 3)
FLAT = Interval(0.1, -1, 1.2, 3)


@pytest.mark.parametrize(
    ("ours", "sign", "said"),
    [
        ({"a": UP, "b": UP}, 1, "holds"),
        ({"a": UP, "b": FLAT}, 1, "holds only for a"),
        ({"a": UP, "b": DOWN}, -1, "holds only for b"),
        ({"a": DOWN, "b": FLAT}, 1, "does not hold"),
        ({"a": FLAT}, 1, "not shown"),
        ({"a": FLAT, "b": FLAT}, 0, "holds"),
        ({"a": UP}, 0, "does not hold"),
        ({"a": Interval(0.1, math.nan, math.nan, 1)}, 0, "not shown"),
    ],
)
def test_verdicts(ours, sign, said):
    assert claims.verdict(ours, sign) == said


def test_leaving_out_is_the_negative_of_adding():
    added = claims.negative(Interval(-2.0, -3.0, -1.0, 4))
    assert added == Interval(2.0, 1.0, 3.0, 4)
    assert added.sign == 1


def of_cross(alive) -> dict:
    """Metrics of a full cross: `alive(setting as a dict, seed)`."""
    import itertools

    found = {}
    for setting in itertools.product(*cross.SWITCHES.values()):
        named = dict(zip(cross.SWITCHES, setting, strict=True))
        found[setting] = {s: {"alive": alive(named, s)} for s in range(3)}
    return found


def test_a_main_effect_of_the_cross_is_what_was_put_in():
    found = of_cross(
        lambda on, seed: (
            100.0 + seed - 30 * (on["noise"] == "1") - 7 * (on["penalty"] == "kl")
        )
    )
    assert cross.effect(found, "noise", "1", "alive").mean == pytest.approx(-30)
    assert cross.effect(found, "noise", "learned", "alive").mean == pytest.approx(0)
    assert cross.effect(found, "penalty", "kl", "alive").mean == pytest.approx(-7)


def test_an_interaction_is_seen_where_it_is():
    found = of_cross(
        lambda on, seed: 100.0 - 40 * (on["noise"] == "1" and on["penalty"] == "kl")
    )
    for penalty, change in (("kl", -40), ("none", 0)):
        where = {"penalty": penalty}
        effect = cross.effect(found, "noise", "1", "alive", where)
        assert effect.mean == pytest.approx(change)


def test_equal_alive_latents_are_on_topks_curve():
    """A curve of log2(alive) / 10: an arm above it by 0.05 gains that."""

    def arm(alive: float, more: float = 0.0) -> dict:
        value = math.log2(alive) / 10 + more
        return {s: {"alive": alive, "explained_variance": value + s} for s in range(3)}

    found = {"topk": arm(512), "topk_d-64": arm(64), "vsae": arm(200, 0.05)}
    gain = questions.at_equal_alive(found, "vsae")["explained_variance"]
    assert gain.mean == pytest.approx(0.05, abs=0.003)
    found["vsae"] = arm(30)
    assert questions.at_equal_alive(found, "vsae") == {}


def test_kinds_that_sample_or_have_a_kl_are_variational():
    assert not questions.is_variational("topk")
    assert not questions.is_variational("topk_auxk")
    assert not questions.is_variational("vsae_k-16")
    for kind in ("topk_noise", "topk_kl", "vsae", "vsae_no_noise", "vsae_l1"):
        assert questions.is_variational(kind), kind


def test_every_arm_of_the_ablation_differs_from_its_base_in_one_switch():
    base = {"topk": {"relu": True}, "vsae": {}}
    for kind, fields in ablation.KINDS.items():
        name = kind.split("_")[0]
        changed = {
            field
            for field, value in fields.items()
            if (base[name] | ablation.KINDS[name]).get(field) != value
        }
        # A penalty and the number that goes with it are one switch; so are a learned
        # variance and the noise that it is of.
        together = {"penalty", "beta"}, {"noise_std", "variance"}
        together += ({"penalty", "beta", "kl_over"},)
        assert len(changed) <= 1 or changed in together, kind


def test_measures_are_of_alive_latents_and_of_no_chosen_number():
    result = {
        "metrics": {f"scr_metric_threshold_{n}": n / 10 for n in (2, 5, 10, 20, 50)},
        "per_latent": {
            "feature_density": [0.1, 0.0, 0.2],
            "max_decoder_cosine_sim": [0.5, 1.0, 0.7],
        },
    }
    found = measures(result)
    assert found["alive"] == 2
    assert found["decoder_cosine"] == pytest.approx(0.6)
    assert found["scr"] == pytest.approx(1.74)
    assert "tpp" not in found


def test_names_of_arms():
    assert kind_and_seed("vsae_beta-0.01_seed-12") == ("vsae_beta-0.01", 12)
    with pytest.raises(ValueError, match="_seed-N"):
        kind_and_seed("topk")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Tim had a dog. He ran.", ("dog", "boy")),
        ("Sue had a cat. Her cat and she, and he.", ("cat", "girl")),
        ("Sue and her dog saw a cat.", None),
        ("A bird. She saw him.", None),
        ("The dogs of him.", None),
        ("A dog.", None),
    ],
)
def test_labels_of_stories(text, found):
    assert labels.labels_of(text) == found


def test_labelled_stories_are_written_once(tmp_path):
    stories = [
        f"{hero} had a {a} {n}."
        for n in range(30)
        for a in labels.ANIMALS
        for hero in ("She", "He")
    ]
    path = labels.write(tmp_path / "texts" / "stories.jsonl", stories, most=26)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 26 * 6
    assert {row["hero"] for row in rows} == {"girl", "boy"}
    labels.write(path, [], most=26)
    with pytest.raises(UserError, match="too few texts"):
        labels.write(tmp_path / "none.jsonl", stories[:60], most=26)


def test_texts_set_aside_are_not_labelled_and_nothing_is_read_ahead():
    assert list(labels.all_but_last("abcd", 2)) == ["a", "b"]
    assert list(labels.all_but_last("ab", 0)) == ["a", "b"]
    assert not list(labels.all_but_last("ab", 3))
    endless = labels.all_but_last(itertools.repeat("a"), 2)
    assert next(endless) == "a"


def test_primary_outcomes_stand_beside_those_of_other_scales(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    here, there = (Study(SCALES[n], tmp_path / n, {}) for n in ("smoke", "standin"))
    found = difference({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.0, 1: 0.0, 2: 0.0})
    told = [
        primary._line(primary.Outcome(question, "x - y", found), p)
        for question, p in (("A?", 0.01), ("B?", 0.2))
    ]
    told.append(primary._line(primary.Outcome("C?", "x - y", None)))
    assert [line["says"] for line in told] == ["more", "not shown", "-"]
    assert told[2]["here"] == "not measured" and told[2]["p (Holm)"] == "-"
    for study in (here, there):
        study.out.mkdir()
        kept.keep(study, primary.FILE, told)
    (scale,) = kept.elsewhere(here, primary.FILE).items()
    assert scale[0] == "standin" and list(scale[1]) == ["A?", "B?", "C?"]
    beside = primary._beside(scale[1], told[0])
    assert beside == f"{found}, p 0.01 (as here)"
    assert "(there: not shown)" in primary._beside({"A?": told[1]}, told[0])
    assert primary._beside({}, told[0]) == "-"
    assert primary._beside(scale[1], told[2]) == "-"


def test_the_page_escapes_and_needs_nothing_else(tmp_path):
    figure = tmp_path / "figures" / "one.svg"
    figure.parent.mkdir()
    figure.write_text("<svg/>")
    section = report.Section(
        "<T>", "a < b", "", ["`x` & y", [["h"], ["**+1**"]], figure], "cmd --x"
    )
    report.write(tmp_path / "report", "Title", "* one\n* two", [section])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;T&gt;" in page and "a &lt; b" in page
    assert "<code>x</code> &amp; y" in page and "<td><b>+1</b></td>" in page
    assert (
        "data:image/svg+xml;base64," in page and "http" not in page.split("</head>")[1]
    )
    assert "![one](figures/one.svg)" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("scale", list(SCALES))
def test_the_plan_of_every_scale(scale, tmp_path, capsys):
    """Counts every grid once, writes nothing, needs neither hub nor GPU."""
    out = tmp_path / "out"
    given = {"model": "m", "dataset": "d.jsonl"} if scale in ("real", "large") else {}
    argv = ["reproduce", f"--scale={scale}", "--dry_run", f"--out={out}"]
    argv += [f"--{name}={value}" for name, value in given.items()]
    assert cli.run(reproduce.command, ReproduceConfig, argv) == 0
    text = capsys.readouterr().out
    study = open_study(ReproduceConfig(scale=scale, out=str(out), **given))
    arms = {n: a for part in PARTS.values() for n, a in part.grids(study).items()}
    total = sum(map(len, arms.values()))
    assert f"| all | {total:,} |" in text
    assert not out.exists()


def test_the_real_scale_asks_for_a_model_and_a_text(capsys):
    argv = ["reproduce", "--scale=real", "--dry_run", "--model=m"]
    assert cli.run(reproduce.command, ReproduceConfig, argv) == 2
    assert "--scale=real needs --dataset" in capsys.readouterr().err


def test_the_plan_counts_steps_and_operations(tmp_path):
    study = open_study(ReproduceConfig(scale="smoke", out=str(tmp_path / "out")))
    grid = signal_to_noise.grids(study)[signal_to_noise.GRID]
    c = SCALES["smoke"].controlled
    needs = plan.of_grid(study, grid)
    arms = len(c.norms) * 2 * (1 + len(c.map_betas)) * len(c.map_lrs) * c.map_seeds
    assert needs.arms == arms == len(grid)
    assert needs.steps == arms * c.map_steps
    products = 12 * 128 * c.d_sae * c.batch_size
    assert needs.operations == needs.steps * products


def test_a_look_trains_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["reproduce", "--only=stability,claims", "--only_look", f"--out={out}"]
    assert cli.run(reproduce.command, ReproduceConfig, argv) == 0
    assert "nothing is trained of: stability, claims" in capsys.readouterr().out
    assert "##" not in (out / "report_stability_claims.md").read_text()
    assert not (out / "grids").exists()


def test_a_look_at_what_was_only_begun_leaves_it_out(tmp_path, capsys):
    parts = "signal_to_noise,ablation,questions,claims,primary,stability"
    out = tmp_path / "out"
    for grid in ("signal_to_noise", "ablation"):
        (out / "grids" / grid / "topk_seed-0").mkdir(parents=True)
        runs.write_json(
            out / "grids" / grid / runs.GRID,
            {"swept": ["seed"], "arms": [{"folder": "topk_seed-0", "seed": 0}]},
        )
    argv = ["reproduce", f"--only={parts}", "--only_look", f"--out={out}"]
    assert cli.run(reproduce.command, ReproduceConfig, argv) == 0
    assert capsys.readouterr().out.count("left out: ") >= 4


def test_an_unknown_part_is_named(capsys):
    argv = ["reproduce", "--only=fig99"]
    assert cli.run(reproduce.command, ReproduceConfig, argv) == 2
    assert "--only=fig99 is not a part; there is signal_to_noise" in (
        capsys.readouterr().err
    )


@pytest.mark.study
def test_smoke_runs_whole_and_again_from_what_is_there(tmp_path, monkeypatch, capsys):
    """The study at its smallest: every part's section, table and figure; the second
    run trains and evaluates nothing and says the same."""
    out = tmp_path / "smoke"
    flags = ["--scale=smoke", f"--out={out}"]
    command = [sys.executable, "-m", "experiments.reproduce", *flags]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "=== training" in first.stdout
    text = (out / "report.md").read_text()
    for title in (
        "Three questions",
        "The paper's claims",
        "Signal to noise",
        "Figure 3",
    ):
        assert f"## {title}" in text
    assert text.count("## ") == len(PARTS)
    pictures = {path.name for path in (out / "figures").iterdir()}
    assert {"signal_to_noise.svg", "ablation_vsae.svg", "ground_truth.svg"} <= pictures
    grids = out / "grids"
    for arm in runs.run_folders(grids / "ablation"):
        found = runs.read_json(arm / "evals" / "scr.json")
        assert found["metrics"], arm
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    assert cli.run(reproduce.command, ReproduceConfig, ["reproduce", *flags]) == 0
    again = capsys.readouterr().out
    assert "=== training" not in again and "=== evaluating" not in again
    assert (out / "report.md").read_text() == text
    assert STORIES.is_file()
