"""Where models and tokenizers come from: folders, the hub, its cache, and no hub."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from test_lm_neox import CONFIG, TOKENS, write_neox

from vsae_jax.errors import UserError
from vsae_jax.lm import load_language_model, load_tokenizer
from vsae_jax.lm.files import locate, model_facts

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


@pytest.fixture
def folder(tmp_path):
    """A whole model folder whose vocabulary is 61 for model and tokenizer alike."""
    write_neox(tmp_path / "model")
    write_tokenizer(tmp_path / "model", words=61)
    return tmp_path / "model"


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
    with pytest.raises(UserError, match=f"{filename} cannot be read"):
        load_language_model(str(folder))


@pytest.mark.parametrize("broken", ["", "{}", '{"added_tokens": [], "model": 3}'])
def test_a_broken_tokenizer_is_one_line(folder, broken):
    (folder / "tokenizer.json").write_text(broken)
    with pytest.raises(UserError, match="tokenizer of .* cannot be read") as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(folder):
    with pytest.raises(UserError, match="no model folder and no hub id"):
        locate(str(folder / "config.json"))
    with pytest.raises(UserError, match="no model folder and no hub id"):
        locate("")
    with pytest.raises(UserError, match="/no/such/folder is no folder here.*demo"):
        locate("/no/such/folder")
    with pytest.raises(UserError, match="--revision=step3000 needs a hub id"):
        locate(str(folder), revision="step3000")
    with pytest.raises(UserError, match="backend='torch' must be"):
        load_language_model(str(folder), backend="torch")  # type: ignore[arg-type]


def test_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model").folder == folder


def test_special_ids(folder):
    facts = partial(model_facts, locate(str(folder)), d_model=1, n_layers=1)
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


class FakeHub(BaseHTTPRequestHandler):
    """The parts of the hub's HTTP interface that loading a model uses.

    It knows one repository, org/model, with the files of `self.server.folder`, and one
    gated repository, org/gated.
    """

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, *, send_body: bool):
        status, headers, body = self.reply(self.path.split("?")[0])
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def reply(self, path: str) -> tuple[int, dict[str, str], bytes]:
        known = ("/api/models/org/model", "/api/models/org/gated")
        if path in known or path == known[0] + "/revision/step3000":
            info = {"id": path[12:], "sha": COMMIT, "siblings": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if path.startswith(known[0] + "/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith(known[0] + "/tree/"):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if path.startswith("/org/gated/"):
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if path.split("/")[:4] != ["", "org", "model", "resolve"]:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        file = self.server.folder / path.rsplit("/", 1)[-1]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}
        return 200, headers, file.read_bytes()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.folder = folder
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys, numpy as np
from vsae_jax.errors import UserError
from vsae_jax.lm import load_language_model, load_tokenizer

TOKENS = json.loads(sys.argv[2])
for model, revision in json.loads(sys.argv[1]):
    try:
        loaded = load_language_model(model, revision=revision)
        total = float(np.sum(loaded.residual(np.array(TOKENS), 1)))
        ids = load_tokenizer(model, revision=revision)("w5 w60")["input_ids"]
        print(json.dumps([loaded.revision, ids, total]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def load_in_a_process(models, *, home: Path, endpoint: str):
    """What SCRIPT says of each model, and what it wrote to stderr.

    A process of its own, since huggingface_hub reads its settings when imported.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUG"))}
    env = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, json.dumps(models)]
    command.append(json.dumps(TOKENS[:1, :8].tolist()))
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def leave_the_hub(monkeypatch, *, cache: Path):
    """Makes the hub unreachable: nothing listens on port 9."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))


def test_a_model_from_the_hub_and_then_from_its_cache(
    hub, folder, tmp_path, monkeypatch
):
    local = load_language_model(str(folder)).residual(TOKENS[:1, :8], 1)
    models = [
        ("org/model", None),
        ("org/model", "step3000"),
        ("org/model", "no-such-branch"),
        ("org/unknown", None),
        ("org/gated", None),
    ]
    said, noise = load_in_a_process(models, home=tmp_path / "hf", endpoint=hub)
    loaded = [COMMIT, [5, 60], pytest.approx(float(np.sum(local)), rel=1e-5)]
    assert said[:2] == [loaded, loaded]
    assert "--revision=no-such-branch is no branch, tag or commit of" in said[2]
    assert "--model=org/unknown is no folder here, and no model that the" in said[3]
    assert "--model=org/gated is gated: accept its terms" in said[4]
    assert noise == ""

    leave_the_hub(monkeypatch, cache=tmp_path / "hf" / "hub")
    for revision in (None, "step3000"):
        cached = load_language_model("org/model", revision=revision)
        assert cached.revision == COMMIT
        np.testing.assert_array_equal(cached.residual(TOKENS[:1, :8], 1), local)
        tokenizer = load_tokenizer("org/model", revision=revision)
        assert tokenizer("w5 w60")["input_ids"] == [5, 60]
    with pytest.raises(UserError, match="cannot be reached"):
        load_language_model("org/model", revision="step4000")


@pytest.mark.parametrize("load", [load_language_model, load_tokenizer])
def test_a_hub_out_of_reach_is_one_line_at_once(load, tmp_path, monkeypatch, capfd):
    leave_the_hub(monkeypatch, cache=tmp_path)
    with pytest.raises(UserError, match="hub cannot be reached") as error:
        load("org/model")
    message = str(error.value)
    assert "local folder with config.json, tokenizer.json and model.saf" in message
    assert "python -m vsae_jax.demo" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_offline_mode_says_that_it_is_on(tmp_path, monkeypatch):
    leave_the_hub(monkeypatch, cache=tmp_path)
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached.*HF_HUB_OFFLINE.*demo"):
        load_language_model("org/model")


def test_importing_the_package_imports_no_framework_but_jax():
    script = (
        "import sys, vsae_jax.lm\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_copied_folder_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    a, b = load_language_model(str(folder)), load_language_model(f"{tmp_path}/copy/")
    assert (a.config_hash, a.tokenizer_hash) == (b.config_hash, b.tokenizer_hash)
    np.testing.assert_array_equal(a.residual(TOKENS, 2), b.residual(TOKENS, 2))
