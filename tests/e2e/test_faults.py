"""Each fault on a real engine: the verdict names it, the watch heals it (or rightly leaves it), and in time.

The engine is a private one, so that no watch of ours ever looks at containers of others.
"""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.health.calm import keep_calm
from tests.support.engine_faults import FakeGpu, Victim, fill_cache, tell_truth_of
from tests.support.fault_cases import CASES, LOOK_EVERY_S, play
from tests.support.full_disk import small_disk
from tests.support.host import Host
from tests.support.private_engine import PrivateEngine, has_layers, private_engine
from tests.support.waiting import eventually
from tests.support.watching import EAGER, Watching, watching

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# One that was restarted so often lately is not judged well; the next fault gets a fresh one.
MANY_RESTARTS = 3
# Other tests run on the same cores; benchmarks/health/faults.py holds the times to what was promised.
BUSY_S = 15.0
# The engine doubles its pause before each new start.
ENGINE_PAUSE_S = 15.0


@dataclass
class Scene:
    """An instance that serves, and how long its start took."""

    victim: Victim
    start_s: float
    root: Path


@pytest.fixture(scope="module")
def engine(inference_image: str) -> Iterator[PrivateEngine]:
    if os.geteuid() != 0 or not has_layers(inference_image):
        pytest.skip("a second engine takes root, and a first one that keeps its images with overlay2")
    with private_engine(inference_image) as engine:
        yield engine


@pytest.fixture(scope="module")
def scene(engine: PrivateEngine, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("faults")
    victim = Victim.of(engine, fill_cache(root / "cache"), "victim")
    began = time.monotonic()
    victim.up()
    victim.wait_ready()
    return Scene(victim, time.monotonic() - began, root)


@pytest.fixture
def victim(scene: Scene) -> Victim:
    """The instance, made anew where a test before left it unwell."""
    if not scene.victim.is_ready() or scene.victim.instance.restarts >= MANY_RESTARTS:
        scene.victim.remove()
        scene.victim.up()
        scene.victim.wait_ready()
    return scene.victim


def test_an_engine_that_is_restarted_must_be_reported_and_its_instance_left_to_it(victim, scene) -> None:
    with watching(scene.root / "engine", engine=victim.engine.url, watch=EAGER) as watch:
        began = watch.expect(0, "instance-found")["seconds_at"]
        before = victim.state["StartedAt"]
        victim.engine.stop()
        lost = watch.expect(began, "engine-unreachable")["seconds_at"]
        victim.engine.start()
        back = watch.expect(lost, "engine-reachable")["seconds_at"]
        victim.wait_ready()
        print(f"engine back after {back - lost:.1f} s, instance {time.time() - back:.1f} s later")
        watch.expect(back, "verdict", instance=victim.name, verdict="ok")
        assert victim.state["StartedAt"] != before, "the engine did not stop its containers"
        assert watch.since(began, "healing") == []
        assert time.time() - back <= scene.start_s + BUSY_S


def test_a_lost_gpu_must_have_its_instance_recreated_exactly_once(engine, victim, scene) -> None:
    gpu = FakeGpu.build(scene.root / "nvml")
    patient = Victim.of(engine, victim.snapshot, "gpu", gpus="all")
    patient.change = gpu.mount
    victim.container.stop(timeout=10)  # ends by itself: stopped on purpose, and left alone
    try:
        patient.up()
        patient.wait_ready()
        with watching(scene.root / "gpu", engine=engine.url, watch=EAGER) as watch:
            # There is no GPU to compute on, which is as good as it gets here.
            watch.expect(0, "verdict", instance="gpu", code="gpu-unused")
            before = patient.container.id
            lost = time.time()
            gpu.take_from(patient)
            verdict = watch.expect(lost, "verdict", instance="gpu", code="gpu-lost")["seconds_at"]
            assert verdict - lost <= 2 * EAGER["interval_s"] + LOOK_EVERY_S + BUSY_S
            watch.expect(verdict, "healing", instance="gpu", code="gpu-lost", action="recreate")
            back = watch.expect(verdict, "verdict", instance="gpu", code="gpu-unused")["seconds_at"]
            assert back - verdict <= scene.start_s + BUSY_S
            print(f"gpu-lost after {verdict - lost:.1f} s, back {back - verdict:.1f} s later")
            healings = watch.since(lost, "healing", instance="gpu")
            assert [event["action"] for event in healings] == ["recreate"], healings
            assert patient.container.id != before
    finally:
        patient.remove()
        victim.container.start()


def test_a_server_that_says_200_while_nothing_works_must_be_found_out_by_its_pictures(engine, victim, scene) -> None:
    truth = scene.root / "liar"
    liar = tell_truth_of(victim, truth)
    victim.container.stop(timeout=10)  # ends by itself: stopped on purpose, and left alone
    try:
        liar.up()
        liar.wait_ready()
        settings = EAGER | {"canary_every_s": 0.1}
        with watching(scene.root / "found-out", engine=engine.url, watch=settings) as watch:
            watch.expect(0, "verdict", instance="liar", verdict="ok")
            before = liar.state["StartedAt"]
            lied = time.time()
            (truth / "lie").touch()
            verdict = watch.expect(lied, "verdict", instance="liar", code="canary-failed")
            assert (verdict["layer"], verdict["verdict"]) == ("canary", "failed")
            assert verdict["seconds_at"] - lied <= 2 * EAGER["interval_s"] + BUSY_S
            # A restart does not help, so the next is the stronger one.
            for action in ("restart", "recreate"):
                verdict = watch.expect(verdict["seconds_at"], "healing", instance="liar", action=action)
            (truth / "lie").unlink()
            watch.expect(verdict["seconds_at"], "verdict", instance="liar", verdict="ok")
            assert liar.state["StartedAt"] != before
    finally:
        liar.remove()
        victim.container.start()


def test_a_busy_server_must_never_be_healed(engine, victim, tmp_path_factory) -> None:
    # In long: python -m benchmarks.health.calm
    victim.container.stop(timeout=10)
    try:
        calm = keep_calm(engine, tmp_path_factory.mktemp("calm"), seconds=12, clients=16, canary_every_s=2)
    finally:
        victim.container.start()
    print(calm)
    assert calm.heals == 0
    assert [text for text in calm.verdicts if "failed" in text] == []
    assert calm.failed == []
    assert calm.pictures > 20
    assert calm.canaries_s


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave not one byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    assert os.statvfs(disk).f_bavail == 0
    yield
    ballast.unlink()


def test_full_disks_must_stop_neither_the_instance_nor_the_watch(tiny_model, tmp_path) -> None:
    """A process has its log on our disk; a container's is the engine's, bounded by the options it is made with."""
    host = Host(tmp_path / "host", tiny_model, name="full", runtime="process")
    with small_disk(host.root / "state") as disk:
        host.run("provision")
        try:
            with full(disk):
                first = host.image(seed=7)
                for _ in range(10):
                    assert host.image(seed=7) == first
                argv = ("--events", "/dev/full")
                with watching(tmp_path / "watch", *argv, state=disk, runtime="process", watch=EAGER) as watch:
                    began = watch.expect(0, "verdict", instance="full", verdict="ok")["seconds_at"]

                    def struck() -> bool:
                        # A worker may be back before two probes missed it; each next one takes longer.
                        if host.ready():
                            with (
                                suppress(OSError),
                                urllib.request.urlopen(f"http://127.0.0.1:{host.port}/readyz") as answer,
                            ):
                                os.kill(json.load(answer)["workers"][0]["pid"], signal.SIGKILL)
                        return bool(watch.since(began, "verdict", instance="full", code="worker-down"))

                    # It goes on watching, and the instance mends itself: nothing of that needs a disk.
                    eventually(struck, "the loss of the worker to be told", timeout_s=60)
                    watch.expect(began + 0.001, "verdict", instance="full", verdict="ok", timeout_s=90)
                    assert watch.since(0, "healing") == []
                assert host.image(seed=7) == first
        finally:
            host.run("down")


@pytest.fixture(scope="module")
def watch(request: pytest.FixtureRequest, scene: Scene) -> Iterator[Watching]:
    """A watch: shallow, or deep with a canary at each probe.

    One at a time, or each would heal what the other does. It stays until the module ends, so no other test may come
    after those that use it.
    """
    settings = EAGER | ({"canary_every_s": 0.1} if request.param == "deep" else {})
    with watching(scene.root / request.param, engine=scene.victim.engine.url, watch=settings) as watch:
        yield watch


@pytest.mark.parametrize(
    ("watch", "case"),
    [pytest.param("deep" if case.deep else "shallow", case, id=case.name) for case in CASES if case.in_suite],
    indirect=["watch"],
    scope="module",
)
def test_a_fault_must_be_named_and_healed_in_time(watch, case, victim, scene) -> None:
    outcome = play(case, victim, watch)
    print(outcome)
    if not case.fleeting:
        assert outcome.verdict_s is not None
        assert outcome.verdict_s <= 2 * EAGER["interval_s"] + case.notice_s + BUSY_S
    # Beside others on the same cores this start may have taken longer than the first.
    start_s = max(scene.start_s, outcome.start_s)
    assert outcome.served_s <= start_s + BUSY_S + (ENGINE_PAUSE_S if case.restraint == "gave-up" else 0)
    assert outcome.actions == ((case.action,) if case.action else ())
    if not case.restraint:
        assert outcome.replaced == (case.action == "recreate")
        assert outcome.loud == ()
