"""Images behind URLs are kept within bytes and time, each for the client that had it made."""

import pytest

from zops.serving.errors import ApiError
from zops.serving.results import Results


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def results(clock):
    return Results(100, 60, clock=clock)


def code(results, name, client=""):
    with pytest.raises(ApiError) as caught:
        results.fetch(name, client)
    return caught.value.code


def test_an_image_must_be_handed_out_as_often_as_it_is_asked_for(results):
    name = results.keep(b"abc", "image/png", "alice")
    for _ in range(2):
        found = results.fetch(name, "alice")
        assert (found.content, found.media_type) == (b"abc", "image/png")


def test_an_image_of_somebody_else_must_look_as_if_it_were_not_there(results, clock):
    name = results.keep(b"abc", "image/png", "alice")
    assert code(results, name, "bob") == code(results, name, "") == code(results, "img_x", "alice") == "not_found"
    clock.now = 61
    assert code(results, name, "bob") == "not_found"


def test_an_image_must_expire_and_free_its_memory(results, clock):
    name = results.keep(b"abc", "image/png", "")
    clock.now = 59.9
    assert results.fetch(name, "").content == b"abc"
    clock.now = 60
    assert code(results, name) == "result_expired"
    assert results.size_bytes == 0


def test_the_oldest_image_must_make_room(results):
    names = [results.keep(bytes(40), "image/png", "") for _ in range(3)]
    assert code(results, names[0]) == "result_expired"
    assert len(results.fetch(names[1], "").content) == len(results.fetch(names[2], "").content) == 40
    assert results.size_bytes == 80


def test_names_must_not_be_guessable(results):
    names = {results.keep(b"", "image/png", "") for _ in range(50)}
    assert len(names) == 50
    assert all(len(name) >= 36 for name in names)


def test_what_is_remembered_of_gone_images_must_be_bounded(results, clock):
    first = results.keep(b"a", "image/png", "")
    clock.now = 61
    assert code(results, first) == "result_expired"
    for _ in range(5000):
        results.keep(bytes(60), "image/png", "")
    assert code(results, first) == "not_found"
