"""The page in a real browser: Chromium without a network, from file://."""

import json
import re
import shutil
import time
from importlib import resources

import numpy as np
import pytest
from planted import write_planted
from tiny_runs import call, identity_arrays, write_run

from vsae_jax import runs
from vsae_jax.report.figures import style

HOSTILE = {
    "script": "<script>document.title='owned'</script>",
    "image": "\"'><img src=x onerror=\"document.title='owned'\">",
    "close": "</script></style><!-- <b>bold</b>",
    "right": "\u202eevil\u200f\u2067",
    "control": "\x00\x07\x1b[31m\ud7ff\u200b\u2028",
    "arabic": " \u0645\u0631\u062d\u0628\u0627",
}


@pytest.fixture(scope="module")
def browser():
    """Chromium under chromedriver; both are Debian's packages of these names."""
    reason = (
        "needs selenium, chromium and chromedriver (apt-get install chromium-driver)"
    )
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    opened.set_window_size(1300, 900)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_rows):
    """A page of the planted run, and one beside its permutation; the tokens of the
    first have hostile texts."""
    folder = tmp_path_factory.mktemp("page")
    run = write_planted(folder / "p", tiny_rows)
    assert call("dashboard", run=run) == 0
    path = run / "features" / "features.json"
    info = runs.read_json(path)
    with np.load(run / "features" / "features.npz") as arrays:
        latents = np.flatnonzero(arrays["n_fired"])[: len(HOSTILE)].tolist()
        reach = arrays["top_ids"].shape[2] // 2
        peaks = [int(arrays["top_ids"][i, 0, reach]) for i in latents]
    for token, text in zip(peaks, HOSTILE.values(), strict=True):
        info["tokens"][str(token)] = text
    runs.write_json(path, info)
    assert call("dashboard", run=run, out=folder / "one.html") == 0
    order = np.random.default_rng(1).permutation(32)
    arrays = {"w_enc": identity_arrays()["w_enc"][:, order]}
    arrays["w_dec"] = identity_arrays()["w_dec"][order]
    other = write_run(folder / "other", folder / "p" / "rows", arrays, variant="relu")
    both = folder / "both.html"
    assert call("dashboard", run=run, compare=other, out=both) == 0
    few = folder / "few.html"
    assert call("dashboard", run=run, features="3,9", out=few) == 0
    return {
        "one": folder / "one.html",
        "both": both,
        "few": few,
        "hostile": latents,
    }


class Page:
    """The page as its reader sees it."""

    def __init__(self, browser, path, place=""):
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"file://{path}{place}")
        self.until("return document.body.dataset.ready === 'yes'")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, script, *arguments):
        end = time.monotonic() + 20
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"not true in 20 s: {script}"
            time.sleep(0.02)
        return found

    def go(self, place):
        self.run("location.hash = arguments[0]", place)
        self.until("return document.body.dataset.place === arguments[0]", place)

    def press(self, key, target="document.body"):
        event = "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true})"
        self.run(f"{target}.dispatchEvent({event})", key)

    def text(self, selector="main"):
        return self.run(
            "return document.querySelector(arguments[0]).innerText", selector
        )

    def rows(self):
        script = "return [...document.querySelectorAll('.rows .row')]"
        return self.run(f"{script}.map(row => Number(row.dataset.latent))")

    def assert_quiet(self):
        """No message in the console, no request but for the page itself."""
        assert self.browser.get_log("browser") == []
        urls = [
            message["params"]["request"]["url"]
            for entry in self.browser.get_log("performance")
            for message in [json.loads(entry["message"])["message"]]
            if message["method"] == "Network.requestWillBeSent"
        ]
        outside = [u for u in urls if not u.startswith(("file:", "data:", "blob:"))]
        assert urls and outside == []


def test_every_view_opens_without_an_error_or_a_request(browser, pages):
    for name in ("one", "both"):
        page = Page(browser, pages[name])
        assert "Latents at a glance" in page.text()
        for place in (
            "#/table",
            "#/prompts",
            "#/a/0",
            "#/a/31",
            "#/nonsense",
            "#/a/99",
        ):
            page.go(place)
            assert len(page.text()) > 20
        page.assert_quiet()


@pytest.mark.parametrize("place", ["", "#/table", "#/prompts", "#/a/9"])
def test_axe_finds_nothing_serious(browser, pages, place):
    """The checks of accessibility that browsers' own tools run."""
    of_axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    page = Page(browser, pages["both"], place)
    page.run((resources.files(of_axe) / "axe.min.js").read_text("utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[0];"
        "axe.run(document).then(done, error => done({error: String(error)}))"
    )
    assert len(found["passes"]) > 5, found.get("error")
    serious = {
        one["id"]: [node["html"][:200] for node in one["nodes"]]
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    }
    assert serious == {}


def test_a_planted_latent_shows_its_tokens_in_colour(browser, pages):
    page = Page(browser, pages["one"], "#/a/9")
    peaks = page.run(
        "return [...document.querySelectorAll('.sequence .peak')].map(t => "
        "[t.className, t.tip, getComputedStyle(t).backgroundColor])"
    )
    assert len(peaks) > 10
    for name, tip, colour in peaks:
        assert "hot" in name and "activation" in tip and "rgba(0, 0, 0, 0)" != colour
    weights = page.run(
        "return [...document.querySelector('.card').querySelectorAll('.value')]"
        ".map(value => Number(value.innerText))"
    )
    assert weights == sorted(weights, reverse=True) and weights[0] > 1
    assert "Effect on the logits" in page.text()


def test_hovering_shows_the_activation(browser, pages):
    page = Page(browser, pages["one"], "#/a/9")
    page.run(
        "const t = document.querySelector('.sequence .peak');"
        "t.dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))"
    )
    assert not page.run("return document.getElementById('tip').hidden")
    assert "activation 1." in page.text("#tip")


def test_searching_by_number_and_by_token(browser, pages):
    page = Page(browser, pages["one"], "#/table")
    page.until("return document.querySelectorAll('.rows .row').length >= 20")

    def search(words):
        page.run(
            "const box = document.getElementById('search'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input'))",
            words,
        )
        page.until("return document.querySelector('.controls .soft') !== null")
        time.sleep(0.2)
        return page.rows()

    assert 17 in search("17") and 3 not in page.rows()
    latent = pages["hostile"][0]
    assert latent in search("<script>doc")
    assert "0 of 32" in (search("no such token at all"), page.text())[1]
    page.press("Enter", "document.getElementById('search')")
    search("21")
    page.press("Enter", "document.getElementById('search')")
    page.until("return location.hash === '#/a/21'")


def test_sorting_by_a_column(browser, pages):
    page = Page(browser, pages["one"], "#/table")
    page.until("return document.querySelectorAll('.rows .row').length >= 20")

    def shown():
        time.sleep(0.2)
        return page.run(
            "return [...document.querySelectorAll('.rows .row .cell.rate')]"
            ".map(c => parseFloat(c.innerText))"
        )

    page.run("document.querySelector('[data-sort=rate]').click()")
    falling = shown()
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]
    page.run("document.querySelector('[data-sort=rate]').click()")
    rising = shown()
    assert rising == sorted(rising)


def test_the_keys_go_through_the_table_in_its_order(browser, pages):
    page = Page(browser, pages["one"], "#/a/3")
    page.press("ArrowRight")
    page.until("return location.hash === '#/a/4'")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.until("return location.hash === '#/a/2'")
    page.press("Escape")
    page.until("return location.hash === '#/table/a'")
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"


def test_light_and_dark(browser, pages):
    page = Page(browser, pages["one"])
    colour = "return getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        seen[scheme] = page.run(colour)
    assert seen["light"] != seen["dark"]
    page.press("t")
    assert page.run(colour) == seen["light"]
    page.press("t")
    assert page.run(colour) == seen["dark"]


def contrast(one, other):
    """WCAG's contrast of two colours, each (r, g, b) from 0 to 255."""

    def luminance(colour):
        parts = [c / 255 for c in colour[:3]]
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        ]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def rgba(text):
    numbers = [float(n) for n in re.findall(r"[\d.]+", text)]
    return np.array(numbers[:3]), numbers[3] if len(numbers) > 3 else 1.0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sign", [1, -1])
def test_tokens_of_every_strength_can_be_read(browser, pages, scheme, sign):
    media = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [media]})
    page = Page(browser, pages["both"], "#/a/9")
    seen = page.run(
        "const node = document.querySelector('.card .t'), found = [];"
        "const card = getComputedStyle(node.closest('.card')).backgroundColor;"
        "for (let s = 0; s <= 100; s++) {"
        "  shade(node, arguments[0] * s / 100, 1);"
        "  const look = getComputedStyle(node);"
        "  found.push([look.color, look.backgroundColor, card]);"
        "} return found",
        sign,
    )
    for ink, ground, card in seen:
        colour, alpha = rgba(ground)
        mixed = alpha * colour + (1 - alpha) * rgba(card)[0]
        assert contrast(rgba(ink)[0], mixed) >= 4.5, (ink, ground)
    page.go("#/")
    for letter in "ab":
        script = "return getComputedStyle(document.querySelector(arguments[0]))."
        ink = page.run(f"{script}color", f".tile .value.{letter}")
        ground = page.run(f"{script}backgroundColor", ".tile")
        assert contrast(rgba(ink)[0], rgba(ground)[0]) >= 4.5


def test_what_can_be_used_has_a_name_and_a_key(browser, pages):
    page = Page(browser, pages["both"])
    for place in ("#/", "#/table", "#/a/9", "#/prompts"):
        page.go(place)
        nameless = page.run(
            "return [...document.querySelectorAll('button, a, input, select, canvas, "
            "th, [role=button], [role=img]')].filter(n => !(n.innerText || n.ariaLabel "
            "|| n.title || n.labels?.length || n.querySelector('title')"
            ")).map(n => n.outerHTML)"
        )
        assert nameless == []
    token = "document.querySelectorAll('.sequence-free .t[tabindex=\"0\"]')[3]"
    page.press(" ", token)
    assert "Strongest latents" in page.text(".strongest")


def test_hostile_text_comes_out_as_text(browser, pages):
    page = Page(browser, pages["one"])
    for latent, (kind, text) in zip(pages["hostile"], HOSTILE.items(), strict=True):
        page.go(f"#/a/{latent}")
        shown = page.run("return document.querySelector('.sequence .peak').textContent")
        if kind in ("script", "image", "close", "arabic"):
            assert shown == text
        else:
            assert "\u202e" not in shown and "\x00" not in shown and "U+" in shown
        assert (
            page.run("return document.querySelectorAll('main script, main img').length")
            == 0
        )
        isolated = page.run(
            "return getComputedStyle(document.querySelector('.peak')).unicodeBidi"
        )
        assert isolated.startswith("isolate")
    page.go("#/table")
    page.until("return document.querySelectorAll('.rows .row').length >= 20")
    assert page.run("return document.title") == "run"
    page.assert_quiet()


def test_compare_shows_the_matched_pair_side_by_side(browser, pages):
    page = Page(browser, pages["both"])
    assert "Matched latents" in page.text()
    assert page.run("return document.querySelectorAll('.tile .value.b').length") >= 3
    page.go("#/a/9")
    titles = page.run(
        "return [...document.querySelectorAll('.panel h1')].map(h => h.innerText)"
    )
    assert len(titles) == 2 and titles[0].startswith("Latent 9")
    assert "decoder cosine of the pair 1" in page.text()
    peaks = page.run(
        "return [...document.querySelectorAll('.panel')].map(p => "
        "[...p.querySelectorAll('.peak')].map(t => t.textContent).join())"
    )
    assert peaks[0] == peaks[1] != ""
    page.go("#/table/b")
    assert "other" in page.text(".switch .on")
    page.assert_quiet()


def test_a_latent_in_brief_says_why_and_what_fills_it(browser, pages):
    page = Page(browser, pages["few"], "#/a/5")
    assert "2 of 32 latents in full" in page.text()
    assert "--run=RUN --features=5," in page.text("code")
    peaks = page.run("return document.querySelectorAll('.sequence .peak.hot').length")
    assert 0 < peaks <= 5
    page.go("#/a/20")
    assert "fires on none of the tokens" in page.text()
    page.go("#/a/9")
    assert "From strong to weak" in page.text()
    page.press("ArrowRight")
    page.until("return location.hash === '#/a/10'")
    page.assert_quiet()


def test_the_matched_latents_say_how_the_two_started(browser, pages):
    page = Page(browser, pages["both"])
    said = page.text()
    assert "Both started from the same weights (seed 0)" in said
    assert "By chance: median" in said
    assert page.run("return document.querySelectorAll('.bar.chance').length") > 0
    wide = "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
    wide += "return box.right"
    right = page.run(wide, "section figure")
    assert right == pytest.approx(page.run(wide, ".tiles"), abs=2)


def test_nine_tiles_stand_in_rows_of_five_and_four(browser, pages):
    page = Page(browser, pages["one"])
    tops = page.run(
        "const metrics = Object.fromEntries(Object.keys(CORE).map(key => [key, 1]));"
        "const side = {letter: 'a', d_sae: 1, columns: {rate: [1]}, metrics};"
        "document.querySelector('.tiles').replaceWith(tiles([side]));"
        "return [...document.querySelectorAll('.tile')]"
        ".map(t => t.getBoundingClientRect().top)"
    )
    assert [tops.count(top) for top in sorted(set(tops))] == [5, 4]


def test_choosing_a_token_of_a_text_lists_its_latents(browser, pages):
    page = Page(browser, pages["one"], "#/prompts")
    page.run("document.querySelectorAll('.sequence-free .t')[3].click()")
    found = page.text(".strongest")
    assert "Strongest latents" in found and "not counted" not in found
    assert page.run("return document.querySelectorAll('.prompts .t.hot').length") > 1


def test_a_figure_keeps_a_tokens_leading_space(browser, tmp_path):
    with style.applied():
        figure = style.figure(3, 2)
        for text in ("g", " ghost"):
            figure.text(0.2, 0.5, text, family="DejaVu Sans Mono")
        svg, _ = style.save(figure, tmp_path / "tokens")
    browser.get(svg.as_uri())
    script = "return [...document.querySelectorAll('text')].map(t => "
    one, six = browser.execute_script(script + "t.getComputedTextLength())")
    assert six == pytest.approx(6 * one, rel=0.01)


def test_a_phone_can_read_it(browser, pages):
    page = Page(browser, pages["both"])
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for place in ("#/", "#/table", "#/a/9", "#/prompts"):
            page.go(place)
            wide = page.run("return document.documentElement.scrollWidth")
            assert wide <= 390, (place, wide)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
