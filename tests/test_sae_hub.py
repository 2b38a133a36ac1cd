"""Autoencoders from a hub and to it, against a small real server."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from autoencoders import make, write
from test_gemma_scope import arrays as gemma_arrays

from vsae_jax import interop
from vsae_jax.interop import hub as sae_hub
from vsae_jax.system.errors import UserError

EXPORTED = ("cfg.json", "sae_weights.safetensors", "vsae_jax_export.json")
ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """A repository `self.server.repository` with the files of `self.server.folder`, at
    main and v1, and me/new, to which one can push; what was pushed is in
    `self.server.pushed`."""

    def do_HEAD(self):
        self.answer(self.get())

    def do_GET(self):
        self.answer(self.get())

    def do_POST(self):
        size = int(self.headers.get("Content-Length", 0))
        self.answer(self.post(self.rfile.read(size)))

    def answer(self, reply):
        status, headers, body = reply
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def get(self):
        path = self.path.split("?")[0]
        folder = self.server.folder
        names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        repository = self.server.repository
        api = f"/api/models/{repository}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/v1"):
            siblings = [{"rfilename": name} for name in names]
            return said({"id": repository, "sha": COMMIT, "siblings": siblings})
        if path == f"{api}/tree/{COMMIT}":
            return said(
                [{"type": "file", "path": n, "size": 1, "oid": n} for n in names]
            )
        if path.startswith(f"{api}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path == "/api/models/me/new":
            return said({"id": "me/new", "sha": COMMIT, "siblings": []})
        prefix = f"/{repository}/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        self.server.fetched.append(path.removeprefix(prefix))
        body = (folder / path.removeprefix(prefix)).read_bytes()
        return 200, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": COMMIT}, body

    def post(self, body: bytes):
        if self.headers.get("Authorization") != "Bearer hf_good":
            return 401, {"X-Error-Code": ""}, b'{"error": "Invalid username"}'
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return said({"url": f"{self.server.url}/me/new"})
        if self.path == "/api/validate-yaml":
            return said({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in files
            ]
            return said({"files": modes})
        if self.path.split("?")[0].endswith("/commit/main"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.server.pushed[item["value"]["path"]] = content
            url = f"{self.server.url}/me/new/commit/{COMMIT}"
            oid = {"commitOid": COMMIT, "commitUrl": url}
            return said(oid | {"success": True, "hookOutput": ""})
        return 404, {}, b""

    def log_message(self, *args):
        pass


def said(value: dict | list):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = write(make(), "saelens", tmp_path / "repo")
    write(make(seed=1), "sparsify", folder / "layers.3")
    for name in ("big.bin", "optimizer.pt", "layers.3/ae_100.pt"):
        (folder / name).write_bytes(b"x")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.folder, server.pushed, server.repository = folder, {}, "me/sae"
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.created, server.fetched = [], []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_a_process(arguments: list[str], server, home: Path, *, token: str = ""):
    """huggingface_hub reads its settings when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUG"))}
    env = {**kept, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    env |= {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    env |= {"HF_TOKEN": token} if token else {}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


SCRIPT = """
import json, sys, vsae_jax
from vsae_jax.system.errors import UserError
for name, revision in json.loads(sys.argv[1]):
    try:
        loaded = vsae_jax.load(name, revision=revision)
        print(json.dumps([float(loaded.params["w_enc"][0, 0]), loaded.config.k]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_load_from_the_hub(hub, tmp_path):
    asked = [
        ("me/sae", None),
        ("me/sae", "v1"),
        ("me/sae/layers.3", None),
        ("me/sae", "v2"),
        ("me/none", None),
        ("me/sae/layers.9", None),
    ]
    done = in_a_process(["-c", SCRIPT, json.dumps(asked)], hub, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines()]
    first, inner = (float(make(seed=s).params["w_enc"][0, 0]) for s in (0, 1))
    assert got[:3] == [[first, 3], [first, 3], [inner, 3]]
    assert got[3] == "revision=v2 is not a branch, tag or commit of me/sae"
    assert got[4].startswith("me/none is neither a folder here nor a repository that")
    assert "layers.9 is not a folder" in got[5]
    names = {Path(name).name for name in hub.fetched}
    assert names <= {*EXPORTED, "sae.safetensors"}


GEMMA = "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
PLACE = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


@pytest.fixture
def gemma_scope(hub, tmp_path):
    """The hub with one folder of Gemma Scope's repository."""
    hub.folder, hub.repository = tmp_path / "gemma", "/".join(PLACE.split("/")[:2])
    inside = hub.folder.joinpath(*PLACE.split("/")[2:])
    inside.mkdir(parents=True)
    np.savez(inside / "params.npz", **gemma_arrays())
    return hub


def test_saelens_names_lead_to_their_files(gemma_scope, tmp_path):
    asked = [
        GEMMA,
        PLACE,
        f"{PLACE}/params.npz",
        GEMMA.replace("_20", "_99"),
        GEMMA.replace("canonical/", "canonicl/"),
        "gemma-scope-2b-pt-res-canonicl",
        "gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76",
    ]
    asked = json.dumps([(name, None) for name in asked])
    done = in_a_process(["-c", SCRIPT, asked], gemma_scope, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines()]
    first = float(gemma_arrays()["W_enc"][0, 0])
    assert got[:3] == [[first, len(gemma_arrays()["b_enc"])]] * 3
    assert "'layer_99/width_16k/canonical' is not one of them; nearest: gemma" in got[3]
    assert f"; did you mean {GEMMA} or " in got[4]
    assert "not a folder here; did you mean gemma-scope-2b-pt-res-canonical/" in got[5]
    assert (
        "format gemma_2_transcoder, which is not read; those that are: sae_lens, "
        in got[6]
    )
    assert {Path(name).name for name in gemma_scope.fetched} == {"params.npz"}


def test_a_name_is_converted_and_the_card_says_where_from(gemma_scope, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "vsae_jax.convert", f"--input={GEMMA}", f"--out={out}"]
    done = in_a_process(command, gemma_scope, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    source = json.loads((out / "vsae_jax_export.json").read_text())["source"]
    assert source["repository"] == PLACE and source["revision"] == COMMIT
    assert source["release"] == GEMMA and source["format"] == "gemma_scope"
    card = (out / "README.md").read_text()
    assert f"| from | gemma_scope, {PLACE}/params.npz |" in card
    assert 'base_model: "google/gemma-2-2b"' in card


def test_push_to_the_hub(hub, tmp_path):
    source, out = write(make(), "vsae_jax", tmp_path / "in"), tmp_path / "out"
    flags = [f"--input={source}", "--to=saelens", f"--out={out}", "--private"]
    command = ["-m", "vsae_jax.convert", *flags, "--push_to_hub=me/new"]
    done = in_a_process(command, hub, tmp_path / "hf", token="hf_good")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"pushed to {hub.url}/me/new/commit/{COMMIT}"
    )
    assert hub.created[0]["name"] == "new"
    assert "private" in json.dumps(hub.created[0])
    assert hub.pushed == {p.name: p.read_bytes() for p in out.iterdir()}
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.pushed.items():
        (pushed / name).write_bytes(content)
    expected = make().params["w_enc"]
    np.testing.assert_array_equal(interop.read(pushed).params["w_enc"], expected)


def test_a_push_without_a_login_says_how_to_go_on(hub, tmp_path):
    source, out = write(make(), "vsae_jax", tmp_path / "in"), tmp_path / "out"
    command = ["-m", "vsae_jax.convert", f"--input={source}", "--to=openai"]
    command += [f"--out={out}", "--push_to_hub=me/new"]
    done = in_a_process(command, hub, tmp_path / "hf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--push_to_hub=me/new failed, but {out} is written" in done.stderr
    assert f"hf upload me/new {out}" in done.stderr
    assert (out / "autoencoder.pt").is_file() and hub.pushed == {}


def test_a_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/topc", "./me/sae", "sae", str(tmp_path / "a" / "b")):
        assert sae_hub.find(name) == (Path(name), {}, {})
        with pytest.raises(UserError, match="needs a hub id"):
            sae_hub.find(name, revision="v1")
    with pytest.raises(UserError, match="is neither a folder here nor a hub id"):
        sae_hub.find("me/sae/../x")
