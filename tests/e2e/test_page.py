"""The page at `/` in a real Chromium, against a real `zops serve` with the tiny model."""

import io
import json
import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.support.serving import start_server, stop_hard
from tests.support.waiting import eventually
from zops.spec.keys import add_key

WAIT_MS = 20_000
TIMES = "\N{MULTIPLICATION SIGN}"
HOSTILE = '<img src=x onerror="document.title=1"><b>two kites</b> & {prompt}'
BUTTONS = ("soft accent-wash", "on-accent accent", "bad card", "on-bad bad", "warn card")
SEEN_WHOLE = "(box) => box.getBoundingClientRect().top >= 0 && box.getBoundingClientRect().bottom <= innerHeight"
HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
HOLD_ALBUM = """{
    const open = IDBFactory.prototype.open;
    IDBFactory.prototype.open = function (...args) {
        let real;
        const held = Object.create({ get result() { return real.result; } });
        window.release = () => { real = open.apply(this, args); Object.assign(real, held); };
        return held;
    };
}"""
LOAD_FAILURE = "Failed to load resource"
"""What Chromium writes for every answer that is an error, expected or not."""
NETWORK_CHANGED = "ERR_NETWORK_CHANGED"
"""Chromium drops what is under way when a network comes or goes, and other tests make networks for containers."""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"none of {', '.join(names)} is installed; as root on Debian scripts/ensure-test-tools does it"
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root; the page is ours.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


class Visit:
    """One visitor: a browser profile of its own, and all that must not happen while it is used."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.errors, self.hosts = [], set()
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "locale": "en-US"} | options)
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.open()

    def open(self) -> Page:
        page = self.context.new_page()
        page.on("console", lambda message: message.type == "error" and self._note(message.text))
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.goto(self.url)
        # A page that lost a part on the way begins once more, with an empty form.
        expect(page.locator("#generate")).to_be_enabled()
        return page

    def _note(self, error):
        if NETWORK_CHANGED not in error:
            self.errors.append(error)

    def at(self, name) -> Locator:
        return self.page.locator(f"#{name}")

    def fill(self, **fields):
        if {"forwards", "guidance", "negative"} & fields.keys() and not self.at("forwards").is_visible():
            self.page.get_by_text("More settings").click()
        for name, value in fields.items():
            self.at(name).fill(str(value))

    def begin(self, prompt="a cat", edge=64, **fields):
        self.fill(prompt=prompt, width=edge, height=edge, **fields)
        self.at("generate").click()

    def make(self, *args, **fields):
        self.begin(*args, **fields)
        expect(self.at("said")).to_have_text("Done")
        expect(self.at("generate")).to_be_visible()

    @property
    def pictures(self) -> Locator:
        return self.page.locator("#pictures button")

    def look(self, index=0):
        self.pictures.nth(index).click()
        expect(self.at("lightbox")).to_be_visible()

    def download(self) -> bytes:
        with self.page.expect_download() as download:
            self.at("download").click()
        return Path(download.value.path()).read_bytes()

    def receipt(self) -> dict[str, str]:
        facts = self.page.locator("#receipt > *").all_text_contents()
        return dict(zip(facts[::2], facts[1::2], strict=True))

    def expect_phase(self, phase):
        expect(self.at("state")).to_have_attribute("data-phase", phase)


@pytest.fixture
def visit(browser, request):
    """Return a function that opens the page; whoever used it, nothing was blocked, broken or asked of another host."""
    visits = []

    def open_page(server, **options) -> Visit:
        visits.append(Visit(browser, server.url, **options))
        return visits[-1]

    yield open_page
    for each in visits:
        each.context.close()
        assert [text for text in each.errors if LOAD_FAILURE not in text] == []
        assert {host for host in each.hosts if host} == {urlsplit(each.url).netloc}


@pytest.fixture
def seen(visit, served) -> Visit:
    """The page of the shared server, ready."""
    visitor = visit(served)
    visitor.expect_phase("ready")
    return visitor


@pytest.fixture(scope="module")
def narrow(tiny_model, tmp_path_factory):
    """A server in whose queue one request may wait, with small images; its worker may be killed."""
    directory = tmp_path_factory.mktemp("narrow")
    server = start_server(tiny_model, directory, ZOPS_SERVE_MAX_QUEUE="1", ZOPS_SERVE_MAX_PIXELS=str(512 * 512))
    yield server.wait_ready()
    stop_hard(server)


def test_the_page_must_load_without_an_error_or_another_host_and_hold_still(seen):
    shifts = """() => new Promise((resolve) => new PerformanceObserver((list) =>
        resolve(list.getEntries().reduce((sum, entry) => sum + entry.value, 0))
    ).observe({ type: "layout-shift", buffered: true }) || setTimeout(() => resolve(0), 500))"""
    assert seen.page.evaluate(shifts) < 0.01
    assert seen.errors == []
    expect(seen.at("model")).to_have_text("zops/synthetic-tiny")


def test_the_policy_must_forbid_markup_from_text_and_scripts_from_elsewhere(visit, served):
    headers = served.call("GET", "/").headers
    assert (
        served.call("GET", "/assets/page.js").headers["content-security-policy"] == headers["content-security-policy"]
    )
    assert "unsafe" not in headers["content-security-policy"]
    visitor = visit(served)
    attempt = "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }"
    assert visitor.page.evaluate(attempt) == "TypeError"
    assert "TrustedHTML" in visitor.errors.pop()


def test_a_picture_must_come_with_previews_progress_and_its_receipt(seen):
    # What is shown on the way is written down as it comes; looking from here would be too slow.
    seen.page.evaluate("""() => {
        window.said = []; window.values = []; window.shown = new Set();
        new MutationObserver(() => {
            said.push(document.getElementById("said").textContent);
            values.push(document.getElementById("progress").value);
            shown.add(document.querySelector(".tile:not(.done) img")?.src);
        }).observe(document.getElementById("stage"), {subtree: true, childList: true, attributes: true});
    }""")
    seen.make("a lighthouse at dawn", seed=41, edge=128)
    said, values, shown = seen.page.evaluate("[[...new Set(said)], values, [...shown].filter(Boolean)]")
    assert said == ["Working", "Preview 1 of 3", "Preview 2 of 3", "Preview 3 of 3", "Done"]
    assert values == sorted(values)
    assert set(values) >= {0.25, 0.5, 0.75, 1}
    assert len(shown) == 3
    seen.look()
    receipt = seen.receipt()
    assert (receipt["Seed"], receipt["Size"], receipt["Forwards"]) == ("41", f"128{TIMES}128", "8")
    expect(seen.at("caption")).to_have_text("a lighthouse at dawn")
    image = Image.open(io.BytesIO(seen.download()))
    assert image.size == (128, 128)
    assert json.loads(image.text["zops"])["seed"] == 41


def test_the_settings_of_a_picture_must_make_the_same_picture_again(seen):
    seen.make("two kites", n=2, guidance=1.5, negative="rain", forwards=4)
    expect(seen.pictures).to_have_count(2)
    seen.look(1)
    first, seed = seen.download(), seen.receipt()["Seed"]
    expect(seen.at("captionNegative")).to_contain_text("rain")
    seen.at("reuse").click()
    expect(seen.at("seed")).to_have_value(seed)
    seen.fill(prompt="two kites")  # the rest is as the picture was
    seen.at("generate").click()
    expect(seen.pictures).to_have_count(3)
    seen.look(0)
    assert seen.download() == first
    assert seen.receipt()["Seed"] == seed
    seen.page.keyboard.press("Escape")
    seen.make("two kites", seed=int(seed) + 7)
    seen.look(0)
    assert seen.download() != first


def test_a_receipt_must_be_copied_as_json(visit, served):
    visitor = visit(served, permissions=["clipboard-read", "clipboard-write"])
    visitor.make(seed=5)
    visitor.look()
    visitor.at("copyReceipt").click()
    expect(visitor.at("copied")).to_have_text("Receipt copied")
    assert json.loads(visitor.page.evaluate("navigator.clipboard.readText()"))["seed"] == 5


def test_cancelling_must_free_the_server(seen, served):
    for cancel in (lambda: seen.page.keyboard.press("Escape"), lambda: seen.at("cancel").click()):
        seen.begin(edge=512, forwards=200, n=4)
        eventually(lambda: served.state["queue"]["running"] == 1, "the request to run")
        cancel()
        expect(seen.at("generate")).to_be_visible()
        eventually(lambda: served.state["queue"]["running"] == 0, "the worker to be free", timeout_s=5)
    expect(seen.pictures).to_have_count(0)


def test_what_the_form_can_refuse_must_not_be_sent(visit, narrow):
    visitor = visit(narrow)
    visitor.expect_phase("ready")
    expect(visitor.page.locator("#presets input:checked")).to_have_count(1)
    for fields in ({"width": 100}, {"width": 1024, "height": 1024}, {"prompt": ""}, {"n": 99}):
        visitor.fill(**{"prompt": "a cat", "width": 64, "height": 64, "n": 1} | fields)
        visitor.at("generate").click()
        assert not visitor.page.evaluate("document.getElementById('wish').checkValidity()"), fields
    expect(visitor.page.locator(".tile, .fault")).to_have_count(0)


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"width": 100}, "invalid_size"), ({"width": 1024, "height": 1024}, "too_many_pixels")],
)
def test_an_error_must_be_shown_with_its_code_and_request(visit, narrow, fields, code):
    visitor = visit(narrow)
    expect(visitor.at("width")).to_have_value("64")  # the model's own: the limits have arrived
    visitor.page.evaluate("document.getElementById('wish').noValidate = true")
    visitor.fill(prompt="a cat", width=64, height=64)
    visitor.fill(**fields)
    visitor.at("generate").click()
    fault = visitor.page.locator(".fault")
    expect(fault).to_contain_text(code)
    expect(fault).to_contain_text(re.compile(r"req_[0-9a-f]{32}"))
    expect(fault.get_by_role("alert")).not_to_be_empty()
    # Asking the same again would not help.
    expect(fault.get_by_role("button")).to_have_count(0)


def test_a_full_queue_must_be_shown_with_a_countdown_and_another_try(visit, narrow):
    visitor = visit(narrow)
    with narrow.endless_request():
        other = visit(narrow)
        other.begin(edge=512)
        expect(visitor.at("load")).to_have_text("1 running, 1 waiting")
        expect(other.at("said")).to_contain_text("In the queue")
        visitor.begin()
        fault = visitor.page.locator(".fault")
        expect(fault).to_contain_text("queue_full")
        expect(fault.get_by_role("button")).to_have_text(re.compile(r"Try again in \d+ s"))
        expect(fault.get_by_role("button")).to_be_disabled()
        other.page.keyboard.press("Escape")
    fault.get_by_role("button", name="Try again", exact=True).click(timeout=60_000)
    expect(visitor.pictures).to_have_count(1)


@pytest.mark.parametrize("name", ["state.js", "page.js", "page.css"])
def test_a_page_of_which_a_part_was_lost_must_be_loaded_again(visit, served, name):
    visitor = visit(served)
    lost = []

    def lose(route):
        lost.append(name)
        if len(lost) == 1:
            route.abort("connectionreset")
        else:
            route.continue_()

    visitor.page.route(f"**/assets/{name}", lose)
    visitor.page.reload()
    eventually(lambda: visitor.page.wait_for_timeout(50) or len(lost) >= 2, "a second load")
    visitor.expect_phase("ready")
    expect(visitor.at("lost")).to_be_hidden()


def test_a_page_that_never_comes_whole_must_say_so_and_load_no_more(visit, served):
    visitor = visit(served, locale="zh-CN")
    visitor.expect_phase("ready")
    loads = []
    visitor.page.on("request", lambda request: request.is_navigation_request() and loads.append(request.url))
    visitor.page.route("**/assets/state.js", lambda route: route.abort())
    visitor.page.reload()
    expect(visitor.at("lost")).to_be_visible()
    expect(visitor.at("generate")).to_be_disabled()
    assert len(loads) == 4
    visitor.page.unroute("**/assets/state.js")
    visitor.page.reload()
    visitor.expect_phase("ready")
    expect(visitor.at("lost")).to_be_hidden()
    assert visitor.page.evaluate("sessionStorage.getItem('zops-reloads')") == "0"


def test_what_is_pressed_before_the_page_can_hear_it_must_not_be_lost(visit, served):
    visitor = visit(served)
    visitor.page.add_init_script(HOLD_ALBUM)
    visitor.page.reload()
    visitor.fill(prompt="a cat", width=64, height=64)
    expect(visitor.at("generate")).to_be_disabled()
    for key in ("Enter", "Control+Enter"):
        visitor.at("seed").press(key)
    visitor.page.evaluate("release()")
    visitor.at("generate").click()
    expect(visitor.pictures).to_have_count(1)


def test_a_lost_worker_must_be_shown_and_its_return(visit, narrow):
    visitor = visit(narrow)
    visitor.expect_phase("ready")

    def shown():
        # The page looks every few seconds, and a worker may be back in three: each next one takes longer.
        state = narrow.state
        if state["phase"] == "ready":
            with suppress(ProcessLookupError):  # the server was faster to replace it
                os.kill(state["workers"][0]["pid"], signal.SIGKILL)
        return visitor.at("state").get_attribute("data-phase") != "ready"

    eventually(shown, "the loss to be shown", timeout_s=60)
    expect(visitor.page.locator(".loading")).to_be_visible()
    visitor.expect_phase("ready")
    expect(visitor.page.locator(".empty")).to_be_visible()
    visitor.at("state").click()
    expect(visitor.page.locator("#workers td").nth(3)).not_to_have_text("0")


def test_the_phases_of_a_server_must_be_shown_from_start_to_end(visit, tiny_model, tmp_path):
    server = start_server(tiny_model, tmp_path / "life")
    try:
        eventually(server.is_up, "the socket")
        visitor = visit(server)
        expect(visitor.page.locator(".loading li[aria-current=step]")).to_be_visible()
        visitor.expect_phase("ready")
        expect(visitor.page.locator(".empty")).to_be_visible()
        maker = visit(server)
        maker.begin(edge=512, forwards=200, n=4)
        eventually(lambda: server.state["queue"]["running"] == 1, "the request to run")
        server.process.send_signal(signal.SIGTERM)
        visitor.expect_phase("draining")
        expect(visitor.page.locator(".loading h2")).to_have_text("Stopping")
        visitor.begin()
        expect(visitor.page.locator(".fault")).to_contain_text("draining")
        server.process.kill()
        visitor.expect_phase("unreachable")
        expect(maker.page.locator(".fault")).to_contain_text("connection_lost")
    finally:
        stop_hard(server)


def test_a_picture_of_the_gallery_must_be_edited(seen):
    seen.make("a cat", edge=96, seed=3)
    seen.look()
    original = seen.download()
    seen.at("editThis").click()
    expect(seen.at("thumbnail")).to_be_visible()
    expect(seen.at("width")).to_have_value("96")
    seen.at("strength").fill("0.5")
    seen.fill(prompt="a dog", seed=3)
    seen.at("generate").click()
    expect(seen.pictures).to_have_count(2)
    seen.look()
    assert seen.receipt()["Strength"] == "0.5"
    edited = seen.download()
    assert edited != original
    assert json.loads(Image.open(io.BytesIO(edited)).text["zops"])["mode"] == "edit"


def test_an_uploaded_file_must_be_edited_at_its_size(seen):
    upload = io.BytesIO()
    Image.new("RGB", (130, 66), "teal").save(upload, "JPEG")
    seen.at("file").set_input_files({"name": "teal.jpg", "mimeType": "image/jpeg", "buffer": upload.getvalue()})
    expect(seen.at("width")).to_have_value("128")
    expect(seen.at("height")).to_have_value("64")
    seen.fill(prompt="a dog")
    seen.at("generate").click()
    expect(seen.pictures).to_have_count(1)
    seen.look()
    assert (seen.receipt()["Size"], seen.receipt()["Strength"]) == (f"128{TIMES}64", "0.6")


def test_a_file_that_is_no_image_must_be_refused_by_the_server(seen):
    seen.at("file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    seen.begin()
    expect(seen.page.locator(".fault")).to_contain_text("invalid_image")


def test_the_gallery_must_survive_a_reload_and_forget_on_demand(seen):
    for seed in (1, 2, 3):
        seen.make(f"number {seed}", seed=seed)
    expect(seen.pictures).to_have_count(3)
    seen.page.reload()
    expect(seen.pictures).to_have_count(3)
    seen.look(1)
    assert seen.receipt()["Seed"] == "2"
    assert json.loads(Image.open(io.BytesIO(seen.download())).text["zops"])["seed"] == 2
    seen.at("deleteThis").click()
    expect(seen.at("caption")).to_have_text("number 1")
    seen.page.keyboard.press("Escape")
    seen.page.reload()
    expect(seen.pictures).to_have_count(2)
    seen.at("deleteAll").click()
    seen.page.keyboard.press("Escape")
    expect(seen.pictures).to_have_count(2)
    seen.at("deleteAll").click()
    seen.at("deleteYes").click()
    expect(seen.pictures).to_have_count(0)
    seen.page.reload()
    expect(seen.at("galleryNote")).to_be_visible()
    expect(seen.pictures).to_have_count(0)


def test_the_gallery_must_be_bounded(seen):
    seen.page.evaluate("""async () => {
        const { openAlbum, MOST } = await import("/assets/album.js");
        const album = await openAlbum();
        const receipt = { seed: 0, width: 16, height: 16, manifest_digest: "" };
        for (let seed = 0; seed < MOST + 2; seed++)
            await album.add({ file: new Blob([seed]), wish: { prompt: String(seed) }, receipt: { ...receipt, seed } });
    }""")
    seen.page.reload()
    expect(seen.pictures).to_have_count(60)
    assert seen.pictures.last.locator("img").get_attribute("alt") == "2"
    seen.make("the newest")
    expect(seen.pictures).to_have_count(60)
    assert seen.pictures.first.locator("img").get_attribute("alt") == "the newest"


def test_a_key_must_be_asked_for_kept_for_the_tab_and_sent(visit, tiny_model, tmp_path):
    (tmp_path / "keys").mkdir()
    file = tmp_path / "keys" / "keys.yaml"
    key = add_key(file, "page")
    server = start_server(tiny_model, tmp_path / "keyed", ZOPS_SERVE_API_KEYS=str(file))
    try:
        visitor = visit(server.wait_ready())
        visitor.expect_phase("ready")
        visitor.begin()
        expect(visitor.at("keyDialog")).to_be_visible()
        visitor.page.keyboard.press("Escape")
        expect(visitor.page.locator(".fault")).to_contain_text("missing_api_key")
        visitor.page.get_by_role("button", name="Try again").click()
        for attempt in ("zops_wrong", key):
            visitor.at("key").fill(attempt)
            visitor.page.keyboard.press("Enter")
            if attempt != key:
                expect(visitor.at("keyFault")).to_contain_text("none of")
        expect(visitor.pictures).to_have_count(1)
        visitor.page.reload()
        visitor.expect_phase("ready")
        visitor.make("a second one")
        expect(visitor.pictures).to_have_count(2)
        assert key not in visitor.page.evaluate("JSON.stringify(localStorage) + location.href + document.cookie")
        assert key not in server.log.read_text()
        # Another tab is another session.
        visitor.page = visitor.open()
        visitor.begin()
        expect(visitor.at("keyDialog")).to_be_visible()
    finally:
        stop_hard(server)


def test_text_of_users_and_servers_must_stay_text(seen):
    seen.make(HOSTILE)
    seen.look()
    assert seen.at("caption").text_content() == HOSTILE
    seen.page.keyboard.press("Escape")
    error = {"message": HOSTILE, "code": HOSTILE, "request_id": HOSTILE, "type": "server_error", "param": None}
    answer = {"status": 500, "content_type": "application/json", "body": json.dumps({"error": error})}
    seen.page.route("**/v1/images/generations", lambda route: route.fulfill(**answer))
    seen.begin()
    assert seen.page.locator(".fault .message").text_content() == HOSTILE
    assert seen.page.locator("b, img[src=x]").count() == 0
    assert seen.page.title() == "zops"


def test_a_proxys_own_error_must_be_shown_too(seen):
    answer = {"status": 502, "content_type": "text/html", "body": "<h1>Bad Gateway</h1>"}
    seen.page.route("**/v1/images/generations", lambda route: route.fulfill(**answer))
    seen.begin()
    expect(seen.page.locator(".fault")).to_contain_text("502")


def test_a_stream_that_breaks_off_must_not_look_finished(seen):
    answer = {"status": 200, "content_type": "text/event-stream", "body": ": keep-alive\n\n"}
    seen.page.route("**/v1/images/generations", lambda route: route.fulfill(**answer))
    seen.begin()
    expect(seen.page.locator(".fault")).to_contain_text("connection_lost")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_must_need_no_sideways_scrolling(visit, served, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    visitor = visit(served, **phone)
    visitor.expect_phase("ready")

    def assert_fits():
        assert visitor.page.evaluate("document.documentElement.scrollWidth") == 360

    assert_fits()
    visitor.make("a" * 200, n=2, guidance=2, negative="b" * 200)
    assert visitor.page.evaluate(SEEN_WHOLE, visitor.at("canvas").element_handle()), (
        "the picture is not where it can be seen"
    )
    assert_fits()
    visitor.at("state").locator("summary").click()
    visitor.page.wait_for_selector("#workers tr")
    panel = visitor.page.locator("#state .panel")
    assert panel.evaluate("(panel) => panel.scrollWidth <= panel.clientWidth"), "something sticks out"
    box = panel.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    visitor.page.mouse.click(180, 700)
    visitor.look()
    assert visitor.at("lightbox").evaluate("(box) => box.scrollWidth <= 360")
    visitor.at("close").click()
    visitor.at("file").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": served.generate().images[0]}
    )
    expect(visitor.at("strength")).to_be_visible()
    assert_fits()


def test_everything_must_be_reached_by_keyboard(seen):
    press = seen.page.keyboard.press
    order = []
    for _ in range(12):
        press("Tab")
        order.append(seen.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    expected = ["SUMMARY", "language", "prompt", "generate", "INPUT", "width", "height", "seed", "n", "file", "SUMMARY"]
    assert order[: len(expected)] == expected
    seen.fill(width=64, height=64)
    seen.at("prompt").focus()
    for prompt in ("one", "two"):
        press("Control+A")
        seen.page.keyboard.type(prompt)
        press("Control+Enter")
        expect(seen.pictures.first.locator("img")).to_have_attribute("alt", prompt)
        expect(seen.at("generate")).to_be_visible()
        expect(seen.at("prompt")).to_be_focused()
    seen.at("deleteAll").focus()
    press("Tab")
    press("Enter")
    expect(seen.at("caption")).to_have_text("two")
    press("ArrowRight")
    expect(seen.at("caption")).to_have_text("one")
    press("ArrowRight")
    expect(seen.at("caption")).to_have_text("one")
    press("ArrowLeft")
    expect(seen.at("caption")).to_have_text("two")
    press("Escape")
    expect(seen.at("lightbox")).not_to_be_visible()
    expect(seen.pictures.first).to_be_focused()


def test_the_page_must_speak_chinese_where_the_browser_does_and_english_on_demand(visit, served):
    visitor = visit(served, locale="zh-CN")
    expect(visitor.at("generate")).to_contain_text("生成")
    expect(visitor.at("phase")).to_have_text("就绪")
    visitor.page.get_by_role("button", name="English").click()
    expect(visitor.at("generate")).to_contain_text("Generate")
    visitor.page.reload()
    expect(visitor.at("phase")).to_have_text("Ready")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_must_differ_enough_to_be_read(visit, served, scheme):
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for the edges of what is filled in (1.4.11)."""
    page = visit(served, color_scheme=scheme).page
    least = {
        4.5: ["ink paper", "ink card", "ink sunk", "ink accent-wash", "soft paper", "soft card", "soft sunk", *BUTTONS],
        3: ["edge card", "edge sunk", "accent card", "accent paper", "accent line"],
    }
    for ratio, pairs in least.items():
        for pair in pairs:
            colours = [
                page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{n}')")
                for n in pair.split()
            ]
            assert contrast(*colours) >= ratio, (pair, colours)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one.strip()), luminance(other.strip())))
    return (light + 0.05) / (dark + 0.05)


def test_nothing_must_move_for_those_who_asked_for_less_motion(visit, served):
    visitor = visit(served, reduced_motion="reduce")
    visitor.begin(edge=512, forwards=200, n=4)
    frame = visitor.page.locator(".frame").first
    expect(frame).to_be_visible()
    assert frame.evaluate("(frame) => getComputedStyle(frame).animationName") == "none"
    visitor.page.keyboard.press("Escape")
    expect(visitor.at("generate")).to_be_visible()


def test_a_hidden_page_must_leave_the_server_alone(seen):
    asked = []
    seen.page.on("request", lambda request: asked.append(request.url))
    seen.page.clock.install()
    seen.page.evaluate(HIDE, True)
    seen.page.clock.run_for(60_000)
    assert asked == []
    seen.page.evaluate(HIDE, False)
    eventually(lambda: seen.page.evaluate("1") and asked, "a question")
