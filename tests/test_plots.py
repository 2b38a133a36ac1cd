"""Figures: the data of their axes against the files that they are drawn from."""

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_arms import KS, NS, make_arms, write_features
from tiny_runs import D_SAE, call, copied

import vsae_jax
from vsae_jax import runs
from vsae_jax.latents import map_statistics
from vsae_jax.report.figures import features, histograms, lines, maps, style, training
from vsae_jax.runs import series
from vsae_jax.system.errors import UserError


@pytest.fixture
def arms(tiny_rows, tmp_path):
    return make_arms(tmp_path / "grid", tiny_rows)


@pytest.fixture
def styled():
    with style.applied():
        yield


def write_eval(arm, name: str, metrics: dict) -> None:
    folder = arm.folder / "evals"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"metrics": metrics, "config": {}}))


def the_only(drawn):
    ((_, figure),) = drawn
    return figure


def bands(ax) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lowest and highest y at each x of every band."""
    found = []
    for band in ax.collections:
        x, y = band.get_paths()[0].vertices.T
        places = np.unique(x)
        found.append(
            (
                np.array([y[x == place].min() for place in places]),
                np.array([y[x == place].max() for place in places]),
            )
        )
    return found


def test_core_lines_are_means_over_seeds_and_bands_go_from_seed_to_seed(arms, styled):
    score = {}
    for number, arm in enumerate(arms):
        score[arm.folder] = 0.5 + 0.01 * number**2
        names = ("explained_variance", "cossim", "frac_alive")
        metrics = dict.fromkeys(names, 0.1) | {"ce_loss_score": score[arm.folder]}
        write_eval(arm, "core", metrics)
    ax = the_only(lines.draw("core", arms)).axes[0]
    assert [line.get_label() for line in ax.lines] == ["topk", "vsae_topk"]
    assert ax.get_xlabel() == "k, latents kept per token"
    for variant, line, band in zip(("topk", "vsae_topk"), ax.lines, bands(ax)):
        assert line.get_xdata().tolist() == list(KS)
        assert line.get_color() == style.VARIANTS[variant]
        for place, k in enumerate(KS):
            values = [
                score[arm.folder]
                for arm in arms
                if arm.settings["variant"] == variant and arm.settings["k"] == k
            ]
            assert len(values) == 2
            assert line.get_ydata()[place] == pytest.approx(np.mean(values))
            assert (band[0][place], band[1][place]) == (min(values), max(values))


def test_scr_is_over_the_number_of_ablated_latents_and_has_gaps(arms, styled):
    for arm in arms:
        seed, k = arm.settings["seed"], arm.settings["k"]
        metrics = {f"scr_metric_threshold_{n}": n + 10 * k + seed for n in NS}
        metrics |= {f"scr_dir{d}_threshold_{n}": d * n for d in (1, 2) for n in NS}
        metrics["scr_metric_threshold_5"] = None if seed else 7.0
        metrics["scr_metric_threshold_10"] = None
        write_eval(arm, "scr", metrics)
    figure = the_only(lines.draw("scr", arms))
    assert [ax.get_xlabel() for ax in figure.axes] == ["number of ablated latents"] * 3
    first, _, last = figure.axes
    assert len(first.lines) == 4
    assert {line.get_linestyle() for line in first.lines} == {"-", "--"}
    for line, (shared, _) in zip(first.lines, series.series_of(arms).items()):
        k = dict(shared)["k"]
        assert line.get_xdata().tolist() == [2, 5, 500]
        expected = [2 + 10 * k + 0.5, 7.0, 500 + 10 * k + 0.5]
        np.testing.assert_allclose(line.get_ydata(), expected)
    np.testing.assert_allclose(last.lines[0].get_ydata(), [2 * n for n in NS])
    ticks = [tick.get_text() for tick in first.get_xticklabels()]
    assert ticks == ["2", "5", "500"]


def test_tpp_quotients_leave_out_what_has_no_denominator(arms, styled):
    for arm in arms:
        metrics = {}
        for n, (intended, unintended) in zip(NS, [(0.1, 0.0), (0.2, 0.05), (0.3, 0.1)]):
            metrics[f"tpp_threshold_{n}_total_metric"] = intended - unintended
            metrics[f"tpp_threshold_{n}_intended_diff_only"] = intended
            metrics[f"tpp_threshold_{n}_unintended_diff_only"] = unintended
        write_eval(arm, "tpp", metrics)
    axes = the_only(lines.draw("tpp", arms)).axes
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), [0.1, 0.15, 0.2])
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), [0.0, 0.05, 0.1])
    assert axes[3].lines[0].get_xdata().tolist() == [5, 10]
    np.testing.assert_allclose(axes[3].lines[0].get_ydata(), [4, 3])


def test_sparse_probing_has_the_language_models_level(arms, styled):
    for arm in arms:
        sae = {f"sae_top_{n}_test_accuracy": 0.1 * n for n in (1, 2, 5)}
        llm = {"sae_test_accuracy": 0.9, "llm_test_accuracy": 0.95}
        write_eval(arm, "sparse_probing", sae | llm)
    axes = the_only(lines.draw("sparse_probing", arms)).axes
    for ax, accuracy in zip(axes, (0.1, 0.2, 0.5, 0.9)):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), accuracy)
        np.testing.assert_allclose(ax.lines[-1].get_ydata(), 0.95)


def test_maximum_activations_are_not_clipped(arms, styled):
    for arm in arms:
        most = np.linspace(0, 400, D_SAE)
        most[arm.settings["seed"]] = 0
        write_features(arm.folder, max_activation=most)
    figure = the_only(histograms.max_activations(arms))
    assert len(figure.axes) == 4
    for ax in figure.axes:
        (stairs,) = ax.patches[:1]
        counts, edges, _ = stairs.get_data()
        assert counts.sum() == (D_SAE - 1 + D_SAE - 2) / 2
        assert edges[-1] > 400 and edges[0] > 0
        assert ax.get_xscale() == ax.get_yscale() == "log"
        assert f"fire at all          {D_SAE - 1} ± 0" in ax.texts[0].get_text()


@pytest.fixture(scope="module")
def mapped(tiny_rows, tmp_path_factory):
    arms = make_arms(tmp_path_factory.mktemp("mapped") / "grid", tiny_rows)
    for arm in arms:
        write_features(arm.folder)
    run = {"run": arms[0].folder.parent, "clusters": 3, "min_rate": 0, "samples": 200}
    assert call("tsne", **run) == 0
    return arms


def test_the_four_panels_show_the_map(mapped, styled):
    drawn = dict(maps.panels(mapped))
    assert len(drawn) == 4 and "maps_vsae_topk_k-4" in drawn
    of = maps.read_map(mapped[0])
    figure = drawn["maps_topk_k-2"]
    assert figure.get_suptitle().startswith("topk, k 2, seed 0: ")
    for ax in figure.axes[:3]:
        np.testing.assert_allclose(
            ax.collections[0].get_offsets(), of.arrays["embedding"]
        )
    sizes = figure.axes[2].collections[0].get_sizes()
    np.testing.assert_allclose(sizes, 100 * of.arrays["firing_rate"] + 10)
    cluster, rate = of.arrays["cluster"], of.arrays["firing_rate"]
    bars = [bar.get_height() for bar in figure.axes[3].patches]
    np.testing.assert_allclose(bars, [rate[cluster == c].mean() for c in range(3)])


def test_cosines_are_those_of_the_decoder(mapped, styled):
    figure = the_only(maps.cosines(mapped))
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.diag(image), 1, atol=1e-6)
    of = [maps.read_map(arm) for arm in mapped[:2]]
    pairs, nearest = figure.axes[-2:]
    shares = [m.arrays["cosine_counts"] / m.arrays["cosine_counts"].sum() for m in of]
    mean = np.mean(shares, axis=0)
    np.testing.assert_allclose(pairs.lines[0].get_ydata(), mean[mean > 0])
    level = np.mean([m.metrics["nn_cosine_random"] for m in of])
    assert nearest.lines[1].get_xdata()[0] == pytest.approx(level)


@pytest.fixture
def maximised(arms):
    tokens = ["<|endoftext|>", "$x^2$", "\x07\n", "$", "漢"]
    sequence = {"tokens": tokens, "activations": [0, 0, 3.5, 0, 50.0]}
    for arm in arms[:2]:
        write_features(arm.folder)
        (arm.folder / "maximised").mkdir()
        found = {"latent": 7, "synthetic": sequence, "real": sequence}
        (arm.folder / "maximised" / "7.json").write_text(json.dumps(found))
    return arms


def test_a_feature_page_shows_odd_tokens_as_they_are(maximised, styled, tmp_path):
    drawn = dict(features.pages(maximised))
    assert list(drawn) == ["feature_arm-0_7", "feature_arm-1_7"]
    figure = drawn["feature_arm-0_7"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "$x^2$" in texts and "\\x07↵" in texts and "\\u6f22" in texts
    assert "synthetic 50" in texts and "top 1 5" in texts and "top 2 0" not in texts
    assert len(figure.axes[0].patches) == 2 + 2 + 3
    svg, png = style.save(figure, tmp_path / "page")
    assert "$x^2$" in svg.read_text() and png.stat().st_size > 10_000


def test_the_command_writes_both_files_the_same_each_time(mapped, tmp_path):
    run = mapped[0].folder.parent
    for out in ("one", "two"):
        flags = {"run": run, "figures": "max_activations", "out": tmp_path / out}
        assert call("plots", **flags) == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"max_activations.svg", "max_activations.png"}
    for name in names:
        same = (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() == same
    svg = (tmp_path / "one" / "max_activations.svg").read_text()
    assert "maximum activation (units of the scaled input)" in svg


def test_what_there_are_no_files_for_is_left_out_and_said(arms, capfd):
    for arm in arms:
        write_features(arm.folder)
    grid = arms[0].folder.parent
    assert call("plots", run=grid) == 0
    out = capfd.readouterr().out
    for name, command in (("scr", "evaluate --evals=scr"), ("maps", "tsne")):
        assert f"{name} is left out: " in out
        assert f"python -m vsae_jax.{command} --run={arms[0].folder}" in out
    names = {path.name for path in (grid / "figures").iterdir()}
    assert names == {"max_activations.svg", "max_activations.png"}


def test_svg_keeps_the_spaces_of_its_texts(maximised, styled, tmp_path):
    figure = dict(features.pages(maximised))["feature_arm-0_7"]
    svg, _ = style.save(figure, tmp_path / "page")
    root = ElementTree.parse(svg).getroot()
    space = "{http://www.w3.org/XML/1998/namespace}space"
    # A formula, such as 10^2, is a text without words of its own.
    texts = [n for n in root.iter("{http://www.w3.org/2000/svg}text") if n.text.strip()]
    assert {" w6", " w7"} <= {node.text for node in texts}
    assert {node.get(space) for node in texts} == {"preserve"}


def test_a_title_does_not_lie_over_a_legend(arms, maximised, styled):
    for arm in arms:
        write_eval(arm, "core", {"ce_loss_score": 0.9, "explained_variance": 0.8})
    figure = the_only(lines.draw("core", arms))
    style.title(figure, "preset and layer: paper-2")
    assert figure.get_suptitle() == ""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [legend.get_title(), *legend.get_texts(), figure.axes[0].title]
    boxes = [text.get_window_extent() for text in boxes]
    assert boxes[0].y0 >= max(box.y1 for box in boxes[1:3])
    assert min(box.y0 for box in boxes[1:3]) >= boxes[3].y1
    page = dict(features.pages(maximised))["feature_arm-0_7"]
    named = page.get_suptitle()
    style.title(page, "paper-2")
    assert page.get_suptitle() == f"{named} (paper-2)" and "latent 7" in named


@pytest.mark.parametrize("same", [1, 2])
def test_scr_of_one_direction_has_no_second_panel_of_it(arms, styled, same):
    for arm in arms:
        scores = {1: {n: 0.1 * n + arm.settings["seed"] for n in NS}}
        scores[2] = {n: -s for n, s in scores[1].items()}
        metrics = {
            f"scr_dir{d}_threshold_{n}": s
            for d, found in scores.items()
            for n, s in found.items()
        }
        metrics |= {f"scr_metric_threshold_{n}": s for n, s in scores[same].items()}
        write_eval(arm, "scr", metrics)
    axes = the_only(lines.draw("scr", arms)).axes
    titles = [ax.get_title() for ax in axes]
    assert titles == [f"SCR = direction {same}", f"Direction {3 - same}"]


@pytest.mark.parametrize(
    "seeds, ks, caption",
    [
        ((0,), (2,), "Dot: one seed."),
        ((0,), (2, 4), "Line: one seed."),
        ((0, 1), (2,), "Dot: mean of 2 seeds. Bar: lowest to highest seed."),
        ((0, 1), (2, 4), "Line: mean of 2 seeds. Band: lowest to highest seed."),
    ],
)
def test_the_caption_says_what_is_drawn(arms, styled, seeds, ks, caption):
    some = [a for a in arms if a.settings["seed"] in seeds and a.settings["k"] in ks]
    for arm in some:
        score = 0.5 + 0.1 * arm.settings["seed"]
        write_eval(arm, "core", {"ce_loss_score": score})
    figure = the_only(lines.draw("core", some))
    assert figure.get_supxlabel() == caption
    if len(ks) == 1 < len(seeds):
        ends = figure.axes[0].collections[0].get_segments()[0][:, 1]
        np.testing.assert_allclose(ends, [0.5, 0.6])


@pytest.mark.parametrize("high, expected", [(20.0, [1, 2, 5, 10, 20]), (1e4, None)])
def test_labels_of_a_log_axis_do_not_run_together(styled, high, expected):
    figure = style.figure(3.0, 2.0)
    ax = figure.subplots()
    ax.set(xscale="log", xlim=(1, high))
    style.plain_log(ax.xaxis)
    figure.draw_without_rendering()
    shown = [t for t in ax.get_xticklabels() if 1 <= t.get_position()[0] <= high]
    boxes = sorted(t.get_window_extent().extents.tolist() for t in shown)
    assert all(left[2] < right[0] for left, right in zip(boxes, boxes[1:]))
    found = [float(t.get_text()) for t in shown]
    assert found == (expected or [1, 10, 100, 1000, 1e4])


def test_ten_clusters_have_ten_colours_and_twelve_two_kinds_of_dots(mapped, styled):
    of = maps.read_map(mapped[0])
    n = len(of.arrays["cluster"])
    for count in (10, 12):
        cluster = np.arange(n) % count
        changed = of._replace(arrays={**of.arrays, "cluster": cluster})
        axes = maps.draw_panels(changed, title="x").axes
        dots = axes[0].collections
        assert sum(len(d.get_offsets()) for d in dots) == n
        looks = {(i, *c) for i, d in enumerate(dots) for c in d.get_facecolors()}
        assert len(looks) == count
        # On each, the black number stands out: WCAG's contrast of 3 and more.
        assert all(contrast_with_black(look[1:4]) > 3 for look in looks)
        names = [tick.get_text() for tick in axes[3].get_xticklabels()]
        assert names == [f"{c}\n{size}" for c, size in enumerate(np.bincount(cluster))]


def contrast_with_black(rgb) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) / 0.05


def test_a_figure_that_was_asked_for_is_not_left_out(arms, capfd):
    assert call("plots", run=arms[0].folder.parent, figures="tpp") == 2
    assert "vsae_jax.evaluate --evals=tpp" in capfd.readouterr().err


def test_a_lone_run_is_drawn(tiny_run, tmp_path):
    run = copied(tiny_run, tmp_path / "run")
    (arm,) = series.open_arms(run)
    write_eval(arm, "core", {"ce_loss_score": 0.9, "explained_variance": 0.8})
    assert call("plots", run=run) == 0
    assert (run / "figures" / "core.svg").is_file()


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"figures": "umap"}, "--figures=umap is not known; there is training, core"),
        ({"run": ""}, "--run is not set"),
        ({"run": "nowhere"}, "--run=nowhere is not a folder"),
        ({}, "has no files to draw figures from yet"),
    ],
)
def test_mistakes_are_one_line(tiny_run, tmp_path, flags, said, capfd):
    run = copied(tiny_run, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert call("plots", **{"run": run} | flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line


def test_the_training_of_a_grid_is_a_row_of_curves(tiny_grid):
    arms = series.open_arms(tiny_grid)
    figure = the_only(training.draw(arms))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["Loss", "Explained variance", "Dead latents"]
    last = [runs.read_metrics(a.folder / runs.METRICS)[-1] for a in arms]
    drawn = [line.get_ydata()[-1] for line in figure.axes[1].get_lines()]
    assert drawn == [line["explained_variance"] for line in last]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(arms)


def test_a_history_is_plotted(tiny_run):
    history = runs.read_history(tiny_run / runs.METRICS)
    several = history | {"step": np.array([10, 20])}
    several |= {n: np.array([2.0, 1.0]) for n in ("loss", "dead_fraction")}
    several["explained_variance"] = np.array([0.1, 0.9])
    figure = vsae_jax.plot_training({"one": several, "other": several})
    one, other = figure.axes[1].get_lines()
    assert one.get_xdata().tolist() == [10, 20]
    assert one.get_ydata().tolist() == [0.1, 0.9]
    assert one.get_color() != other.get_color()
    assert figure.axes[0].get_yscale() == "log" and len(figure.legends) == 1
    for alone in (history, tiny_run):
        (point,) = vsae_jax.plot_training(alone).axes[2].get_lines()
        assert point.get_ydata().tolist() == history["dead_fraction"].tolist()


def test_the_band_of_a_curve_is_over_seeds(tiny_run):
    history = runs.read_history(tiny_run / runs.METRICS)
    seeds = [history | {"loss": np.array([loss])} for loss in (1.0, 3.0)]
    figure = training.curves_of([(seeds, "topk", {"color": "red"})])
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [2.0]
    assert "lowest to highest seed" in figure.get_supxlabel()


def test_without_matplotlib_it_names_the_extra(tiny_run, monkeypatch, capfd):
    for name in [n for n in sys.modules if n.startswith("vsae_jax.report.figures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("plots", run=tiny_run) == 2
    said = capfd.readouterr().err
    assert "pip install matplotlib (" in said and "pip install -e '.[analysis]'" in said
    with pytest.raises(UserError, match=r"pip install matplotlib \("):
        vsae_jax.plot_training(tiny_run)


@pytest.mark.parametrize(
    "text, shown",
    [
        (" the", " the"),
        ("a\nb\tc", "a↵b→c"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("é€я", "é€я"),
        ("漢🦆", "\\u6f22\\U0001f986"),
    ],
)
def test_drawable(text, shown):
    assert style.drawable(text) == shown


def test_labels_and_spreads():
    shared = [("variant", "topk"), ("k", 64), ("beta", 0.1)]
    assert series.label(shared) == "topk, k 64, beta 0.1"
    assert series.label([("variant", "mine"), ("k", None)]) == "mine"
    assert series.spread([1.0, 3.0]) == "2.0000 ± 1.4142"
    assert series.spread([10.0]) == "10.0"
    assert series.spread([10.0, 13.0], digits=0) == "12 ± 2"
    assert series.spread([1.0, None]) == series.spread([]) == "-"


def test_series_of_other_grids_stay_apart(tiny_grid):
    found = series.open_arms(tiny_grid)
    labels = [series.label(s) for s in series.series_of(found)]
    assert labels == [
        f"{variant}, k 4, beta {beta}"
        for variant in ("topk", "vsae_topk")
        for beta in (0.0, 2.0)
    ]
    assert len(set(style.colours(labels).values())) == 4


def test_the_papers_range_is_in_the_caption():
    assert f"[0, {map_statistics.PAPER_RANGE[1]}]" in histograms.CAPTION
