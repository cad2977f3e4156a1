"""What an operator types as a rate or time must mean what everybody thinks it means."""

import click
import pytest

from zops.cli import quantities


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200MB/s", 2e8), ("200M", 2e8), ("1.5GB/s", 1.5e9), ("190MiB/s", 190 * 2**20), ("64kB", 64e3), ("4096", 4096)],
)
def test_a_rate_must_be_in_bytes_a_second(text: str, expected: float) -> None:
    assert quantities.rate(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0MB/s", "fast", "-1MB/s", "1MB/h", "MB/s", "1e9"])
def test_what_is_no_rate_must_be_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        quantities.rate(text)


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2d", 172800)])
def test_a_time_must_be_in_seconds(text: str, expected: float) -> None:
    assert quantities.time(text) == expected


@pytest.mark.parametrize("text", ["", "30", "m", "1h 30m", "-1h", "1w"])
def test_what_is_no_time_must_be_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        quantities.time(text)
