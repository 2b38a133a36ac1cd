"""Several layers and sites in one pass: a folder each, the same bits after a kill."""

import signal
from pathlib import Path

import numpy as np
import pytest
from test_extract import (
    LENGTH,
    LONG,
    arguments,  # noqa: F401  a fixture
    corpus,  # noqa: F401
    model,  # noqa: F401
    read_folder,
    run,
    small,
    start,
    wait_for_a_shard,
)
from test_lm_families import SIZES, save_random
from tiny_models import make_tiny_neox, make_tokenizer

from vsae_jax.activations.manifest import read_manifest
from vsae_jax.activations.shards import Activations, ShardWriter
from vsae_jax.config import Hook
from vsae_jax.lm import load_language_model

SEVERAL = {"layer": "0,1", "site": "mlp_out,resid_post"}
HOOKS = [Hook(layer, site) for layer in (0, 1) for site in ("mlp_out", "resid_post")]


def read_folders(out: Path) -> dict[str, dict[str, bytes]]:
    return {folder.name: read_folder(folder) for folder in out.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(model, corpus, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("several") / "out"
    assert run(small(model, corpus, out) | SEVERAL) == 0
    return out


def test_a_folder_each_with_what_the_model_has_there(undisturbed, model):  # noqa: F811
    assert {path.name for path in undisturbed.iterdir()} == {h.name for h in HOOKS}
    lm = load_language_model(str(model), backend="jax")
    for hook in HOOKS:
        found = Activations.open(undisturbed / hook.name)
        assert found.manifest.hook == hook and found.manifest.hook_name == hook.name
        expected = np.asarray(lm.at(found.tokens(0, 20), [hook])[0])[:, 1:]
        rows = found.rows(0, found.n_rows).reshape(expected.shape)
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


def test_one_of_them_is_the_folder_itself(arguments, undisturbed):  # noqa: F811
    arguments |= {"layer": 1, "site": "mlp_out"}
    assert run(arguments) == 0
    alone = Activations.open(arguments["out"])
    together = Activations.open(undisturbed / "blocks.1.hook_mlp_out")
    np.testing.assert_array_equal(alone.tokens(0, 20), together.tokens(0, 20))
    n = alone.n_rows
    np.testing.assert_allclose(alone.rows(0, n), together.rows(0, n), atol=1e-5)


def test_both_backends_give_the_same_rows(arguments, undisturbed):  # noqa: F811
    pytest.importorskip("torch")
    assert run(arguments | SEVERAL | {"backend": "transformers"}) == 0
    for hook in HOOKS:
        theirs = Activations.open(arguments["out"] / hook.name)
        ours = Activations.open(undisturbed / hook.name)
        n = ours.n_rows
        np.testing.assert_allclose(theirs.rows(0, n), ours.rows(0, n), atol=1e-4)


def test_unset_each_has_its_own_place(arguments, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert run(arguments | {"out": "", "site": "attn_out,mlp_out"}) == 0
    place = tmp_path / "activations" / arguments["model"].name
    names = {"blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"}
    assert {path.name for path in place.iterdir()} == names


def test_it_says_what_it_writes_where(arguments, capsys):  # noqa: F811
    assert run(arguments | SEVERAL) == 0
    said = capsys.readouterr().out
    assert f"{', '.join(h.name for h in HOOKS)}, d_model 16" in said
    assert "300 rows of float32, 0.02 MB each, to " in said
    assert said.count("wrote 20 contexts, 300 rows to ") == 4


def test_folders_that_were_stopped_apart_go_on_to_the_same_bits(
    arguments,  # noqa: F811
    undisturbed,
    monkeypatch,
    capsys,
):
    """The fifth shard that is written is the last but one: two folders lack it."""
    commit, done = ShardWriter.commit, []

    def fail_in_the_middle(writer):
        done.append(writer.folder)
        if len(done) == 7:
            raise RuntimeError("stopped here")
        commit(writer)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "commit", fail_in_the_middle)
        with pytest.raises(RuntimeError, match="stopped here"):
            run(arguments | SEVERAL)
    there = [len(read_manifest(arguments["out"] / h.name).shards) for h in HOOKS]
    assert there == [2, 2, 1, 1]
    assert run(arguments | SEVERAL) == 0
    said = capsys.readouterr().out
    assert "resumes: 1 shards of 8 contexts are there in every folder" in said
    assert read_folders(arguments["out"]) == read_folders(undisturbed)


def test_a_deleted_shard_of_one_is_written_again(arguments, undisturbed):  # noqa: F811
    assert run(arguments | SEVERAL) == 0
    lost = arguments["out"] / HOOKS[2].name / "activations-00001.npy"
    lost.unlink()
    assert run(arguments | SEVERAL) == 0
    assert read_folders(arguments["out"]) == read_folders(undisturbed)


def test_killed_and_started_again_all_have_the_bits_of_an_undisturbed_run(
    arguments,  # noqa: F811
):
    several = arguments | LONG | {"site": "mlp_out,resid_post"}
    several |= {"num_tokens": 100 * LENGTH}
    killed = several | {"out": arguments["out"].with_name("killed")}
    with start(killed) as process:
        wait_for_a_shard(killed["out"] / HOOKS[-1].name, process)
        process.send_signal(signal.SIGKILL)
    manifest = read_manifest(killed["out"] / HOOKS[-1].name)
    assert not manifest.complete, "it came too late"
    assert run(killed) == 0
    assert run(several) == 0
    assert read_folders(killed["out"]) == read_folders(several["out"])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"site": "resid_pre"}, "'resid_pre' is not resid_post|mlp_out|attn_out"),
        ({"site": "mlp_out,mlp_in"}, "'mlp_in' is not resid_post|mlp_out|attn_out"),
        ({"layer": "1,1"}, "a value stands twice in '1,1'"),
        ({"site": "mlp_out,mlp_out"}, "a value stands twice in 'mlp_out,mlp_out'"),
        ({"layer": "0,2"}, "layer=2 must be from 0 to 1"),
        ({"layer": "0,-1"}, "--layer=-1 must be at least 0"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments,  # noqa: F811
    capsys,
    change,
    said,
):
    assert run(arguments | change) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not arguments["out"].exists()


def test_one_folder_of_another_model_stops_all(
    arguments,  # noqa: F811
    tmp_path,
    capsys,
):
    other = make_tiny_neox(tmp_path / "other", seed=1)
    folder = arguments["out"] / HOOKS[1].name
    one = {"model": other, "layer": 0, "out": folder}
    assert run(arguments | one) == 0
    before = read_folders(arguments["out"])
    capsys.readouterr()
    assert run(arguments | SEVERAL) == 2
    error = capsys.readouterr().err
    assert f"{folder} was made with other settings (model: " in error
    assert error.count("\n") == 1 and read_folders(arguments["out"]) == before


def test_a_folder_of_another_site_is_refused(arguments, capsys):  # noqa: F811
    assert run(arguments) == 0
    assert run(arguments | {"site": "mlp_out"}) == 2
    said = "made with other settings (site: 'resid_post' -> 'mlp_out')"
    assert said in capsys.readouterr().err


def test_a_site_that_the_family_lacks(arguments, tmp_path, capsys):  # noqa: F811
    settings = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "vocab_size": 320}
    folder = save_random("OPT", settings, tmp_path / "opt")
    make_tokenizer().save_pretrained(folder)
    flags = {"model": folder, "backend": "transformers", "site": "resid_post,mlp_out"}
    capsys.readouterr()
    assert run(arguments | flags) == 2
    error = capsys.readouterr().err
    assert "--site=mlp_out: OPTDecoderLayer of --model=" in error
    assert error.count("\n") == 1 and not arguments["out"].exists()


def test_a_manifest_of_another_layer_than_its_hook(undisturbed, tmp_path):
    manifest = read_manifest(undisturbed / HOOKS[0].name)
    data = manifest.to_bytes().replace(b'"layer": 0', b'"layer": 1')
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(
        Exception, match="hook_name is .*blocks.0.hook_mlp_out.*layer 1"
    ):
        read_manifest(tmp_path)
