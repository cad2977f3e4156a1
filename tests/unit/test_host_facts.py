"""Facts about disks, memory and ports, read from the kernel's own files as they look on other machines."""

import os
import socket
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.support.waiting import eventually
from zops.host.disk import disk_of, local_disks, measure_read, nearest_existing, read_mounts
from zops.host.memory import read_memory
from zops.host.ports import Listener, find_listener, why_not_bindable

MEMINFO = "MemTotal:       16000000 kB\nMemFree: 100 kB\nMemAvailable:   12000000 kB\nHugePages_Total: 0\n"


def mountinfo(path: Path, *lines: tuple[str, str, str, str]) -> Path:
    """Write a mountinfo of (mount point, type, source, options) lines."""
    rows = [
        f"{number} 1 259:{number} / {point} {options},relatime shared:1 - {system} {source} rw"
        for number, (point, system, source, options) in enumerate(lines)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_path_must_be_on_the_innermost_and_last_mount(tmp_path):
    data = tmp_path / "my data"
    (data / "deep").mkdir(parents=True)
    escaped = str(data).replace(" ", "\\040")
    table = mountinfo(
        tmp_path / "mountinfo",
        ("/", "ext4", "/dev/sda1", "rw"),
        (escaped, "xfs", "/dev/old", "rw"),
        (escaped, "nfs4", "server:/export", "rw"),
        (f"{escaped}/deep", "tmpfs", "tmpfs", "ro"),
    )
    over = disk_of(data / "not" / "yet" / "there", table)
    assert (over.mount.path, over.mount.system, over.mount.source) == (data, "nfs4", "server:/export")
    assert (over.is_network, over.is_volatile, over.mount.read_only) == (True, False, False)
    deep = disk_of(data / "deep", table)
    assert (deep.is_volatile, deep.mount.read_only) == (True, True)
    assert disk_of(tmp_path / "elsewhere", table).mount.path == Path("/")


def test_a_link_must_be_followed_to_the_disk_on_which_the_bytes_lie(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    table = mountinfo(
        tmp_path / "mountinfo", ("/", "ext4", "/dev/a", "rw"), (f"{tmp_path}/real", "xfs", "/dev/b", "rw")
    )
    assert disk_of(tmp_path / "link" / "cache", table).mount.source == "/dev/b"


def test_a_neighbour_with_the_same_beginning_must_not_be_mistaken(tmp_path):
    (tmp_path / "database").mkdir()
    table = mountinfo(
        tmp_path / "mountinfo", ("/", "ext4", "/dev/a", "rw"), (f"{tmp_path}/data", "xfs", "/dev/b", "rw")
    )
    assert disk_of(tmp_path / "database", table).mount.source == "/dev/a"


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1).filter(lambda t: t not in {".", ".."})
)
def test_every_name_that_the_kernel_escapes_must_come_back_whole(tmp_path_factory, name):
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in name)
    file = tmp_path_factory.mktemp("mounts") / "mountinfo"
    file.write_bytes(f"1 1 8:1 / /{escaped} rw - ext4 /dev/sda1 rw\n".encode())
    assert [mount.path for mount in read_mounts(file)] == [Path("/" + name)]


def test_only_writable_local_disks_must_be_offered_for_the_cache_each_once(tmp_path):
    for name in ("ssd", "again", "nfs", "ro"):
        (tmp_path / name).mkdir()
    table = mountinfo(
        tmp_path / "mountinfo",
        (f"{tmp_path}/ssd", "xfs", "/dev/nvme0n1", "rw"),
        (f"{tmp_path}/nfs", "nfs4", "server:/x", "rw"),
        (f"{tmp_path}/ro", "ext4", "/dev/sdb", "ro"),
        ("/proc", "proc", "proc", "rw"),
    )
    with table.open("a") as lines:
        lines.write(f"9 1 259:0 / {tmp_path}/again rw - xfs /dev/nvme0n1 rw\n")
    assert [disk.mount.path for disk in local_disks(table)] == [tmp_path / "ssd"]


def test_a_partition_must_be_asked_of_its_disk_whether_it_spins(tmp_path):
    disk = tmp_path / "sys" / "devices" / "sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue" / "rotational").write_text("1\n")
    block = tmp_path / "sys" / "dev" / "block"
    block.mkdir(parents=True)
    (block / "259:0").symlink_to(disk / "sda1")
    table = mountinfo(tmp_path / "mountinfo", ("/", "ext4", "/dev/sda1", "rw"))
    assert disk_of(tmp_path, table, tmp_path / "sys").rotational is True
    assert disk_of(tmp_path, table, tmp_path / "nothing").rotational is None


def test_this_very_machine_must_be_readable(tmp_path):
    disk = disk_of(tmp_path)
    assert disk.total_bytes >= disk.free_bytes > 0
    assert disk.mount.system != "unknown"
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path


def test_reading_must_be_measured_and_a_small_file_give_no_number(tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(4 << 20))
    assert (measure_read(large, limit_s=0.5) or 0) > 1e6
    (tmp_path / "small").write_bytes(b"x")
    assert measure_read(tmp_path / "small") is None
    assert measure_read(tmp_path / "missing") is None


def memory_of(tmp_path: Path, cgroup: str, **limits: str):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in limits.items():
        file = groups / name.replace("__", "/").replace("_max", ".max").replace("_limit", ".limit_in_bytes")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return read_memory(proc, groups)


def test_a_host_without_a_limit_must_have_all_its_memory(tmp_path):
    memory = memory_of(tmp_path, "0::/user.slice\n", user_max="max\n")
    assert (memory.total_bytes, memory.available_bytes) == (16_384_000_000, 12_288_000_000)
    assert (memory.limit_bytes, memory.usable_bytes) == (None, 12_288_000_000)


def test_the_tightest_group_above_must_limit(tmp_path):
    memory = memory_of(
        tmp_path, "0::/a/b\n", a__memory_max="4000000000\n", a__b__memory_max="max\n", memory_max="8000000000\n"
    )
    assert memory.usable_bytes == 4_000_000_000


def test_a_limit_of_the_first_version_must_count_and_its_infinity_must_not(tmp_path):
    assert memory_of(tmp_path / "x", "4:memory:/a\n", memory__a__memory_limit="2000000000").limit_bytes == 2_000_000_000
    assert memory_of(tmp_path / "y", "4:memory:/a\n", memory__a__memory_limit="9223372036854771712").limit_bytes is None


def test_a_port_must_be_free_until_somebody_listens_and_then_name_us():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert why_not_bindable("127.0.0.1", port) == "in use"
        holder = find_listener(port)
        assert holder is not None
        assert holder.pid == os.getpid()
    eventually(lambda: why_not_bindable("127.0.0.1", port) == "", "the port to be free again")
    assert find_listener(port) is None


def test_an_address_of_another_host_must_be_refused_with_the_reason():
    assert "cannot assign" in why_not_bindable("192.0.2.1", 0)


def test_a_listener_of_another_user_must_be_one_without_a_name(tmp_path):
    (tmp_path / "net").mkdir()
    head = "  sl  local_address rem_address   st tx rx tr tm->when retrnsmt   uid  timeout inode\n"
    line = "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n"
    (tmp_path / "net" / "tcp").write_text(head + line)
    assert find_listener(8000, tmp_path) == Listener()
    assert find_listener(8001, tmp_path) is None
    assert str(Listener()) == "a process that only root can see"


@pytest.mark.parametrize("state", ["01", "06"])
def test_a_connection_must_not_be_taken_for_a_listener(tmp_path, state):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(f"head\n 0: 0100007F:1F40 00000000:0000 {state} 0:0 0:0 0 0 0 4711 1\n")
    assert find_listener(8000, tmp_path) is None
