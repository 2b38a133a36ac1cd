"""What the study found, as `report.md` and as one self-contained page."""

import base64
import csv
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vsae_jax.runs import series
from vsae_jax.system.files import replace_file

Table = list[list[str]]
# A longer table is a file beside the report.
MOST_ROWS = 12
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
_CODE = re.compile(r"`([^`]+)`")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;"
    "color:#111;background:#fff}table{border-collapse:collapse;margin:1em 0;"
    "font-size:13px}td,th{border-bottom:1px solid #ccc;padding:.2em .7em;"
    "text-align:left}td{font-variant-numeric:tabular-nums}img{max-width:100%}"
    "code{background:#f3f3f3;padding:.1em .3em;white-space:pre-wrap}"
    ".wide{overflow-x:auto}"
)


class Filed(Table):
    """A table that is a file beside the report, however short."""


class Section(NamedTuple):
    """One experiment: what is claimed, what the paper has, what came out (paragraphs,
    tables with a header, files of figures), and the command, which the report adds."""

    title: str
    claim: str
    paper: str
    parts: Sequence[str | Table | Path]
    command: str = ""


def write(
    stem: Path, title: str, summary: str, sections: Sequence[Section]
) -> list[Path]:
    """Writes `stem`.md and `stem`.html, in the folder that holds the figures, and long
    tables as `tables/*.csv`; returns the first two."""
    texts = {
        stem.with_suffix(".md"): markdown(stem.parent, title, summary, sections),
        stem.with_suffix(".html"): page(title, summary, sections),
    }
    tables = {
        stem.parent / name: _as_csv(rows)
        for section in sections
        for name, rows in long_tables(section).items()
    }
    for path, text in (texts | tables).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    return list(texts)


def long_tables(section: Section) -> dict[str, Table]:
    """The tables that do not stand in report.md, by the names of their files."""
    tables = [part for part in section.parts if isinstance(part, list)]
    name = re.sub(r"[^a-z0-9]+", "_", section.title.lower()).strip("_")
    return {
        f"tables/{name}_{number}.csv": rows
        for number, rows in enumerate(tables, start=1)
        if len(rows) > 1 + MOST_ROWS or isinstance(rows, Filed)
    }


def _as_csv(rows: Table) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        [_BOLD.sub(r"\1", cell) for cell in row] for row in rows
    )
    return file.getvalue()


def markdown(out: Path, title: str, summary: str, sections: Sequence[Section]) -> str:
    """The report, its figures by their place below `out`. Figures one after the other
    share a line, and the name of a file goes on the line of the text before it."""
    blocks = [f"# {title}", summary]
    for section in sections:
        facts = [*_facts(section, "**{}:** {}."), f"`{section.command}`"]
        blocks.append(f"## {section.title}\n{' '.join(facts)}")
        files = {id(rows): name for name, rows in long_tables(section).items()}
        before: object = None
        for part in section.parts:
            joins = False
            if isinstance(part, Path):
                text = f"![{part.stem}]({part.relative_to(out).as_posix()})"
                joins = isinstance(before, Path)
            elif id(part) in files:
                name = files[id(part)]
                text = f"[{name}]({name}): {len(part) - 1} rows."
                joins = isinstance(before, str)
            else:
                text = part if isinstance(part, str) else series.markdown(part)
            if joins:
                blocks[-1] += f" {text}"
            else:
                blocks.append(text)
            before = part
    return "\n\n".join(blocks) + "\n"


def page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The same as HTML that needs nothing else."""
    body = [f"<h1>{html.escape(title)}</h1>", *_paragraphs(summary)]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += _facts(section, "<p><b>{}:</b> {}</p>", escape=True)
        body.append(f"<p><code>{html.escape(section.command)}</code></p>")
        for part in section.parts:
            if isinstance(part, Path):
                body.append(_image(part))
            else:
                body += _paragraphs(part) if isinstance(part, str) else [_table(part)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _facts(section: Section, template: str, *, escape: bool = False) -> list[str]:
    facts = {"Claim": section.claim, "The paper": section.paper}
    return [
        template.format(name, html.escape(text) if escape else text)
        for name, text in facts.items()
        if text
    ]


def _paragraphs(text: str) -> list[str]:
    """Plain paragraphs, and lists whose lines start with `* `."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith("* "):
            items = (_inline(item) for item in block[2:].split("\n* "))
            blocks.append(f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>")
        else:
            blocks.append(f"<p>{_inline(block)}</p>")
    return blocks


def _table(rows: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows[1:])
    return (
        f'<div class="wide"><table><tr>{line(rows[0], "th")}</tr>{body}</table></div>'
    )


def _inline(text: str) -> str:
    """A cell or a paragraph, with `**bold**` and `code`."""
    bold = _BOLD.sub(r"<b>\1</b>", html.escape(text))
    return _CODE.sub(r"<code>\1</code>", bold)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    kind = _TYPES[path.suffix]
    return (
        f'<p><img alt="{html.escape(path.stem)}" src="data:{kind};base64,{data}"></p>'
    )
