"""SAELens' release names: the bundled table, an installed SAELens, what is refused."""

from pathlib import Path

import pytest

from vsae_jax.interop import releases
from vsae_jax.system.errors import UserError

YAML = """
small-res:
  conversion_func: dictionary_learning_1
  repo_id: me/saes
  model: tiny
  config_overrides: {model_from_pretrained_kwargs: {center_writing_weights: true}}
  saes:
  - {id: blocks.0, path: 0, l0: 3.5}
small-norm:
  repo_id: me/saes
  model: tiny
  config_overrides: {normalize_activations: constant_norm_rescale}
  saes: [{id: a, path: b/a}]
"""


@pytest.fixture(autouse=True)
def fresh_table():
    releases.forget()
    yield
    releases.forget()


def refused(name: str) -> str:
    with pytest.raises(UserError) as error:
        releases.find(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_bundled_table():
    found = releases.find(
        "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
    )
    assert found is not None and found.model == "gemma-2-2b" and not found.center
    assert found.repository == "google/gemma-scope-2b-pt-res"
    assert found.path == "layer_20/width_16k/average_l0_71"
    centred = releases.find("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert centred is not None and centred.center
    assert releases.find("me/sae") is releases.find("runs") is None
    assert releases.nearest("me/sae") == releases.nearest("sae") == ""


def test_what_a_file_cannot_say_is_refused_by_the_name_of_its_format():
    said = refused("mistral-7b-res-wg/blocks.8.hook_resid_pre")
    assert "sae_lens_constant_norm_rescale, which is not read" in said
    said = refused(
        "gemma-scope-2-4b-pt-transcoders/transcoder/layer_17_width_16k_l0_big"
    )
    assert "gemma_3_transcoder" in said
    assert "of 13 autoencoders, and 'none' is not" in refused("gpt2-small-res-jb")


def test_an_installed_saelens_comes_first_and_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "sae_lens"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "pretrained_saes.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path)
    assert releases.find("small-res/blocks.0") == releases.Published(
        name="small-res/blocks.0",
        repository="me/saes",
        path="0",
        format="dictionary_learning_1",
        model="tiny",
        center=True,
    )
    assert "sae_lens_constant_norm_rescale" in refused("small-norm/a")
    assert releases.find("gpt2-small-res-jb/blocks.8.hook_resid_pre") is None


def test_the_documents_count_what_is_read():
    published = list(releases.all_published())
    read = [p for p in published if p.format in releases.READ]
    names = {p.name.partition("/")[0] for p in published}
    of_read = {p.name.partition("/")[0] for p in read}
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    said = (
        f"{len(of_read)} of its {len(names)} releases ({len(read):,} of "
        f"{len(published):,} autoencoders)"
    )
    assert said in " ".join(text.split())
