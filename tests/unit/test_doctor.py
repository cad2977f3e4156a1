"""The doctor: each check over hosts that are sound, sick, small, blind or elsewhere."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from zops.errors import HostShort, RuntimeUnreachable, SnapshotMissing, UsageError
from zops.health.backups import BACKUP_CHECKS
from zops.host.cdi import CdiFacts, CdiSpec
from zops.host.checks import CHECKS
from zops.host.context import Context, Need, Senses
from zops.host.disk import Disk, Mount
from zops.host.doctor import Diagnosis, diagnose, refusal
from zops.host.engine import EngineFacts
from zops.host.gpu import Gpu, GpuFacts, GpuProcess, Link
from zops.host.hub import Answer, Silence
from zops.host.kernel_log import KernelLog, Xid
from zops.host.memory import Memory
from zops.host.ports import Listener
from zops.spec import Spec

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "doctor.md"
GPU = Gpu(
    0, "GPU-aaaa", "NVIDIA H200", 150_754_820_096, 0, (9, 0), 40, 0, ecc_uncorrected_ever=0, slowdown_c=90,
    slowdowns=(), repair_pending=False, repair_failed=False, remapped_rows=0, persistence=True, at_full_speed=True,
    link=Link(5, 16, 5, 16), pci="0000:3b:00", processes=(),
)  # fmt: skip
SECOND = replace(GPU, index=1, uuid="GPU-bbbb", pci="0000:5e:00")
ENGINE = EngineFacts.from_info(
    {
        "ServerVersion": "29.1.0",
        "Runtimes": {"runc": {}, "nvidia": {}},
        "DiscoveredDevices": [
            {"Source": "cdi", "ID": "nvidia.com/gpu=all"},
            {"Source": "cdi", "ID": "nvidia.com/gpu=0"},
        ],
    }
)
HUB = "https://hub.invalid/api/models/someone/else"
NEED = Need(
    gpu_weights_bytes=20_500_000_000, gpu_activation_bytes=10_800_000_000, load_bytes=4_000_000_000,
    read_bytes=32_850_000_000, slim_bytes=20_500_000_000, torch_cuda="13.0", torch_from="torch 2.13 of the image",
)  # fmt: skip
CDI = CdiFacts((CdiSpec(Path("/etc/cdi/nvidia.yaml"), ("0", "GPU-aaaa", "all"), ("/usr/lib/libcuda.so.580.65",)),))
LINKS = ("/dev/char/195:0", "/dev/char/195:255")
DISK = Disk(
    Mount(Path("/data"), "xfs", "/dev/nvme1n1", "259:1", read_only=False),
    free_bytes=10**12, total_bytes=2 * 10**12, free_inodes=10**8, is_system=False, rotational=False,
)  # fmt: skip


def senses(**changes) -> Senses:
    sound = {
        "gpus": lambda: GpuFacts((GPU,), "580.65", "13.0"),
        "memory": lambda: Memory(256 * 10**9, 200 * 10**9),
        "disk": lambda _path: DISK,
        "shared_memory": lambda: 10**10,
        "measure_read": lambda _file: 2e9,
        "cdi": lambda _directories: CDI,
        "missing_char_links": lambda: (),
        "kernel_log": lambda: KernelLog(source="/dev/kmsg"),
        "hub": lambda _url, _authorization: Answer(200, ahead_s=0.5),
        "engine": lambda _engine: ENGINE,
        "why_not_bindable": lambda _host, _port: "",
        "listener": lambda _port: None,
    }
    return Senses(**(sound | changes))


def context(
    tmp_path: Path, *, need: Need = NEED, own_ports=(), file=Path("zops.yaml"), settings=None, **facts
) -> Context:
    spec = Spec.model_validate({"cache": {"dir": tmp_path / "cache"}} | (settings or {}))
    return Context(spec=spec, file=file, need=need, own_ports=frozenset(own_ports), senses=senses(**facts))


def verdict(check: str, subject: Context) -> tuple[str, str, str]:
    (result,) = diagnose(subject, CHECKS, only=[check]).results
    return result.verdict, result.finding.reason, result.finding.remedy


def gpus(*found: Gpu, **more):
    return lambda: GpuFacts(found, "580.65", "13.0", **more)


def disk(**changes):
    mount = replace(DISK.mount, **changes.pop("mount", {}))
    return lambda _path: replace(DISK, mount=mount, **changes)


def no_engine(_engine: str) -> EngineFacts:
    raise RuntimeUnreachable("no engine runs here", code="engine-not-running", hint="sudo systemctl start docker")


def runtime_only(_engine: str) -> EngineFacts:
    return replace(ENGINE, cdi_devices=(), cgroup_driver="systemd", cgroup_version="2")


def cgroupfs(_engine: str) -> EngineFacts:
    return replace(ENGINE, cdi_devices=(), cgroup_driver="cgroupfs")


def cdi(**changes):
    return lambda _directories: CdiFacts((replace(CDI.specs[0], **changes),))


def xids(*numbers: int, pci: str = "0000:3b:00", detail: str = ""):
    return lambda: KernelLog(tuple(Xid(number, pci, 1.0, detail) for number in numbers), "/dev/kmsg")


PROCESSES = (GpuProcess(7, "python", 2 * 10**9),)
BLACKWELL = replace(GPU, name="NVIDIA B200", compute_capability=(10, 0))
TWO = gpus(GPU, SECOND)
SICK = replace(SECOND, ecc_uncorrected=1)
MISSING = replace(NEED, disk_bytes=10**9, files=3, hub=HUB)
WITH_TOKEN = replace(MISSING, authorization="Bearer x")
NO_CDI = EngineFacts.from_info({"ServerVersion": "29.1.0", "Runtimes": {"runc": {}}, "DiscoveredDevices": []})


def test_a_sound_host_must_pass_every_check(tmp_path):
    diagnosis = diagnose(context(tmp_path), CHECKS)
    assert diagnosis.sound
    assert diagnosis.having("warn") == ()
    assert {result.id for result in diagnosis.having("skipped")} <= {
        "serve-extra", "cache-space", "clock", "hub", "cache-speed", "cache-access",
    }  # fmt: skip
    assert refusal(diagnosis) is None


def case(check, expected, word, **of):
    return pytest.param(check, expected, word, of, id=f"{check}-{expected}-{word.replace(' ', '-')}")


@pytest.mark.parametrize(
    ("check", "expected", "word", "of"),
    [
        case("spec", "warn", "no zops.yaml", file=None),
        case("gpu-driver", "fail", "no driver", gpus=lambda: GpuFacts(reason="no driver here")),
        case("gpu-driver", "warn", "GPU 1 cannot be read", gpus=gpus(GPU, reason="GPU 1 cannot be read")),
        case("gpu-driver", "skipped", "asks for no GPU", settings={"gpus": "none"}),
        case("gpu-driver", "skipped", "another machine", settings={"engine": "ssh://me@host"}),
        case("gpu-count", "fail", "there is none", gpus=gpus()),
        case("gpu-count", "fail", "names GPU 3", settings={"gpus": [0, 3]}),
        case("gpu-count", "ok", "1 asked for", settings={"gpus": ["GPU-aaaa"]}),
        case("gpu-count", "ok", "1 asked for", settings={"gpus": ["MIG-1234"]}),
        case("gpu-memory", "fail", "weights alone", gpus=gpus(replace(GPU, memory_total_bytes=16 * 10**9))),
        case("gpu-memory", "fail", "needs about", gpus=gpus(replace(GPU, memory_total_bytes=25 * 10**9))),
        case("gpu-memory", "warn", "free", gpus=gpus(replace(GPU, memory_used_bytes=140 * 10**9))),
        case("gpu-memory", "ok", "need", gpus=gpus(replace(GPU, memory_used_bytes=140 * 10**9)), own_ports=[8000]),
        case("gpu-memory", "ok", "not known", need=Need()),
        case("gpu-memory", "skipped", "no wanted GPU", gpus=gpus()),
        case("gpu-bfloat16", "fail", "older than Ampere", gpus=gpus(replace(GPU, compute_capability=(7, 5)))),
        case("gpu-bfloat16", "ok", "bfloat16", gpus=gpus(replace(GPU, compute_capability=(8, 0)))),
        case("gpu-bfloat16", "skipped", "does not tell", gpus=gpus(replace(GPU, compute_capability=None))),
        case("gpu-bfloat16", "skipped", "float32", settings={"serve": {"dtype": "float32"}}),
        case("gpu-condition", "fail", "2 uncorrectable", gpus=gpus(replace(GPU, ecc_uncorrected=2))),
        case("gpu-condition", "fail", "spare memory", gpus=gpus(replace(GPU, repair_failed=True))),
        case("gpu-condition", "fail", "spare memory", gpus=gpus(replace(GPU, retired_pages=60))),
        case("gpu-condition", "ok", "no repair", gpus=gpus(replace(GPU, retired_pages=59))),
        case("gpu-condition", "ok", "no repair", gpus=gpus(replace(GPU, ecc_uncorrected_ever=9, remapped_rows=3))),
        case("gpu-condition", "warn", "must be reset", gpus=gpus(replace(GPU, repair_pending=True))),
        case("gpu-condition", "fail", "GPU 1 counted", gpus=gpus(GPU, replace(SECOND, ecc_uncorrected=1))),
        case("gpu-condition", "ok", "no ECC", gpus=gpus(replace(GPU, ecc_uncorrected=None))),
        case("gpu-condition", "ok", "no unc", gpus=gpus(GPU, SICK), settings={"gpus": [0]}),
        case("gpu-slowdown", "warn", "88 degrees", gpus=gpus(replace(GPU, temperature_c=88))),
        case("gpu-slowdown", "ok", "not hot", gpus=gpus(replace(GPU, temperature_c=86))),
        case("gpu-slowdown", "warn", "85 degrees", gpus=gpus(replace(GPU, temperature_c=85, slowdown_c=None))),
        case("gpu-slowdown", "warn", "power brake", gpus=gpus(replace(GPU, slowdowns=("power brake",)))),
        case("gpu-slowdown", "ok", "not hot", gpus=gpus(replace(GPU, temperature_c=None, slowdowns=None))),
        case("gpu-persistence", "warn", "is off", gpus=gpus(GPU, replace(SECOND, persistence=False))),
        case("gpu-persistence", "skipped", "does not tell", gpus=gpus(replace(GPU, persistence=None))),
        case("gpu-link", "warn", "PCIe 5 x4 of 5 x16", gpus=gpus(replace(GPU, link=Link(5, 4, 5, 16)))),
        case("gpu-link", "warn", "PCIe 1 x16", gpus=gpus(replace(GPU, link=Link(1, 16, 5, 16)))),
        case("gpu-link", "ok", "1 x16", gpus=gpus(replace(GPU, link=Link(1, 16, 5, 16), at_full_speed=False))),
        case("gpu-link", "warn", "1 x8", gpus=gpus(replace(GPU, link=Link(1, 8, 5, 16), at_full_speed=False))),
        case("gpu-link", "skipped", "virtual", gpus=gpus(replace(GPU, link=None))),
        case("gpu-processes", "warn", "python (pid 7) with 2.0", gpus=gpus(replace(GPU, processes=PROCESSES))),
        case("gpu-processes", "ok", "our own", gpus=gpus(replace(GPU, processes=PROCESSES)), own_ports=[8000]),
        case("gpu-processes", "skipped", "does not tell", gpus=gpus(replace(GPU, processes=None))),
        case("gpu-cuda", "fail", "ends at 12.8", gpus=lambda: GpuFacts((GPU,), "570.1", "12.8")),
        case("gpu-cuda", "warn", "ends at 13.0", need=replace(NEED, torch_cuda="13.2")),
        case("gpu-cuda", "ok", "needs 12.6", need=replace(NEED, torch_cuda="12.6")),
        case("gpu-cuda", "fail", "newer than CUDA 12.6", need=replace(NEED, torch_cuda="12.6"), gpus=gpus(BLACKWELL)),
        case("gpu-cuda", "ok", "needs 13.0", gpus=gpus(BLACKWELL)),
        case("gpu-cuda", "fail", "build for CPUs", need=replace(NEED, torch_cuda="cpu")),
        case("gpu-cuda", "skipped", "nothing says", need=replace(NEED, torch_cuda="")),
        case("gpu-xid", "fail", "Xid 79 on GPU 0", kernel_log=xids(79)),
        case("gpu-xid", "fail", "Xid 95 on GPU 0, ", kernel_log=xids(31, 95, 31)),
        case("gpu-xid", "warn", "2 times", kernel_log=xids(31, 31)),
        case("gpu-xid", "ok", "none that asks", kernel_log=xids(63, 45)),
        case("gpu-xid", "warn", "not in the table", kernel_log=xids(999)),
        case("gpu-xid", "fail", "the GPU at 0000:99:00", kernel_log=xids(79, pci="0000:99:00")),
        case("gpu-xid", "ok", "none", kernel_log=xids(79, pci=SECOND.pci), gpus=TWO, settings={"gpus": [0]}),
        case("gpu-xid", "fail", "tells how", kernel_log=xids(154, detail="changed to 0x1 (GPU Reset Required)")),
        case("gpu-xid", "skipped", "cannot be read", kernel_log=lambda: KernelLog(reason="the log cannot be read")),
        case("gpu-xid", "skipped", "no GPU", settings={"gpus": "none"}),
        case("engine", "fail", "no engine runs here", engine=no_engine),
        case("engine", "skipped", "needs no container engine", settings={"runtime": "process"}),
        case("engine-gpu", "fail", "neither CDI", engine=lambda _engine: NO_CDI),
        case("engine-gpu", "ok", "CDI"),
        case("engine-gpu", "skipped", "does not answer", engine=no_engine),
        case("engine-gpu", "skipped", "no container with a GPU", settings={"gpus": "none"}),
        case("engine", "warn", "gets no fixes", engine=lambda _engine: replace(ENGINE, version="19.03.1")),
        case("engine-cdi", "ok", "fits the driver"),
        case("engine-cdi", "fail", "for driver 570.1, 580.65 is", cdi=cdi(paths=("/usr/lib/libcuda.so.570.1",))),
        case("engine-cdi", "warn", "570.1", cdi=cdi(paths=("/usr/lib/libcuda.so.570.1",)), engine=runtime_only),
        case("engine-cdi", "fail", "names /gone, which", cdi=cdi(missing=("/gone",))),
        case("engine-cdi", "fail", "not list GPU 1", gpus=gpus(GPU, SECOND)),
        case("engine-cdi", "ok", "fits", cdi=cdi(devices=("GPU-aaaa", "all"))),
        case("engine-cdi", "fail", "not list GPU all", cdi=cdi(devices=("0",))),
        case("engine-cdi", "warn", "cannot be read: x", cdi=lambda _directories: CdiFacts((), ("x: not YAML",))),
        case("engine-cdi", "skipped", "runtime is used", cdi=lambda _directories: CdiFacts()),
        case("engine-cdi", "skipped", "does not answer", engine=no_engine),
        case("engine-cgroup", "ok", "CDI", missing_char_links=lambda: LINKS),
        case("engine-cgroup", "warn", "daemon-reload", engine=runtime_only, missing_char_links=lambda: LINKS),
        case("engine-cgroup", "ok", "has its link", engine=runtime_only),
        case("engine-cgroup", "skipped", "no device nodes", engine=runtime_only, missing_char_links=lambda: None),
        case("engine-cgroup", "ok", "cgroupfs", engine=cgroupfs, missing_char_links=lambda: LINKS),
        case("shm", "ok", "gets 1.1 GB"),
        case("shm", "warn", "bus error", settings={"resources": {"shm": "32MiB"}}),
        case("shm", "warn", "more than this host", settings={"resources": {"shm": "4000GB"}}),
        case("shm", "warn", "has 0 MB", settings={"runtime": "process"}, shared_memory=lambda: None),
        case("shm", "ok", "has 10.0 GB", settings={"runtime": "process"}),
        case("clock", "fail", "1000 s ahead", need=MISSING, hub=lambda *_: Answer(200, ahead_s=1000)),
        case("clock", "warn", "60 s behind", need=MISSING, hub=lambda *_: Answer(200, ahead_s=-60)),
        case("hub", "ok", "answers", need=MISSING),
        case("hub", "skipped", "nothing is missing", need=replace(MISSING, disk_bytes=0)),
        case("hub", "skipped", "source.kind is", need=replace(MISSING, hub="")),
        case("hub", "warn", "cannot be resolved", need=MISSING, hub=lambda *_: Silence("its name cannot be resolved")),
        case("hub", "fail", "wants a token", need=MISSING, hub=lambda *_: Answer(401)),
        case("hub", "fail", "refuses our token", need=WITH_TOKEN, hub=lambda *_: Answer(403)),
        case("hub", "warn", "wants a token", need=replace(MISSING, has_other_source=True), hub=lambda *_: Answer(401)),
        case("hub", "warn", "does not know", need=MISSING, hub=lambda *_: Answer(404)),
        case("hub", "warn", "HTTP 503", need=MISSING, hub=lambda *_: Answer(503)),
        case("memory-warm", "ok", "can stay"),
        case("memory-warm", "warn", "every start", memory=lambda: Memory(64 * 10**9, 30 * 10**9)),
        case("memory-warm", "warn", "left for keeping", memory=lambda: Memory(64 * 10**9, 10 * 10**9)),
        case("memory-warm", "skipped", "not known", need=Need()),
        case("memory", "fail", "this host has 2.0 GB", memory=lambda: Memory(2 * 10**9, 10**9)),
        case("memory", "fail", "this host has 3.0 GB", memory=lambda: Memory(64 * 10**9, 60 * 10**9, 3 * 10**9)),
        case("memory", "warn", "only 1.0 GB", memory=lambda: Memory(64 * 10**9, 10**9)),
        case("memory", "fail", "resources.memory grants", settings={"resources": {"memory": "2GB"}}),
        case("memory", "ok", "not known", need=Need(), memory=lambda: Memory(2 * 10**9, 10**9)),
        case("cache-directory", "fail", "read-only", disk=disk(mount={"read_only": True})),
        case("cache-file-system", "warn", "over a network", disk=disk(mount={"system": "nfs4"})),
        case("cache-file-system", "warn", "container's own layer", disk=disk(mount={"system": "overlay"})),
        case("cache-file-system", "warn", "in memory", disk=disk(mount={"system": "tmpfs"})),
        case("cache-system-disk", "warn", "reset", disk=disk(is_system=True)),
        case("cache-space", "skipped", "not known"),
        case("cache-space", "ok", "nothing is missing", need=Need(disk_bytes=0)),
        case("cache-space", "ok", "will fit", need=Need(disk_bytes=10**10, files=20)),
        case("cache-space", "fail", "has 5.0 GB free", need=Need(disk_bytes=10**10), disk=disk(free_bytes=5 * 10**9)),
        case("cache-space", "warn", "just fit", need=Need(disk_bytes=10**10), disk=disk(free_bytes=10**10 + 1)),
        case("cache-space", "fail", "3 inodes", need=Need(disk_bytes=9, files=20), disk=disk(free_inodes=3)),
        case("cache-space", "ok", "will fit", need=Need(disk_bytes=9, files=20), disk=disk(free_inodes=None)),
        case(
            "port", "fail", "taken by nginx (pid 7)",
            why_not_bindable=lambda _h, _p: "in use", listener=lambda _p: Listener(7, "nginx"),
        ),
        case("port", "fail", "only root can see", why_not_bindable=lambda _h, _p: "in use"),
        case("port", "fail", "below 1024", why_not_bindable=lambda _h, _p: "only root may bind a port below 1024"),
        case("port", "ok", "our own instance", why_not_bindable=lambda _h, _p: "in use", own_ports=[8000]),
        case("serve-extra", "skipped", "only runtime: process"),
    ],
)  # fmt: skip
def test_each_state_of_a_host_must_have_its_verdict_and_a_remedy(tmp_path, check, expected, word, of):
    given, reason, remedy = verdict(check, context(tmp_path, **of))
    assert (given, word in reason) == (expected, True), reason
    assert bool(remedy) == (expected in {"warn", "fail"})


def test_a_directory_that_cannot_be_made_must_fail(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert verdict("cache-directory", context(tmp_path))[:2] == ("fail", f"{tmp_path / 'cache'} is no directory")


def test_what_the_system_refuses_to_show_must_be_skipped_with_its_reason(tmp_path):
    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    given, reason, _ = verdict("cache-space", context(tmp_path, disk=refuse))
    assert given == "skipped"
    assert "Permission denied" in reason


def test_a_bug_in_a_check_must_keep_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        verdict("memory", context(tmp_path, memory=lambda: 1 // 0))


def test_only_the_facts_that_a_check_needs_must_be_read(tmp_path):
    def forbidden(*_arguments):
        raise AssertionError

    subject = context(tmp_path, gpus=forbidden, engine=forbidden, memory=forbidden, disk=forbidden, listener=forbidden)
    assert verdict("port", subject)[0] == "ok"


def test_facts_must_be_read_once_for_all_checks(tmp_path):
    reads = []

    def read():
        reads.append(1)
        return GpuFacts((GPU,), "580.65", "13.0")

    diagnose(context(tmp_path, gpus=read), CHECKS)
    assert reads == [1]


def test_an_unknown_check_must_be_a_usage_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="no check gpus") as caught:
        diagnose(context(tmp_path), CHECKS, only=["gpus"])
    assert "gpu-driver" in caught.value.hint


def test_a_host_with_a_failed_check_must_be_refused_with_its_remedy(tmp_path):
    error = refusal(diagnose(context(tmp_path, engine=no_engine), CHECKS))
    assert error is not None
    assert error.code == "host-unfit"
    assert "no engine runs here" in error.message
    assert "sudo systemctl start docker" in error.hint


def test_checks_that_wait_must_wait_side_by_side(tmp_path):
    meeting = threading.Barrier(4, timeout=10)

    def meet(value):
        def read(*_arguments):
            meeting.wait()
            return value

        return read

    subject = context(
        tmp_path, need=MISSING, gpus=meet(GpuFacts((GPU,), "580.65", "13.0")), engine=meet(ENGINE),
        kernel_log=meet(KernelLog(source="x")), hub=meet(Answer(200, 0.0)),
    )  # fmt: skip
    # The barrier breaks, and the checks raise, unless all four facts are being read at the same time.
    assert diagnose(subject, CHECKS).sound


def test_a_fix_must_be_offered_only_where_it_loses_nothing(tmp_path):
    subject = context(
        tmp_path, gpus=gpus(replace(GPU, persistence=False, ecc_uncorrected=1)), engine=runtime_only,
        missing_char_links=lambda: LINKS, cdi=cdi(missing=("/gone",)), kernel_log=xids(79),
    )  # fmt: skip
    diagnosis = diagnose(subject, CHECKS)
    assert {result.id: result.finding.fix[0] for result in diagnosis.fixable} == {
        "gpu-persistence": "nvidia-smi",
        "engine-cdi": "nvidia-ctk",
        "engine-cgroup": "nvidia-ctk",
    }


def test_a_snapshot_that_the_container_cannot_read_must_fail_and_be_fixable(tmp_path):
    def unreadable(_facts):
        raise HostShort("not readable", code="cache-unreadable", hint="chmod")

    subject = replace(context(tmp_path, need=replace(NEED, snapshot=tmp_path)), readable=unreadable)
    (result,) = diagnose(subject, CHECKS, only=["cache-access"]).results
    assert (result.verdict, result.finding.fix[:2]) == ("fail", ("chmod", "-R"))


def test_a_snapshot_that_is_not_verified_yet_must_not_stop_the_pull_that_mends_it(tmp_path):
    def unverified(_facts):
        raise SnapshotMissing("never verified")

    subject = replace(context(tmp_path, need=replace(NEED, snapshot=tmp_path)), readable=unverified)
    assert verdict("cache-access", subject)[0] == "skipped"


@pytest.mark.parametrize(("speed", "expected"), [(3e9, "ok"), (200e6, "warn"), (10e6, "warn")])
def test_a_slow_disk_must_be_told_in_seconds_of_a_cold_start(tmp_path, speed, expected):
    with (tmp_path / "shard.safetensors").open("wb") as shard:
        shard.truncate(64 * 1024 * 1024)
    subject = context(tmp_path, need=replace(NEED, snapshot=tmp_path), measure_read=lambda _file: speed)
    given, reason, _ = verdict("cache-speed", subject)
    assert given == expected
    assert f"32.9 GB in {32.85e9 / speed:.0f} s" in reason
    assert f"20.5 GB in {20.5e9 / speed:.0f} s when slim" in reason


def test_a_small_file_must_not_be_taken_for_a_measure_of_the_disk(tmp_path):
    (tmp_path / "tiny.safetensors").write_bytes(b"x" * 4096)
    assert verdict("cache-speed", context(tmp_path, need=replace(NEED, snapshot=tmp_path)))[0] == "skipped"


def test_the_counts_must_add_up_to_the_checks(tmp_path):
    diagnosis = diagnose(context(tmp_path, engine=no_engine, file=None), CHECKS)
    body = diagnosis.as_json()
    assert sum(body["counts"].values()) == len(body["checks"]) == len(CHECKS)
    assert body["sound"] is False
    assert Diagnosis(()).summary == "0 failed, 0 to look at, 0 ok, 0 skipped"


def test_every_check_must_have_its_own_id_and_say_what_it_looks_at():
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    assert all(check.looks_at.endswith(".") for check in CHECKS)


def test_the_page_must_describe_every_check_and_no_other():
    text = PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == [check.id for check in (*CHECKS, *BACKUP_CHECKS)]
    for name, section in sections.items():
        assert all(word in section for word in ("Looks", "Why:", "Remedy:")), name
