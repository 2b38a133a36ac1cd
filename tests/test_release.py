"""What a release is made of: one version, checks that agree, a wheel that works."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import vsae_jax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def runs_of(job: str) -> list[str]:
    return [step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


def test_the_version_is_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "vsae_jax/system/version.py"
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", vsae_jax.__version__)
    assert f"## [{vsae_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_and_hooks_check_what_make_check_does():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^check: (.*)$", makefile, re.M)[1].split()
    checks = [run.removeprefix("make ") for run in runs_of("checks")[1:]]
    assert {*checks, "test"} == set(targets)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in hooks[0]["hooks"]] == [
        f"make {c}" for c in checks
    ]
    assert "make test" in runs_of("tests") and "make wheel" in runs_of("wheel")


def test_ci_runs_every_python_that_is_supported():
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"]]
    supported = [version for version in named if re.fullmatch(r"3\.\d+", version)]
    assert WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"] == supported
    assert PROJECT["project"]["requires-python"] == f">={supported[0]}"


def test_issues_are_asked_for_versions():
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) == 2
    for template in templates:
        fields = {f["id"]: f for f in yaml.safe_load(template.read_text())["body"]}
        about = fields["versions"]["attributes"]["description"]
        assert "`python -m vsae_jax --versions`" in about
        assert fields["versions"]["validations"]["required"]


def run(*command: object, cwd: Path) -> str:
    kept = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_the_demo_with_the_core_dependencies_alone(tmp_path):
    build = ("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    run(sys.executable, *build, cwd=tmp_path)
    (wheel,) = tmp_path.glob(f"vsae_jax-{vsae_jax.__version__}-py3-none-any.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python, empty = tmp_path / "venv" / "bin" / "python", tmp_path / "empty"
    empty.mkdir()
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=empty)
    said = run(python, "-m", "vsae_jax", "--versions", cwd=empty)
    assert f"vsae_jax: {vsae_jax.__version__}\n" in said
    assert "torch: not installed" in said and "matplotlib: not installed" in said
    demo = ("-m", "vsae_jax.demo", "--out=demo", "--steps=20", "--num_tokens=30000")
    said = run(python, *demo, cwd=empty)
    assert "The paper's vSAE" in said
    arms = sorted(path.parent.name for path in empty.glob("demo/*/sae.safetensors"))
    assert arms == ["topk", "vsae_paper", "vsae_released"]
    load = "import vsae_jax; print(vsae_jax.load('demo/topk').config.d_sae)"
    assert run(python, "-c", load, cwd=empty) == "1024\n"
