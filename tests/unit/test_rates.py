"""Token buckets, and what one client may ask for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zops.serving.errors import ApiError
from zops.serving.keys import Client
from zops.serving.rates import Allowance, Bucket, Rates
from zops.spec.keys import ApiKey

HASH = "0" * 64
rates = st.integers(1, 10_000)
gaps = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 20)), max_size=60)


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


def client(name="web", **limits):
    return Client(name, ApiKey(sha256=HASH, **limits))


@given(rates, gaps)
def test_no_span_of_time_must_give_more_than_its_share(per_minute, arrivals):
    """From any taking to any later one: at most a full bucket and what was refilled meanwhile."""
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, []
    for gap, count in arrivals:
        now += gap
        if bucket.take(count, now) == 0.0:
            taken.append((now, count))
    for first in range(len(taken)):
        total = 0
        for moment, count in taken[first:]:
            total += count
            assert total <= per_minute * (1 + (moment - taken[first][0]) / 60) + 1e-3


@given(rates, st.floats(0, 120))
def test_an_empty_bucket_must_fill_evenly_within_a_minute(per_minute, seconds):
    bucket = Bucket(per_minute, 0.0)
    assert bucket.take(per_minute, 0.0) == 0.0
    assert bucket.level(seconds) == pytest.approx(per_minute * min(1.0, seconds / 60), abs=1e-6)


@given(rates, gaps)
def test_the_level_must_stay_between_empty_and_full(per_minute, arrivals):
    bucket, now = Bucket(per_minute, 0.0), 0.0
    for gap, count in arrivals:
        now += gap
        bucket.take(count, now)
        assert 0 <= bucket.level(now) <= per_minute


@given(rates, gaps, st.integers(1, 20))
def test_whoever_comes_when_told_must_be_let_in(per_minute, arrivals, count):
    bucket, now = Bucket(per_minute, 0.0), 0.0
    for gap, size in arrivals:
        now += gap
        bucket.take(size, now)
    wait_s = bucket.take(count, now)
    if math.isinf(wait_s):
        assert count > per_minute
    elif wait_s:
        assert bucket.take(count, now + wait_s / 2) > 0
        assert bucket.take(count, now + wait_s) == 0.0


@given(rates, st.lists(st.floats(-100, 100), max_size=20))
def test_a_moment_from_the_past_must_neither_add_nor_take(per_minute, moments):
    bucket = Bucket(per_minute, 0.0)
    bucket.take(1, 0.0)
    for moment in moments:
        before = bucket.level(max(0.0, *moments))
        assert bucket.level(moment) >= before - 1e-6


def test_a_client_without_limits_must_never_wait():
    allowance = Allowance()
    for _ in range(10_000):
        allowance.take_request()
        allowance.take_images(10)
        allowance.take_place()
    assert allowance.headers() == {}


def test_a_limit_must_be_told_with_when_to_come_back():
    clock = Clock()
    allowance = Rates(clock).allowance(client(requests_per_minute=2))
    allowance.take_request()
    assert allowance.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30.000s",
    }
    allowance.take_request()
    with pytest.raises(ApiError) as raised:
        allowance.take_request()
    assert (raised.value.code, raised.value.status) == ("rate_limit_exceeded", 429)
    assert raised.value.headers() == {"Retry-After": "30"}
    clock.now += 30
    allowance.take_request()


def test_images_must_count_by_their_number():
    allowance = Rates(Clock()).allowance(client(images_per_minute=4))
    allowance.take_images(3)
    with pytest.raises(ApiError) as raised:
        allowance.take_images(2)
    assert raised.value.code == "rate_limit_exceeded"
    allowance.take_images(1)


def test_what_never_fits_must_not_be_asked_to_come_back():
    with pytest.raises(ApiError) as raised:
        Rates(Clock()).allowance(client(images_per_minute=4)).take_images(5)
    assert (raised.value.code, raised.value.retry_after_s) == ("too_many_images", None)


def test_two_requests_of_a_key_must_share_its_limits_and_another_key_none():
    rates = Rates(Clock())
    rates.allowance(client(requests_per_minute=1)).take_request()
    with pytest.raises(ApiError):
        rates.allowance(client(requests_per_minute=1)).take_request()
    rates.allowance(client("shop", requests_per_minute=1)).take_request()


def test_a_limit_that_changes_in_the_file_must_count_at_once():
    rates = Rates(Clock())
    rates.allowance(client(requests_per_minute=1)).take_request()
    for _ in range(3):
        rates.allowance(client(requests_per_minute=3)).take_request()
    rates.allowance(client()).take_request()


def test_places_must_be_given_back_once_and_kept_ones_later():
    allowance = Rates(Clock()).allowance(client(max_waiting=1))
    with allowance.take_place(), pytest.raises(ApiError) as raised:
        allowance.take_place()
    assert raised.value.code == "queue_full"
    with allowance.take_place() as place:
        kept = place.keep()
    with pytest.raises(ApiError):
        allowance.take_place()
    kept.give_back()
    kept.give_back()
    with allowance.take_place():
        pass


def test_keys_that_are_gone_must_be_forgotten_but_not_while_they_run():
    rates = Rates(Clock())
    rates.allowance(client("gone", requests_per_minute=1)).take_request()
    place = rates.allowance(client("busy", max_waiting=1)).take_place()
    rates.forget_all_but(frozenset({"web"}))
    rates.allowance(client("gone", requests_per_minute=1)).take_request()
    with pytest.raises(ApiError):
        rates.allowance(client("busy", max_waiting=1)).take_place()
    place.give_back()
