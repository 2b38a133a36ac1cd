"""The site: its commands are commands, and its lists are whole."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, every_command
from tiny_runs import COMMANDS

import vsae_jax
from vsae_jax import config, losses, runs, sae, splices
from vsae_jax.config import cli

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_a_command_on_a_page_is_read_by_its_parser(page):
    for name, *words in every_command(page):
        # Placeholders stand for folders only.
        assert cli.parse(COMMANDS[name][1], [name, *words])


def test_the_commands_are_found():
    found = {name for page in PAGES for name, *_ in every_command(page)}
    assert found == set(COMMANDS)


def public(module) -> set[str]:
    """What a module gives, by its own list or all that it defines."""
    own = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and (inspect.isfunction(value) or inspect.isclass(value))
    ]
    return set(own)


@pytest.mark.parametrize(
    "module", [vsae_jax, losses, runs, sae, splices], ids=lambda m: m.__name__
)
def test_the_reference_has_every_public_name(module):
    page = (DOCS / "api.md").read_text()
    short = {sae.__name__: "vsae_jax.sae"}.get(module.__name__, module.__name__)
    said = set(re.findall(rf"\b{re.escape(short)}\.(\w+)", page))
    # `vsae_jax.init` is `vsae_jax.sae.init`.
    said |= set(re.findall(r"\bvsae_jax\.(\w+)", page)) & set(vsae_jax.__all__)
    assert public(module) - said == set()


def test_the_flags_of_every_command_are_on_the_site():
    page = (DOCS / "commands.md").read_text()
    shown = re.findall(r'^flags\("(\w+)"\)$', page, flags=re.M)
    assert sorted(shown) == sorted(one.__name__ for _, one in COMMANDS.values())
    assert all(hasattr(config, name) for name in shown)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_nb", reason="needs pip install -e '.[docs]'")
    arguments = ["-W", "--keep-going", "-c", "docs", ".", str(tmp_path / "site")]
    cache = ["-D", f"nb_execution_cache_path={tmp_path / 'cache'}"]
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", *cache, *arguments], cwd=ROOT, check=True
    )
    pages = {path.name for path in (tmp_path / "site" / "docs").glob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= pages
