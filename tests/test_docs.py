"""The documents: what they link to and what the sources cite is there."""

import re
from pathlib import Path

import pytest

from vsae_jax.evals.quirks import NAMES, Quirks

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "docs", "experiments", "tests", "vsae_jax")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A page or a folder, and the sections named after it, as in
# `docs/saebench.md 3, 4 and 5.1`.
CITATION = re.compile(
    r"(?P<path>docs/[\w/-]+(?:\.md)?)(?P<sections>(?:(?: |, | and )\d+(?:\.\d+)*)*)"
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def headings(page: Path) -> list[str]:
    """The headings' texts, outside of fenced and indented code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"^#+ (.+)$", text, flags=re.M)


def anchors(page: Path) -> set[str]:
    """What GitHub and MyST make of the headings."""
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in headings(page))
    return {title.replace(" ", "-") for title in kept}


def sections(page: Path) -> set[str]:
    """The numbers that headings begin with, such as `2` and `2.1`."""
    numbers = (re.match(r"(\d+(?:\.\d+)*)\.? ", title) for title in headings(page))
    return {number[1] for number in numbers if number}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page):
    text = re.sub(r"`[^`]*`", "", page.read_text())
    wrong = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        found = target.exists() and (not anchor or anchor in anchors(target))
        if not found:
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_has_one_title(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert len(re.findall(r"^# ", text, flags=re.M)) == 1


def test_every_cited_page_and_section_exists():
    wrong, n_sections = [], 0
    for path in SOURCES:
        # A citation may go on in the next line of a docstring or a comment.
        text = re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text())
        for citation in CITATION.finditer(text):
            page = ROOT / citation["path"]
            cited = re.findall(r"\d+(?:\.\d+)*", citation["sections"])
            n_sections += len(cited)
            there = page.exists() or page.with_suffix(".md").exists()
            if not there or (cited and not sections(page).issuperset(cited)):
                wrong.append(f"{name(path)}: {citation[0]}")
    assert not wrong
    assert n_sections > 20


def test_every_quirk_names_its_section():
    cited = dict(re.findall(r"^ +(\w+): (\d+\.\d+),", Quirks.__doc__ or "", flags=re.M))
    assert list(cited) == list(NAMES)
    assert set(cited.values()) <= sections(ROOT / "docs" / "saebench.md")


def test_the_notes_are_short():
    lines = (ROOT / "BUILD_NOTES.md").read_text().splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 160


def test_the_lines_of_the_eight_tasks_are_counted():
    page = (ROOT / "docs" / "eight_tasks.md").read_text()
    head, *tasks = re.split(r"^## ", page, flags=re.M)
    table = re.findall(r"^\| (\d)\. [^|]+\|([^|]+)\|([^|]+)\|([^|]+)\|$", head, re.M)
    assert [row[0] for row in table] == [task[0] for task in tasks]
    for task, (_, *stated) in zip(tasks, table, strict=True):
        blocks = re.findall(r"^```(?:python)?\n(.*?)^```", task, re.M | re.S)
        lines = [[x for x in block.splitlines() if x.strip()] for block in blocks]
        assert max(len(line) for block in lines for line in block) <= 88
        counted = [int(n) for n in stated if n.strip() != "none"]
        assert [len(block) for block in lines] == counted, task.splitlines()[0]
        assert counted[0] == min(counted)
