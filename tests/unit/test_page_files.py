"""What the page consists of, looked at without a browser."""

import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from zops.serving.web import DIRECTORY, add_page

ASSETS = {path.name: path for path in (DIRECTORY / "assets").iterdir()}
SCRIPTS = {name: path.read_text(encoding="utf-8") for name, path in ASSETS.items() if name.endswith(".js")}
DOCUMENT = (DIRECTORY / "index.html").read_text(encoding="utf-8")
CODE = "\n".join(text for name, text in SCRIPTS.items() if name != "texts.js")


def texts(language):
    """The names of the texts that a language has in texts.js."""
    [block] = re.findall(rf"^const {language} = {{\n(.*?)^}};", SCRIPTS["texts.js"], re.MULTILINE | re.DOTALL)
    return re.findall(r"^  (\w+): ", block, re.MULTILINE)


def test_every_text_must_be_there_in_both_languages_and_none_be_left_over():
    stand = set(re.findall(r'data-(?:text|label|hint)="(\w+)"', DOCUMENT))
    english, chinese = texts("EN"), texts("ZH")
    assert set(english) & stand == set(), "said twice"
    assert set(english) | stand == set(chinese)
    said = stand | {name for name in english if f'"{name}"' in CODE or name.startswith("phase_")}
    assert set(chinese) == said
    assert english == list(dict.fromkeys(english))


def test_every_phase_of_the_server_must_have_a_text():
    from zops.serving.app import READY_PHASES

    assert {f"phase_{phase}" for phase in READY_PHASES} <= set(texts("ZH"))


def test_every_element_that_a_script_asks_for_must_be_in_the_document():
    asked = set(re.findall(r'\bat\("(\w+)"\)', CODE)) | set(re.findall(r'copyOf\("(\w+)"\)', CODE))
    there = re.findall(r'\bid="(\w+)"', DOCUMENT)
    assert asked - set(there) == set()
    assert len(there) == len(set(there))


def test_the_document_must_have_nothing_inline_and_nothing_from_elsewhere():
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?:", DOCUMENT)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", DOCUMENT))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", "\n".join(SCRIPTS.values())
    )
    assert set(re.findall(r"https?://[^\"\s]+", "\n".join(SCRIPTS.values()))) == set()


def test_what_goes_over_the_line_must_stay_small():
    app = FastAPI()
    add_page(app)
    with TestClient(app) as client:
        answers = [client.get("/"), *(client.get(f"/assets/{name}") for name in ASSETS)]
        assert {answer.status_code for answer in answers} == {200}
        assert sum(int(answer.headers["content-length"]) for answer in answers) < 40_000
        for answer in answers:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/assets/../web.py", "/assets/%2e%2e/web.py", "/assets/..%2f..%2fapp.py", "/assets/"])
def test_no_other_file_must_be_served(path):
    app = FastAPI()
    add_page(app)
    with TestClient(app) as client:
        assert client.get(path).status_code == 404
