"""The doctor: each check over hosts that are sound, sick, small, blind or elsewhere."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from zops.errors import RuntimeUnreachable, UsageError
from zops.health.backups import BACKUP_CHECKS
from zops.host.checks import CHECKS
from zops.host.disk import Disk, Mount
from zops.host.doctor import Context, Diagnosis, Need, Senses, diagnose, refusal
from zops.host.engine import EngineFacts
from zops.host.gpu import Gpu, GpuFacts
from zops.host.memory import Memory
from zops.host.ports import Listener
from zops.spec import Spec

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "doctor.md"
GPU = Gpu(0, "GPU-aaaa", "NVIDIA H200", 150_754_820_096, 0, (9, 0), 40, 0)
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
NEED = Need(gpu_weights_bytes=20_500_000_000, gpu_activation_bytes=10_800_000_000, load_bytes=4_000_000_000)
DISK = Disk(
    Mount(Path("/data"), "xfs", "/dev/nvme1n1", "259:1", read_only=False),
    free_bytes=10**12, total_bytes=2 * 10**12, free_inodes=10**8, is_system=False, rotational=False,
)  # fmt: skip


def senses(**changes) -> Senses:
    sound = {
        "gpus": lambda: GpuFacts((GPU,), "580.65", "13.0"),
        "memory": lambda: Memory(256 * 10**9, 200 * 10**9),
        "disk": lambda _path: DISK,
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


NO_CDI = EngineFacts.from_info({"ServerVersion": "29.1.0", "Runtimes": {"runc": {}}, "DiscoveredDevices": []})


def test_a_sound_host_must_pass_every_check(tmp_path):
    diagnosis = diagnose(context(tmp_path), CHECKS)
    assert diagnosis.sound
    assert diagnosis.having("warn") == ()
    assert {result.id for result in diagnosis.having("skipped")} <= {"serve-extra", "cache-space", "clock"}
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
        case("gpu-memory", "warn", "largest allowed image", gpus=gpus(replace(GPU, memory_total_bytes=25 * 10**9))),
        case("gpu-memory", "warn", "free", gpus=gpus(replace(GPU, memory_used_bytes=140 * 10**9))),
        case("gpu-memory", "ok", "need", gpus=gpus(replace(GPU, memory_used_bytes=140 * 10**9)), own_ports=[8000]),
        case("gpu-memory", "ok", "not known", need=Need()),
        case("gpu-memory", "skipped", "no wanted GPU", gpus=gpus()),
        case("gpu-bfloat16", "fail", "older than Ampere", gpus=gpus(replace(GPU, compute_capability=(7, 5)))),
        case("gpu-bfloat16", "ok", "bfloat16", gpus=gpus(replace(GPU, compute_capability=(8, 0)))),
        case("gpu-bfloat16", "skipped", "does not tell", gpus=gpus(replace(GPU, compute_capability=None))),
        case("gpu-bfloat16", "skipped", "float32", settings={"serve": {"dtype": "float32"}}),
        case("gpu-condition", "fail", "2 uncorrectable", gpus=gpus(replace(GPU, ecc_uncorrected=2))),
        case("gpu-condition", "warn", "91 degrees", gpus=gpus(replace(GPU, temperature_c=91))),
        case("gpu-condition", "ok", "not hot", gpus=gpus(replace(GPU, temperature_c=None, ecc_uncorrected=None))),
        case("engine", "fail", "no engine runs here", engine=no_engine),
        case("engine", "skipped", "needs no container engine", settings={"runtime": "process"}),
        case("engine-gpu", "fail", "neither CDI", engine=lambda _engine: NO_CDI),
        case("engine-gpu", "ok", "CDI"),
        case("engine-gpu", "skipped", "does not answer", engine=no_engine),
        case("engine-gpu", "skipped", "no container with a GPU", settings={"gpus": "none"}),
        case("memory", "fail", "this host has 2.0 GB", memory=lambda: Memory(2 * 10**9, 10**9)),
        case("memory", "fail", "this host has 3.0 GB", memory=lambda: Memory(64 * 10**9, 60 * 10**9, 3 * 10**9)),
        case("memory", "warn", "only 1.0 GB", memory=lambda: Memory(64 * 10**9, 10**9)),
        case("memory", "fail", "resources.memory grants", settings={"resources": {"memory": "2GB"}}),
        case("memory", "ok", "not known", need=Need(), memory=lambda: Memory(2 * 10**9, 10**9)),
        case("cache-directory", "fail", "read-only", disk=disk(mount={"read_only": True})),
        case("cache-file-system", "warn", "over a network", disk=disk(mount={"system": "nfs4"})),
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
