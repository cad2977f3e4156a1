"""Whatever a hub does, and whenever zops is killed: verified, or an error that names the file, and nothing twice."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import faults, small_ranges
from tests.support.snapshots import write_pipeline
from zops.cache import fetch, ranges


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("origin"), shard_bytes=1_500_000)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((ranges, "RANGE_BYTES"), (ranges, "RANGED_BYTES"), (fetch, "FIRST_WAIT_S")):
        monkeypatch.setattr(module, name, getattr(module, name))
    small_ranges.shrink()


@pytest.mark.parametrize("hub", faults.HUBS)
def test_every_schedule_of_faults_must_end_as_promised(tmp_path: Path, origin: Path, hub: str) -> None:
    """Stalls need the SDKs' timeouts set before they are imported; they are played in processes of their own."""
    schedules = [each for each in faults.schedules(stalls=False) if each.hub == hub]
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda i: faults.play(schedules[i], origin, tmp_path / str(i)), range(len(schedules))))
    assert len(ends) >= 18
    assert {end.outcome for end in ends} == {"refused", "verified"}, "too kind, or too cruel, to show anything"


@pytest.mark.slow
def test_a_pull_that_is_killed_at_any_moment_must_be_completed_by_the_next_and_fetch_nothing_twice(
    tmp_path: Path, origin: Path
) -> None:
    dice = random.Random(10)
    kills = [
        faults.kill(faults.HUBS[number % 2], dice.uniform(0, 1.1), origin, tmp_path / str(number))
        for number in range(10)
    ]
    assert {killed.bytes_sent_again for killed in kills} == {0}
    assert any(killed.bytes_kept for killed in kills), "every kill came too early to show anything"
    assert sum(killed.ended_before for killed in kills) < 5, "the kills came too late to show anything"
