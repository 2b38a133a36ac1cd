"""Labelled texts from file to table: reading, sampling, encoding, the real command."""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_stories
from tiny_runs import call, copied

from vsae_jax import lm, runs
from vsae_jax.autoencoder import sae
from vsae_jax.config import EvalConfig
from vsae_jax.evals import Subject, encoding, first_letter, hub_sets, labelled, sampling
from vsae_jax.evals import on_texts as texts
from vsae_jax.evals.probes import Recipe, adam, fit, fit_outputs
from vsae_jax.evals.quirks import Quirks
from vsae_jax.evals.sampling import Sample
from vsae_jax.system.errors import UserError

pytest.importorskip("sklearn")

LABELS, SIGNS = ("cat", "dog", "owl"), (1, 5)
SIZES = {"train_size": 40, "test_size": 16}


def rows(count: int = 120) -> list[dict]:
    """Stories that begin with their label and end with their attribute."""
    made = []
    for i, story in enumerate(make_stories(count)):
        label, sign = LABELS[i % 3], SIGNS[i // 3 % 2]
        mood = "sad" if sign == 1 else "happy"
        text = f"{label} {label} {story} {mood} {mood}"
        made.append({"story": text, "animal": label, "stars": sign})
    return made


def write(path, lines: list) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("labelled") / "animals.jsonl", rows())


@pytest.fixture(scope="module")
def flags(stories) -> dict:
    columns = {"text_column": "story", "label_column": "animal"}
    return {"labelled": stories, "attribute_column": "stars", **columns, **SIZES}


@pytest.fixture(scope="module")
def evaluated(tiny_grid, flags, tmp_path_factory):
    """A grid after all evaluations."""
    folder = copied(tiny_grid, tmp_path_factory.mktemp("evaluated") / "grid")
    evals = "core,sparse_probing,scr,tpp,absorption"
    assert call("evaluate", run=folder, evals=evals, saebench_json=True, **flags) == 0
    return folder


def results(folder, name: str) -> dict:
    return json.loads((folder / "evals" / f"{name}.json").read_text())


def test_every_evaluation_writes_its_file_in_every_arm(evaluated):
    for arm in runs.run_folders(evaluated):
        for name in ("core", "sparse_probing", "scr", "tpp", "absorption"):
            result = results(arm, name)
            detail = {"core": "per_latent", "absorption": "per_letter"}
            assert {"metrics", "config"} <= result.keys()
            assert detail.get(name, "per_class") in result
            assert (result["metrics"] == {}) is (name == "absorption")
        assert "need" in results(arm, "absorption")["reason"]


def test_metrics_have_saebenchs_names(evaluated):
    arm = runs.run_folders(evaluated)[0]
    probing = results(arm, "sparse_probing")
    assert {"sae_top_1_test_accuracy", "llm_top_5_test_accuracy"} <= probing[
        "metrics"
    ].keys()
    assert set(probing["per_class"]["animals"]) == set(LABELS)
    assert {"scr_metric_threshold_2", "scr_dir2_threshold_20"} <= results(arm, "scr")[
        "metrics"
    ].keys()
    # Three labels are three pairs; d_sae is 32, so that 50 latents cannot be ablated.
    assert len(results(arm, "scr")["per_class"]["animals"]) == 3
    tpp = results(arm, "tpp")["metrics"]
    assert "tpp_threshold_20_total_metric" in tpp
    assert "tpp_threshold_50_total_metric" not in tpp


def test_the_output_says_how_much_there_was(evaluated):
    sizes = results(runs.run_folders(evaluated)[0], "scr")["config"]["sets"]["animals"]
    assert sizes["texts"] == 120
    # 40 texts a class: 20 an attribute, 4 of which test.
    assert sizes["per_class"]["cat"] == {"train": 20, "test": 8}
    assert sizes["per_quadrant"]["cat / dog"] == {"train": 8, "test": 2}


def test_a_summary_puts_arms_side_by_side(evaluated):
    text = (evaluated / "evals/summary.md").read_text()
    assert "topk, k 4, beta 0.0 (n=1)" in text
    assert "| sae_top_1_test_accuracy |" in text
    assert "Not evaluated: 0 letters" in text


def test_saebenchs_files_are_there_for_what_was_not_refused(evaluated):
    arm = runs.run_folders(evaluated)[0]
    found = {path.name for path in (arm / "evals/saebench").iterdir()}
    names = ("core", "sparse_probing", "scr", "tpp")
    assert found == {f"{name}_eval_results.json" for name in names}
    value = json.loads((arm / "evals/saebench/tpp_eval_results.json").read_text())
    ours = results(arm, "tpp")["metrics"]["tpp_threshold_2_total_metric"]
    assert (
        value["eval_result_metrics"]["tpp_metrics"]["tpp_threshold_2_total_metric"]
        == ours
    )


def test_a_run_alone_has_the_grids_scores(evaluated, flags, tmp_path):
    arm = runs.run_folders(evaluated)[-1]
    alone = copied(arm, tmp_path / "alone")
    shutil.rmtree(alone / "evals")
    assert call("evaluate", run=alone, evals="tpp,sparse_probing", **flags) == 0
    for name in ("tpp", "sparse_probing"):
        assert results(alone, name)["metrics"] == results(arm, name)["metrics"]


def test_scores_of_several_probe_seeds_are_averaged_and_kept(
    evaluated, flags, tmp_path
):
    arm = runs.run_folders(evaluated)[0]
    folder = copied(arm, tmp_path / "seeds")
    options = flags | {"evals": "sparse_probing,scr,tpp", "probe_seeds": 2}
    assert call("evaluate", run=folder, **options) == 0
    for name in ("sparse_probing", "scr", "tpp"):
        found, one = results(folder, name), results(arm, name)
        assert found["config"]["probe_seeds"] == [42, 43]
        assert found["config"]["sets"] == one["config"]["sets"]
        first, second = (found["per_seed"][seed]["metrics"] for seed in ("42", "43"))
        assert first == one["metrics"] and first != second
        known = [n for n, value in first.items() if value is not None]
        means = {n: (first[n] + second[n]) / 2 for n in known}
        assert {n: found["metrics"][n] for n in known} == pytest.approx(means)


def test_only_what_is_missing_is_evaluated(evaluated, flags, tmp_path, capsys):
    grid = copied(evaluated, tmp_path / "grid")
    kept, lacks = runs.run_folders(grid)[:2]
    (lacks / "evals/tpp.json").unlink()
    mark = kept / "evals/tpp.json"
    mark.write_text(json.dumps(results(kept, "tpp") | {"mark": 1}))
    options = flags | {"evals": "tpp", "only_missing": True}
    assert call("evaluate", run=grid, **options) == 0
    assert results(kept, "tpp")["mark"] == 1
    expected = results(runs.run_folders(evaluated)[1], "tpp")["metrics"]
    assert results(lacks, "tpp")["metrics"] == expected
    capsys.readouterr()
    assert call("evaluate", run=grid, **options) == 0
    assert f"every arm of {grid} has tpp" in capsys.readouterr().out
    # A damaged file is none, and neither is a result without SAEBench's file.
    shutil.rmtree(lacks / "evals/saebench")
    mark.write_text("{")
    assert call("evaluate", run=grid, saebench_json=True, **options) == 0
    assert (lacks / "evals/saebench/tpp_eval_results.json").is_file()
    assert results(kept, "tpp")["metrics"]
    assert "Not alike" not in (grid / "evals/summary.md").read_text()
    assert call("evaluate", run=grid, probe_seeds=2, **options) == 0
    assert len(results(kept, "tpp")["per_seed"]) == 2
    (lacks / "evals/core.json").unlink()
    options |= {"evals": "core", "num_tokens": 160}
    assert call("evaluate", run=grid, **options) == 0
    assert "Not alike: n_tokens is " in (grid / "evals/summary.md").read_text()


def test_a_file_with_two_columns_of_labels_is_two_sets(stories):
    flags = {"labelled": f"{stories},{stories}", "text_column": "story"}
    config = EvalConfig(run="r", label_column="animal,stars", **flags)
    animals, stars = labelled.read_sets(config)
    assert (animals.name, animals.classes) == ("animals_animal", LABELS)
    assert (stars.name, stars.classes) == ("animals_stars", ("1", "5"))
    with pytest.raises(UserError, match="names a set twice; give each a column of"):
        labelled.read_sets(EvalConfig(run="r", label_column="animal", **flags))


def test_scores_do_not_depend_on_the_batch_size(tiny_run, flags, tmp_path):
    found = []
    for size in (3, 16):
        folder = copied(tiny_run, tmp_path / str(size))
        flags = flags | {"batch_size": size}
        assert call("evaluate", run=folder, evals="sparse_probing,scr", **flags) == 0
        found.append([results(folder, n)["metrics"] for n in ("sparse_probing", "scr")])
    assert found[0] == found[1]


def test_moving_the_decoders_norms_changes_nothing_but_with_the_quirk(
    tiny_run, flags, tmp_path
):
    """Rows twice as long and an encoder half as large are the same autoencoder; with
    stored norms the latents are others."""
    trained = runs.open_run(tiny_run)
    scale = 2.0 ** (np.arange(trained.sae.d_sae) % 2)
    moved = copied(tiny_run, tmp_path / "moved")
    config = runs.read_json(moved / runs.CONFIG)
    config["sae"] |= {"sparsity": "none", "relu": True}
    config["train"]["variant"] = "relu"
    arrays = {n: np.asarray(a) for n, a in trained.variables["params"].items()}
    folders = {}
    for name, factor in (("as it was", np.ones_like(scale)), ("moved", scale)):
        folder = copied(moved, tmp_path / name.replace(" ", "-") / "run")
        params: dict[str, Any] = arrays | {
            "w_enc": arrays["w_enc"] / factor,
            "b_enc": arrays["b_enc"] / factor,
            "w_dec": arrays["w_dec"] * factor[:, None],
        }
        runs.write_json(folder / runs.CONFIG, config)
        norm = trained.variables["norm"]
        runs.write_parameters(
            folder / runs.PARAMETERS, {"params": params, "norm": norm}
        )
        folders[name] = folder
    found = {}
    for quirks in ("", "stored_norms"):
        for name, folder in folders.items():
            options = flags | {"evals": "sparse_probing,tpp", "quirks": quirks}
            assert call("evaluate", run=folder, **options) == 0
            metrics = [results(folder, n)["metrics"] for n in ("sparse_probing", "tpp")]
            found[name, quirks] = metrics
            norms = results(folder, "tpp")["config"]["decoder_norms"]
            assert (norms == "1") is (name == "as it was")
    assert found["moved", ""] == found["as it was", ""]
    assert found["moved", "stored_norms"] != found["as it was", "stored_norms"]


def test_pooled_vectors_are_means_over_the_tokens_that_count(tiny_run, tiny_model):
    language_model = lm.load_language_model(str(tiny_model))
    trained = runs.open_run(tiny_run)
    trained = dataclasses.replace(
        trained, data=trained.data | {"center_residual": True}
    )
    subject = Subject(trained, language_model, np.zeros((1, 1), int), 2, {})
    tokens = [np.array(ids, np.int32) for ids in ([0, 5, 6, 7], [0, 9], [0] + [8] * 40)]
    pooled, (latents,) = encoding.encode_texts([subject], tokens, stored_norms=True)
    assert pooled.n_valid.tolist() == [3, 1, 40]
    for i, ids in enumerate(tokens):
        x = np.asarray(language_model.residual(ids[None], trained.data["layer"]))[0, 1:]
        x = x - x.mean(axis=1, keepdims=True)
        f = sae.encode(trained.variables, jnp.asarray(x), config=trained.sae)
        np.testing.assert_allclose(pooled.x[i], x.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(latents.pooled[i], f.mean(axis=0), atol=1e-4)


def test_a_text_is_cut_at_the_context_and_starts_with_bos(tiny_model):
    tokenizer = lm.load_tokenizer(str(tiny_model))
    long, short = encoding.tokenise(["cat " * 300, "cat"], tokenizer, bos=[0])
    assert len(long) == encoding.CONTEXT
    assert long[0] == short[0] == 0
    assert len(short) == 4


# Sampling


def text_set(**changes) -> labelled.TextSet:
    n = 90
    values = {
        "name": "set",
        "texts": [f"text {i}" for i in range(n)],
        "labels": np.array([LABELS[i % 3] for i in range(n)]),
        "attributes": None,
        "classes": LABELS,
        "in_test": None,
    }
    return labelled.TextSet(**values | changes)


def test_train_and_test_rows_are_apart_and_balanced():
    split = sampling.by_class(text_set(), train_size=4000, test_size=1000, seed=0)
    for name in LABELS:
        assert len(split.train[name]) == 24
        assert len(split.test[name]) == 6
        assert not set(split.train[name]) & set(split.test[name])
        assert {int(row) % 3 for row in split.train[name]} == {LABELS.index(name)}


def test_a_sets_own_test_split_is_kept():
    in_test = np.arange(90) >= 60
    split = sampling.by_class(
        text_set(in_test=in_test), train_size=4000, test_size=1000, seed=0
    )
    assert all(in_test[rows].all() for rows in split.test.values())
    assert not any(in_test[rows].any() for rows in split.train.values())


def test_a_class_that_is_too_small_is_left_out():
    labels = np.array(["cat"] * 45 + ["dog"] * 40 + ["owl"] * 5)
    split = sampling.by_class(
        text_set(labels=labels), train_size=4000, test_size=1000, seed=0
    )
    assert set(split.train) == {"cat", "dog"}


def test_one_against_the_rest_is_half_and_half():
    split = sampling.by_class(text_set(), train_size=40, test_size=10, seed=0)
    rng = sampling.generator(0, "x")
    sample = sampling.one_vs_rest(split.train, "cat", rng)
    yes = sample.rows[sample.labels == 1]
    no = sample.rows[sample.labels == 0]
    assert sorted(yes) == sorted(split.train["cat"])
    assert len(no) == len(yes) == 20
    counts = [int(np.isin(no, split.train[name]).sum()) for name in ("dog", "owl")]
    assert sorted(counts) == [10, 10]


def test_quadrants_have_q_rows_and_the_biased_ones_twice_as_many():
    attributes = np.array([str(SIGNS[i // 3 % 2]) for i in range(90)])
    split = sampling.by_quadrant(
        text_set(attributes=attributes),
        ("cat", "owl"),
        train_size=4000,
        test_size=1000,
        seed=0,
    )
    sizes = {name: len(rows) for name, rows in split.train.items()}
    assert sizes == {"P+": 12, "P-": 6, "N+": 6, "N-": 12}
    assert {name: len(r) for name, r in split.test.items()}["P+"] == 2
    assert set(attributes[split.train["P+"]]) == {"1"}


def test_a_draw_depends_on_the_names_of_what_it_is_for():
    draws = [sampling.generator(0, *names).random() for names in ("ab", "ba", "ab")]
    assert draws[0] == draws[2] != draws[1]


# Probes


def test_the_optimizers_are_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((5, 3)), rng.standard_normal((6, 5, 3))
    for coupled, kind in ((False, torch.optim.AdamW), (True, torch.optim.Adam)):
        recipe = Recipe(
            lr=0.1, batch_size=1, epochs=1, weight_decay=0.3, coupled=coupled
        )
        optimizer = adam(recipe)
        w = jnp.asarray(start, jnp.float32)
        state = optimizer.init(w)
        other = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
        theirs = kind([other], lr=0.1, weight_decay=0.3)
        for grad in grads:
            update: Any
            update, state = optimizer.update(jnp.asarray(grad, jnp.float32), state, w)
            w = w + 0.1 * update
            other.grad = torch.tensor(grad, dtype=torch.float32)
            theirs.step()
        np.testing.assert_allclose(w, other.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_best_epoch_on_the_validation_sample_is_kept(key):
    """Validated on wrong labels, the best probe is the first, not the last."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)).astype(np.float32)
    right = Sample(np.arange(200), (x[:, 0] > 0).astype(np.float32))
    wrong = Sample(right.rows, 1 - right.labels)
    recipe = Recipe(lr=0.05, batch_size=50, epochs=30)
    good, bad = (
        fit(x, [right], [validation], recipe=recipe, key=key)
        for validation in (right, wrong)
    )
    accuracy = [
        float(np.mean((x @ p.w[0] + p.b[0] > 0) == (x[:, 0] > 0))) for p in (good, bad)
    ]
    assert accuracy[0] > 0.97
    assert accuracy[1] < accuracy[0]


def test_many_outputs_find_their_directions(key):
    rng = np.random.default_rng(0)
    labels = np.eye(6, dtype=np.float32)[rng.integers(0, 6, 400)]
    x = (labels @ rng.standard_normal((6, 12)) * 3).astype(np.float32)
    recipe = Recipe(lr=0.05, batch_size=64, epochs=30, coupled=True, end_lr=1e-3)
    probe = fit_outputs(x, labels, recipe=recipe, key=key)
    logits = x @ np.asarray(probe.w) + np.asarray(probe.b)
    assert np.mean((logits > 0) == (labels > 0)) > 0.99


# First letters


def test_words_are_read_where_they_stand(tiny_model):
    tokenizer = lm.load_tokenizer(str(tiny_model))
    words = first_letter.alphabetic_words(tokenizer)
    assert all(w.removeprefix(" ").isalpha() for w in words)
    assert words == sorted(words)
    rng = np.random.default_rng(0)
    vocabulary = tokenizer.get_vocab()
    inverse = {i: t for t, i in vocabulary.items()}
    suffix = len(tokenizer(first_letter.SUFFIX)["input_ids"])
    for word, prompt in zip(
        words, first_letter.prompts(words, words, rng), strict=True
    ):
        lines = prompt.split("\n")[1:]
        assert len(lines) == first_letter.EXAMPLES + 1
        assert lines[-1] == f"{word}{first_letter.SUFFIX}"
        assert not any(line.startswith(f"{word} has") for line in lines[:-1])
        ids = tokenizer(prompt)["input_ids"]
        read = tokenizer.convert_tokens_to_string([inverse[ids[len(ids) - suffix - 1]]])
        assert read == word


def test_a_word_is_read_as_in_its_whole_prompt(tiny_run, tiny_model):
    language_model = lm.load_language_model(str(tiny_model))
    tokenizer = lm.load_tokenizer(str(tiny_model))
    subject = Subject(
        runs.open_run(tiny_run), language_model, np.zeros((1, 1), int), 2, {}
    )
    words = first_letter.alphabetic_words(tokenizer)
    rngs = [np.random.default_rng(0) for _ in range(2)]
    found = first_letter.read_words(subject, tokenizer, words[:5], words, rngs[0])
    suffix = len(tokenizer(first_letter.SUFFIX)["input_ids"])
    layer = subject.run.data["layer"]
    for x, prompt in zip(
        found.x, first_letter.prompts(words[:5], words, rngs[1]), strict=True
    ):
        ids = np.array(tokenizer(prompt)["input_ids"])[None]
        whole = np.asarray(language_model.residual(ids, layer))[0, -suffix - 1]
        np.testing.assert_allclose(x, whole, atol=1e-5)


def test_a_part_of_the_vocabulary_is_drawn_by_the_seed():
    words = [f"w{i:03}" for i in range(200)]
    assert first_letter.drawn(words, None, 0) is words
    assert first_letter.drawn(words, 200, 0) is words
    some = first_letter.drawn(words, 120, 0)
    assert some == sorted(some) == first_letter.drawn(words, 120, 0)
    assert len(set(some)) == 120 and set(some) < set(words)
    assert some != first_letter.drawn(words, 120, 1)


# What a user gets wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labelled": ""}, "needs labelled texts"),
        ({"labelled": "nowhere.jsonl"}, "is neither a .jsonl file here"),
        ({"label_column": "plant"}, "no --label_column=plant; there is: animal"),
        ({"text_column": "stars"}, "--text_column=stars is of type int, not text"),
        ({"attribute_column": ""}, "--evals=scr needs a set of --labelled with"),
        (
            {"attribute_column": "animal"},
            "has 3 values ('cat', 'dog', 'owl', ...); scr",
        ),
        ({"label_column": "story"}, "120 different labels"),
        ({"label_column": "a,b,c"}, "has 3 names for 1 sets"),
        ({"quirks": "leak"}, "--quirks=leak is not known; there is mean_in_variance"),
        ({"seed": 2**32}, "--seed=4294967296 must be below 4294967296"),
        ({"train_size": 3}, "--train_size=3 must be at least 8"),
        ({"probe_seeds": 0}, "--probe_seeds=0 must be at least 1"),
        ({"absorption_words": 9}, "--absorption_words=9 must be at least 100"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tiny_run, flags, change, says, capsys):
    options = flags | change
    assert call("evaluate", run=tiny_run, evals="sparse_probing,scr", **options) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message
    assert not (tiny_run / "evals/scr.json").exists()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["not json"], "is not a JSON object"),
        ([{"text": "a", "label": ["x"]}], "of type list, not a label"),
        ([{"text": "a", "label": None}], "holds no labelled text"),
        ([{"text": "a", "label": "x"}], "has one label, 'x'"),
        ([{"text": "a", "label": float("nan")}], "holds no labelled text"),
    ],
)
def test_bad_files_are_named(tmp_path, lines, says):
    path = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(UserError, match=says):
        labelled.read_sets(EvalConfig(run="r", labelled=path))


def test_labels_may_be_numbers_and_rows_without_one_are_left_out_and_counted(tmp_path):
    lines = [json.dumps({"text": "a", "label": 1, "side": "x"})]
    lines += [json.dumps({"text": "b", "label": 2.5, "side": "y"})]
    for label in ("null", "NaN", "Infinity", "-Infinity", "1e999", '""', '" "'):
        lines.append('{"text": "c", "label": ' + label + ', "side": "x"}')
    for text in ("null", '""', '" "'):
        lines.append('{"text": ' + text + ', "label": 1, "side": "x"}')
    lines += ['{"text": "d", "label": 1, "side": NaN}']
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    flags = {"labelled": str(path), "attribute_column": "side"}
    (s,) = labelled.read_sets(EvalConfig(run="r", **flags))
    assert s.labels.tolist() == ["1", "2.5"]
    assert s.notes == (
        "11 of 13 rows are left out: 7 without a label (null, empty, NaN or infinite), "
        "3 without a text, 1 without an attribute (null, empty, NaN or infinite)",
    )


def test_what_makes_scores_other_than_they_seem_is_noted():
    s = text_set()
    s.texts[3:60] = ["the same in train and test, and under three labels"] * 57
    config = EvalConfig(run="r", labelled="x")
    planned = texts.plan(s, ["tpp"], config)
    two, seen = texts.notes(s._replace(notes=("first",)), planned)[1:]
    assert two.startswith("1 texts have more than one label, such as 'the same in")
    assert seen.startswith("1 texts are both in train and in test, such as 'the same")
    assert texts.notes(text_set(), texts.plan(text_set(), ["tpp"], config)) == []


def test_a_text_in_train_of_one_pair_and_test_of_another_is_not_noted():
    """Probes of different pairs are trained apart."""
    s = text_set(texts=["a"] * 2, labels=np.array(["x", "y"]))
    apart = {"x / y": sampling.Split({"P-": np.array([0])}, {"P-": np.array([])})}
    apart["x / z"] = sampling.Split({"P-": np.array([])}, {"P-": np.array([1])})
    planned = texts.Planned("set", s.texts, sampling.Split({}, {}), apart, ["scr"], {})
    assert texts.repeated(planned) == []
    both = sampling.Split({"P-": np.array([0])}, {"P-": np.array([1])})
    assert texts.repeated(planned._replace(quadrants={"x / y": both})) == ["a"]


def test_notes_are_printed_and_stand_beside_the_scores(
    tiny_run, flags, tmp_path, capsys
):
    lines = [json.dumps(row) for row in rows(60)]
    lines += lines[:50]
    lines += ['{"story": "a cat", "animal": NaN, "stars": 1}']
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(lines))
    folder = copied(tiny_run, tmp_path / "run")
    options = flags | {"labelled": path, "evals": "sparse_probing"}
    assert call("evaluate", run=folder, **options) == 0
    notes = results(folder, "sparse_probing")["config"]["sets"]["notes"]["notes"]
    assert notes[0].startswith("1 of 111 rows are left out: 1 without a label")
    assert "both in train and in test" in notes[1]
    out = capsys.readouterr().out
    assert all(f"note: notes: {note}" in out for note in notes)


def subject_like(trained, language_model, **changes) -> Any:
    """A subject of a model that says other things of itself."""
    names = "name files max_positions bos_id special_ids d_model at".split()
    said = {name: getattr(language_model, name) for name in names}
    other = SimpleNamespace(**said | changes)
    return Subject(trained, other, np.zeros((1, 16), int), 2, {})


def test_texts_of_only_special_tokens_are_noted(tiny_run, tiny_model, capsys):
    language_model = lm.load_language_model(str(tiny_model))
    tokenizer = lm.load_tokenizer(str(tiny_model))
    (mark,) = tokenizer("!")["input_ids"]
    subject = subject_like(
        runs.open_run(tiny_run), language_model, special_ids=frozenset({0, mark})
    )
    s = text_set()
    s.texts[:2] = ["!", "!!!!"]
    planned = texts.plan(s, ["tpp"], EvalConfig(run="r", labelled="x"))
    (read,) = texts.read([subject], [(s, planned)], Quirks())
    (note,) = read.notes
    assert note == "2 of 90 texts have only special tokens: their vectors are 0"
    assert f"note: set: {note}" in capsys.readouterr().out


def test_labels_cannot_command_a_terminal(tiny_run, flags, tmp_path, capsys):
    few = [{"story": "x", "animal": "\x1b[2J", "stars": 1}] * 3
    path = write(tmp_path / "escapes.jsonl", rows() + few)
    folder = copied(tiny_run, tmp_path / "run")
    options = flags | {"labelled": path, "evals": "sparse_probing"}
    assert call("evaluate", run=folder, **options) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "too small: '\\x1b[2J'" in said


@pytest.mark.parametrize("evals", ["sparse_probing", "scr", "tpp", "absorption"])
def test_a_language_model_that_gives_nan_is_not_scored(
    tiny_run, tiny_model, flags, tmp_path, capsys, evals, monkeypatch
):
    model = copied(tiny_model, tmp_path / "nan")
    arrays = load_file(model / "model.safetensors")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    arrays[name] = arrays[name] + np.nan
    save_file(arrays, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(first_letter, "too_few", lambda words: False)
    folder = copied(tiny_run, tmp_path / "run")
    options = flags | {"model": model, "model_differs": True, "evals": evals}
    assert call("evaluate", run=folder, **options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--model={model} gives NaN or infinity at blocks.0." in line
    assert not (folder / "evals").exists()


# What is in the way of the results, or beside them


@pytest.mark.parametrize("taken", ["evals", "evals/core.json/", "evals/summary.md/"])
def test_what_is_in_the_way_is_named_before_anything_runs(
    tiny_run, tmp_path, capsys, taken
):
    folder = copied(tiny_run, tmp_path / "run")
    if taken.endswith("/"):
        (folder / taken).mkdir(parents=True)
    else:
        (folder / taken).write_text("mine")
    assert call("evaluate", run=folder, num_tokens=160) == 2
    said = capsys.readouterr()
    assert f"{folder / taken} is in the way" in said.err.splitlines()[-1]
    assert "core on" not in said.out


def test_files_that_are_no_results_do_not_spoil_the_summary(tiny_run, tmp_path, capsys):
    folder = copied(tiny_run, tmp_path / "run")
    (folder / "evals").mkdir()
    (folder / "evals/mine.json").write_text('{"a": 1}')
    (folder / "evals/tpp.json").write_text("{oops")
    (folder / "evals/scr.json").write_text("{}")
    assert call("evaluate", run=folder, num_tokens=160) == 0
    said = capsys.readouterr().out
    assert said.count("note: not in the summary: ") == 2
    assert "mine.json" not in said
    assert "## core" in (folder / "evals/summary.md").read_text()


# Models of few positions


def test_texts_are_cut_to_the_models_positions_and_no_batch_is_longer(
    tiny_run, tiny_model
):
    language_model = lm.load_language_model(str(tiny_model))
    lengths = []

    def at(tokens, hooks):
        lengths.append(tokens.shape[1])
        return language_model.at(tokens, hooks)

    subject = subject_like(
        runs.open_run(tiny_run), language_model, max_positions=50, at=at
    )
    s = text_set(texts=[f"cat {i} " * 90 for i in range(45)] + ["a cat"] * 45)
    planned = texts.plan(s, ["sparse_probing"], EvalConfig(run="r", labelled="x"))
    (read,) = texts.read([subject], [(s, planned)], Quirks())
    assert read.notes[-1] == "texts are cut to the 50 positions of the model, not 128"
    assert {len(row) for row in read.tokens if len(row) > 10} == {50}
    encoding.encode_texts([subject], read.tokens, stored_norms=False)
    assert set(lengths) == {16, 50}
    with pytest.raises(UserError, match="has 50 positions and SAEBench reads texts in"):
        texts.read([subject], [(s, planned)], Quirks(padding_leak=True))


@pytest.fixture(scope="module")
def short_model(tiny_model, tmp_path_factory):
    """The tiny model with 8 positions."""
    folder = copied(tiny_model, tmp_path_factory.mktemp("short") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_few_positions_is_scored_on_shorter_texts(
    tiny_run, short_model, flags, tmp_path, capsys
):
    folder = copied(tiny_run, tmp_path / "run")
    options = flags | {"model": short_model, "evals": "sparse_probing"}
    assert call("evaluate", run=folder, **options) == 0
    assert "cut to the 8 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("evals", "says"),
    [
        ("sparse_probing,core", "contexts of 16 tokens do not fit the 8 positions"),
        ("sparse_probing,absorption", "--evals=absorption reads prompts of "),
    ],
)
def test_what_a_model_has_no_positions_for_is_refused_before_anything_runs(
    tiny_run, short_model, flags, tmp_path, capsys, monkeypatch, evals, says
):
    monkeypatch.setattr(first_letter, "too_few", lambda words: False)
    folder = copied(tiny_run, tmp_path / "run")
    options = flags | {"model": short_model, "evals": evals}
    assert call("evaluate", run=folder, **options) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "evals").exists()


# What is checked before the first pass of the language model


def test_too_few_texts_are_refused_before_core_runs(tiny_run, flags, tmp_path, capsys):
    folder = copied(tiny_run, tmp_path / "run")
    few = write(tmp_path / "few.jsonl", rows(30))
    options = flags | {"labelled": few, "evals": "core,scr"}
    assert call("evaluate", run=folder, **options) == 2
    said = capsys.readouterr()
    assert "no two labels have 10 texts or more with each attribute" in said.err
    assert "core on" not in said.out
    assert not (folder / "evals").exists()


def test_what_did_run_is_summed_up_where_the_rest_fails(
    tiny_run, flags, tmp_path, capsys, monkeypatch
):
    def broken(*arguments):
        raise UserError("no more")

    monkeypatch.setattr(texts, "run", broken)
    folder = copied(tiny_run, tmp_path / "run")
    assert call("evaluate", run=folder, evals="core,tpp", **flags) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: no more"
    assert "loss recovered" in said.out
    assert "## core" in (folder / "evals/summary.md").read_text()


def test_too_few_texts_are_refused(tmp_path):
    lines = [{"text": f"{i}", "label": i % 2} for i in range(12)]
    config = EvalConfig(run="r", labelled=write(tmp_path / "x.jsonl", lines))
    (s,) = labelled.read_sets(config)
    with pytest.raises(UserError, match="fewer than two labels have 10 texts"):
        texts.plan(s, ["tpp"], config)


# SAEBench's sets by name, the hub replaced


def test_saebenchs_sets_have_their_classes_pairs_and_splits(monkeypatch):
    import datasets

    def load(path, *arguments, **options):
        assert path == "LabHC/bias_in_bios"
        rows = [
            {"hard_text": f"t{i}", "profession": i % 28, "gender": i % 2}
            for i in range(56)
        ]
        return {"train": rows, "test": rows[:28]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    sets = labelled.read_sets(EvalConfig(run="r", labelled="bias_in_bios"))
    assert [s.name[-4:] for s in sets] == ["set1", "set2", "set3"]
    assert sets[0].classes == ("0", "1", "2", "6", "9")
    assert sets[0].in_test is not None
    assert int(sets[0].in_test.sum()) == 28
    assert [texts.takes("tpp", s) for s in sets] == [True, False, False]
    assert hub_sets.SCR_PAIRS[sets[0].name][0] == ("21", "13")


def test_code_is_told_by_its_extension_and_loses_its_head(monkeypatch):
    import datasets

    files = [("a.py", 600), ("b.c", 600), ("c.py", 100), ("d.rs", 900), ("e.py", 700)]
    stream = [{"path": path, "content": "x" * size} for path, size in files]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: stream)
    ((_, found, classes, _),) = hub_sets.read("github-code", rows=5)
    assert [(row.label, len(row.text)) for row in found] == [
        ("Python", 450),
        ("C", 450),
        ("Python", 550),
    ]
    assert classes[0] == "C"


def test_europarl_takes_each_language_from_its_pair(monkeypatch):
    import datasets

    def load(path, pair, **options):
        languages = pair.split("-")
        return (
            {"translation": dict.fromkeys(languages, f"{pair} {i}")} for i in range(9)
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    ((_, found, classes, _),) = hub_sets.read("europarl", rows=4)
    assert classes == ("en", "fr", "de", "es", "nl")
    assert len(found) == 20
    assert found[4] == hub_sets.Row("fr-it 0", "fr")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets

    def load(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="cannot be reached .no route.; name a local"):
        labelled.read_sets(EvalConfig(run="r", labelled="ag_news"))
