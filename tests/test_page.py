"""The web page of `higen serve` in a real browser: what a user does with it, and what a page must not do.

Chromium is Debian's (`apt-get install chromium`), driven by Playwright; without them the tests are skipped, unless
HIGEN_REQUIRE_BROWSER=1 says that they must be there. axe-core is the one that axe-playwright-python brings.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytest.importorskip("fastapi", reason="higen[serve] is not installed")

from serve_process import QUICK, Server

import higen
from higen.api import default_model
from higen.serve.keys import add_key

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = os.environ.get("HIGEN_REQUIRE_BROWSER") == "1"
EVIL = "a whale <img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
WATCH = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
}).observe({ type: 'layout-shift', buffered: true });
"""
WIDTHS = ((360, 740), (800, 1000), (1400, 900))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("page") / "data")
    yield made
    assert made.stop() == 0
    assert "Traceback" not in made.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        if REQUIRED:
            raise
        pytest.skip("playwright is not installed")
    if CHROMIUM is None:
        assert not REQUIRED, "there is no chromium"
        pytest.skip("there is no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """An open page, with its errors and its requests to other servers."""

    def __init__(self, browser: Any, url: str, size: tuple[int, int] = (1400, 900), **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self._asked(url, request.url))
        self.page.add_init_script(WATCH)
        self.page.goto(url)

    def _asked(self, url: str, asked: str) -> None:
        if not asked.startswith((url, f"blob:{url}", "data:")):
            self.foreign.append(asked)

    def open(self) -> Any:
        """Wait until the page is usable, and return it."""
        self.page.locator("#work").wait_for(state="visible")
        return self.page

    def close(self, *allowed: str) -> None:
        """Check that nothing moved by itself, no other server was asked, and only `allowed` errors occurred."""
        assert self.page.evaluate("window.shifts") == []
        assert self.foreign == []
        assert [text for text in self.said if not any(words in text for words in allowed)] == []
        self.context.close()


def asked(page: Any, act: Any) -> dict[str, Any]:
    """The request for a new video that `act` sends."""
    with page.expect_request(lambda request: request.method == "POST" and request.url.endswith("/v1/videos")) as found:
        act()
    return dict(json.loads(found.value.post_data))


def settings(page: Any, **values: str) -> None:
    """Open all settings, as a click does, and fill in some of them."""
    for more in (".settings", ".more"):
        if not page.locator(more).evaluate("details => details.open"):
            page.locator(f"{more} > summary").click()
    for name, value in {"width": "64", "height": "64", **values}.items():
        page.fill(f"#ask-{name}", value)


def test_a_person_writes_draws_watches_and_downloads(server: Server, chromium: Any, tmp_path: Path) -> None:
    visit = Visit(chromium, server.url)
    page = visit.open()
    page.locator("#prompt").press_sequentially("a whale fla")
    page.get_by_role("button", name="flapping", exact=True).click()
    assert page.input_value("#prompt") == "a whale flapping "
    page.locator("#prompt").press_sequentially("zebra ")
    assert page.inner_text("#prompt-words") == "The model does not know “zebra”."
    settings(page, **{"num_frames": "8", "num_inference_steps-0": "12"})

    plot = page.get_by_role("slider", name="Motion, frame by frame")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    left, top, width, height = box["x"], box["y"], box["width"], box["height"]
    page.mouse.move(left + 10, top + height - 5)
    page.mouse.down()
    page.mouse.move(left + width / 2, top + height / 2, steps=4)
    page.mouse.move(left + width - 5, top + 5, steps=4)
    page.mouse.up()
    plot.press("Home")
    plot.press("ArrowUp")

    sent = asked(page, lambda: page.get_by_role("button", name="Make video").click())
    motion = sent["controls"]["motion"]
    assert len(motion) == sent["num_frames"] == 8
    assert motion == sorted(motion)
    assert (motion[0], motion[-1]) == (5.0, 500.0)  # one key press moves by a hundredth of the scale
    assert (sent["prompt"], sent["seed"], sent["size"]) == ("a whale flapping zebra ", -1, "64x64")
    page.locator(".screen canvas").wait_for(state="visible")  # a preview
    page.locator(".screen video").wait_for(state="visible")
    assert page.evaluate("document.querySelector('.screen video').videoWidth") == 64
    with page.expect_download() as found:
        page.get_by_role("button", name="Download", exact=True).first.click()
    path = tmp_path / "clip.mp4"
    found.value.save_as(path)
    video = higen.Video.open(path)
    assert video.frames.shape == (8, 64, 64, 3)
    assert video.metadata["motion"] == motion
    assert page.locator(".notes summary").inner_text() == "1 note"

    page.get_by_role("button", name="Contact sheet").click()
    page.locator("#sheet[open] img").wait_for(state="visible")
    page.keyboard.press("Escape")
    page.fill("#prompt", "")
    page.get_by_role("button", name="Again with changes").click()
    assert page.input_value("#prompt") == "a whale flapping zebra "
    assert page.input_value("#ask-seed") == str(video.metadata["seed"])
    page.fill("#ask-seed", "18446744073709551615")  # too large for a JavaScript number
    again = asked(page, lambda: page.press("#prompt", "Enter"))
    assert again["controls"]["motion"] == motion
    assert again["seed"] == 2**64 - 1
    page.locator(".stage .facts dd", has_text="18446744073709551615").wait_for()
    page.locator(".screen video").wait_for(state="visible")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Really delete?").click()
    page.wait_for_timeout(100)
    assert page.locator(".card").count() == 1
    visit.close()


def test_a_picture_is_dropped_and_comes_again(server: Server, chromium: Any) -> None:
    visit = Visit(chromium, server.url, (800, 1000))
    page = visit.open()
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "PNG")
    page.set_input_files("input[type=file]", {"name": "<b>.png", "mimeType": "image/png", "buffer": file.getvalue()})
    assert page.inner_text(".drop-said") == "<b>.png"
    page.fill("#prompt", "a red heart")
    settings(page, **{"num_frames": "2", "num_inference_steps-0": "1", "num_inference_steps-1": "1"})
    sent = asked(page, lambda: page.get_by_role("button", name="Make video").click())
    page.locator(".screen video").wait_for(state="visible")
    page.get_by_role("button", name="Remove").click()
    page.get_by_role("button", name="Again with changes").click()
    page.get_by_role("button", name="Remove").wait_for(state="visible")
    assert asked(page, lambda: page.press("#prompt", "Enter"))["controls"] == sent["controls"]
    page.locator(".screen video").wait_for(state="visible")
    visit.close()


def test_a_refusal_is_shown_and_its_field_is_marked(server: Server, chromium: Any) -> None:
    visit = Visit(chromium, server.url)
    page = visit.open()
    cards = page.locator(".card").count()
    page.fill("#prompt", "a whale")
    settings(page, num_frames="65")
    page.press("#prompt", "Enter")
    page.locator("#toast").wait_for(state="visible")
    assert "num_frames=65: a whole number from 1 to 64" in page.inner_text("#toast")
    assert page.evaluate("document.activeElement.id") == "ask-num_frames"
    assert page.get_attribute("#ask-num_frames", "aria-invalid") == "true"
    assert page.locator(".card").count() == cards
    settings(page, **{"num_frames": "64", "num_inference_steps-1": "200", "width": "128", "height": "128"})
    page.press("#prompt", "Enter")
    page.locator(".screen-said", has_text="step").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator(".screen-word", has_text="Cancelled").wait_for()
    visit.close("422")


def test_a_prompt_is_text(server: Server, chromium: Any) -> None:
    """Markup in a prompt is shown, and never becomes an element."""
    server.wait(server.create(EVIL))
    visit = Visit(chromium, server.url)
    page = visit.open()
    assert page.inner_text(".stage-prompt") == EVIL
    assert page.inner_text(".card-prompt >> nth=0") == EVIL
    page.get_by_role("button", name="Again with changes").click()
    assert page.input_value("#prompt") == EVIL
    assert page.locator("script").count() == 1
    assert page.title() == "higen"
    refused = "() => { try { document.body.innerHTML = '<b>'; return 'taken'; } catch (error) { return error.name; } }"
    assert page.evaluate(refused) == "TypeError"
    visit.close("TrustedHTML")


def faults(page: Any) -> list[tuple[str, str]]:
    """The faults that axe-core rates serious or critical."""
    from axe_playwright_python.base import AXE_SCRIPT

    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run()")["violations"]
    return [(row["id"], row["nodes"][0]["html"]) for row in found if row["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(("scheme", "sizes"), [("light", WIDTHS), ("dark", WIDTHS[2:])])
def test_it_fits_and_can_be_used_by_all(server: Server, chromium: Any, scheme: str, sizes: Any) -> None:
    """No horizontal scroll, nothing jumps, and axe-core finds no serious fault."""
    server.wait(server.create("a whale"))
    for size in sizes:
        visit = Visit(chromium, server.url, size, color_scheme=scheme, has_touch=size[0] == 360)
        page = visit.open()
        page.locator(".screen video").wait_for(state="visible")
        settings(page)
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1]
        if size[0] != 800:
            assert faults(page) == []
        visit.close()


def test_a_finger_draws_a_curve(server: Server, chromium: Any) -> None:
    visit = Visit(chromium, server.url, (360, 740), has_touch=True, is_mobile=True)
    page = visit.open()
    page.locator(".settings > summary").tap()
    plot = page.get_by_role("slider", name="Appearance, frame by frame")
    plot.scroll_into_view_if_needed()
    plot.tap(position={"x": 150, "y": 30})
    assert plot.get_attribute("aria-valuetext").startswith("frame ")
    page.get_by_role("button", name="Reset").tap()
    assert plot.get_attribute("aria-valuetext").startswith("the model")
    visit.close()


def test_a_key_is_asked_for(chromium: Any, tmp_path: Path) -> None:
    """With API keys and two models, the page needs a key. A reload keeps the key, and another tab has none."""
    key = add_key(tmp_path / "keys", "one")
    model = str(default_model())
    server = Server(tmp_path / "data", f"a={model}", f"b={model}", "--api-keys", str(tmp_path / "keys"))
    try:
        head = {"authorization": f"Bearer {key}"}
        assert server.call("POST", "/v1/videos", {"prompt": "a whale", "model": "b", **QUICK}, head)[0] == 200
        visit = Visit(chromium, server.url)
        page = visit.page
        page.locator("#locked").wait_for(state="visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.locator("#key-said", has_text="does not know this key").wait_for()
        assert faults(page) == []
        page.fill("#key", key)
        page.press("#key", "Enter")
        visit.open()
        page.locator(".screen video").wait_for(state="visible")
        page.locator(".card img").wait_for(state="visible")
        assert page.input_value("#model") == "a"
        page.get_by_role("button", name="Again with changes").click()
        assert page.input_value("#model") == "b"
        page.reload()
        visit.open()
        page.get_by_role("button", name="Forget key").click()
        page.locator("#locked").wait_for(state="visible")
        visit.close("401")
    finally:
        assert server.stop() == 0


def test_the_page_asks_for_nothing_elsewhere(server: Server) -> None:
    """The page's content policy, and that the files it refers to exist."""
    import urllib.request

    with urllib.request.urlopen(server.url) as answer:
        text, headers = answer.read().decode(), answer.headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    folder = Path(higen.__file__).parent / "serve" / "page"
    for file in folder.iterdir():
        named = re.findall(r"https?://[^\s\"'`]+", file.read_text(encoding="utf-8"))
        assert all(url.startswith("http://www.w3.org/") for url in named)
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        assert server.call("GET", path)[0] == 200
        assert path == "/" or file.name in text or any(f"./{file.name}" in one.read_text() for one in folder.iterdir())
    for path in ("/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/index.html", "/page/", "/page"):
        assert server.call("GET", path)[0] == 404
