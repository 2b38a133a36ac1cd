"""The site, built from the repository's own pages: `make docs`.

The source folder is the root of the checkout, so that a link from one page to another,
to a figure or to a heading is the same here and in a repository's viewer.
"""

import re

import vsae_jax

project = "vsae_jax"
author = "The vsae_jax authors"
copyright = author
version = release = vsae_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "benchmarks/*.md",
    "experiments/results/**",
]
exclude_patterns = ["docs/redirect/**", "build/**", "**/.*"]

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
# A notebook runs once, until its source changes; `make docs-again` runs it anyway.
nb_execution_mode = "cache"
nb_execution_cache_path = "build/jupyter"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_output_stderr = "remove"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_google_docstring = True

html_theme = "furo"
html_title = "vsae_jax"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]
# What a page's fenced text holds is prose, commands or an equation.
highlight_language = "none"
linkcheck_anchors = False
linkcheck_timeout = 20


SECTION = re.compile(r"(Args|Returns|Raises|Yields):\n")
FIELDS = re.compile(r"(?:\w[\w, ]*: .*(?:\n  .*)*(?:\n|\Z))+\Z")


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes reStructuredText of a docstring of plain text."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip())
    lines[:] = "\n\n".join(map(as_rst, blocks)).splitlines() + [""]


def as_rst(block: str) -> str:
    """An equation or code, which is indented, as it stands; `name: what it is` as a
    list; and else a paragraph in which only `code` is marked."""
    if block.startswith("  "):
        return "::\n\n" + block
    parts = re.split(r"(`[^`]*`)", block)
    text = "".join(
        f"`{part}`"
        if part.startswith("`")
        else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
        for part in parts
    )
    if not SECTION.match(block) and FIELDS.match(block):
        return re.sub(r"^(\w[\w, ]*): ", r":\1: ", text, flags=re.M)
    return text


def short_names(app, what, name, obj, options, signature, returned):
    """A signature in which an array of JAX has the name that users write."""
    parts = (
        part and part.replace("jaxlib._jax.", "") for part in (signature, returned)
    )
    return tuple(parts)


def setup(app) -> None:
    app.connect("autodoc-process-signature", short_names)
    # Before napoleon, which makes lists of the sections.
    app.connect("autodoc-process-docstring", plain_text, priority=100)
