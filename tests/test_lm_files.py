"""Models and tokenizers in local folders: what is read, refused, and hashed."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_lm_decoder import CONFIG, TOKENS, write_neox

from vsae_jax.lm import load_language_model, load_tokenizer
from vsae_jax.lm.files import locate, model_facts
from vsae_jax.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write_tokenizer(folder: Path, *, words: int, special: tuple[str, ...] = ()):
    """A tokenizer whose ids are 0, ..., words - 1, and then the special tokens'."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_whole_model(folder: Path) -> Path:
    """Config, weights and tokenizer, with a vocabulary of 61 for all of them."""
    write_neox(folder)
    write_tokenizer(folder, words=61)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_whole_model(tmp_path / "model")


def test_the_tokenizer_comes_from_the_models_folder(folder):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("w5 w60 w2")["input_ids"] == [5, 60, 2]


def test_a_tokenizer_of_another_model_is_refused(folder):
    write_tokenizer(folder, words=62)
    with pytest.raises(UserError, match="ids up to 61 but.* vocabulary is 61: "):
        load_tokenizer(str(folder))


def test_special_tokens_beyond_the_vocabulary_are_let_pass(folder):
    write_tokenizer(folder, words=61, special=("<image>",))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_tokens_to_ids("<image>") == 61


def test_vocabulary_of_a_text_model_below_an_image_model(folder):
    nested = {"model_type": "llava", "text_config": {**CONFIG, "vocab_size": 60}}
    (folder / "config.json").write_text(json.dumps(nested))
    with pytest.raises(UserError, match="ids up to 60 but.* vocabulary is 60: "):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "filename", ["config.json", "model.safetensors", "tokenizer.json"]
)
def test_what_a_folder_lacks_is_named(folder, filename):
    (folder / filename).unlink()
    load = load_tokenizer if filename == "tokenizer.json" else load_language_model
    with pytest.raises(UserError, match=f"--model={folder} has no {filename}") as error:
        load(str(folder))
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(folder):
    shard = "model-00002-of-00002.safetensors"
    index = {"weight_map": {"embed_out.weight": shard}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"has no {shard}"):
        load_language_model(str(folder))


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
def test_a_file_that_is_cut_off_is_named(folder, filename):
    whole = (folder / filename).read_bytes()
    (folder / filename).write_bytes(whole[: len(whole) // 2])
    said = f"{filename} (cannot be read|is not valid JSON)"
    with pytest.raises(UserError, match=said):
        load_language_model(str(folder))


@pytest.mark.parametrize("broken", ["", "{}", '{"added_tokens": [], "model": 3}'])
def test_a_broken_tokenizer_is_one_line(folder, broken):
    (folder / "tokenizer.json").write_text(broken)
    with pytest.raises(UserError, match="tokenizer of .* cannot be read") as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(folder):
    with pytest.raises(UserError, match="neither a model folder nor a hub id"):
        locate(str(folder / "config.json"))
    with pytest.raises(UserError, match="neither a model folder nor a hub id"):
        locate("")
    with pytest.raises(
        UserError, match="/no/such/folder is neither a folder here.*demo"
    ):
        locate("/no/such/folder")
    with pytest.raises(UserError, match="--revision=step3000 needs a hub id"):
        locate(str(folder), revision="step3000")
    # A TypeError where annotations are checked while the tests run.
    with pytest.raises((UserError, TypeError), match="torch"):
        load_language_model(str(folder), backend="torch")  # type: ignore[arg-type]


def test_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model").folder == folder


def test_special_ids(folder):
    facts = partial(
        model_facts, locate(str(folder)), d_model=1, n_layers=1, dtype="float32"
    )
    base = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": [4, 5]}
    assert facts({**base, "pad_token_id": -1}).special_ids == {4, 5}
    assert facts(base).bos_id == 4
    assert facts({**base, "bos_token_id": 0, "pad_token_id": 9}).bos_id == 0
    with pytest.raises(UserError, match="no bos_token_id and no eos_token_id"):
        facts({"vocab_size": 61})


def test_hashes_follow_the_content_only(folder):
    def hashes():
        model = load_language_model(str(folder))
        return model.config_hash, model.tokenizer_hash

    config, tokenizer = hashes()
    resaved = dict(reversed(CONFIG.items())) | {"transformers_version": "9.9"}
    (folder / "config.json").write_text(json.dumps(resaved, indent=4))
    assert hashes() == (config, tokenizer)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 3}))
    assert hashes()[0] != config and hashes()[1] == tokenizer
    write_tokenizer(folder, words=60)
    assert hashes()[1] != tokenizer


def test_importing_the_package_imports_no_framework_but_jax():
    script = (
        "import sys, vsae_jax.lm\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_that_needs_no_torch_does_not_import_it(tiny_model):
    from transformers import AutoTokenizer

    script = (
        "import sys\nfrom vsae_jax.lm import load_tokenizer\n"
        f"ids = load_tokenizer({str(tiny_model)!r})('the red dog')['input_ids']\n"
        "print([ids, 'torch' in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ids = AutoTokenizer.from_pretrained(str(tiny_model))("the red dog")["input_ids"]
    assert done.stdout.strip() == str([ids, False])


def test_a_copied_folder_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    a, b = load_language_model(str(folder)), load_language_model(f"{tmp_path}/copy/")
    assert (a.config_hash, a.tokenizer_hash) == (b.config_hash, b.tokenizer_hash)
    np.testing.assert_array_equal(a.residual(TOKENS, 2), b.residual(TOKENS, 2))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", 3, ".."])
def test_an_index_that_names_files_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"gpt_neox.embed_in.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file beside it"):
        load_language_model(str(folder))
