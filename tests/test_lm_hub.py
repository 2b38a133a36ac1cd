"""Models from a hub: a small real server, its cache afterwards, and no hub at all."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from test_lm_decoder import ROOT, TOKENS
from test_lm_files import write_whole_model

from vsae_jax.lm import load_language_model, load_tokenizer
from vsae_jax.system.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    return write_whole_model(tmp_path / "model")


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
from vsae_jax.system.errors import UserError
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
    assert "--revision=no-such-branch is not a branch, tag or commit of" in said[2]
    assert (
        "--model=org/unknown is neither a folder here nor a model that the" in said[3]
    )
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
