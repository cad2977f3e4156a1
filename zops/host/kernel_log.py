"""Xid events: what NVIDIA's driver wrote into the kernel's log about its GPUs, and what to do about each.

Numbers, meanings and actions: NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors, "Analyzing Xid Errors with the
Xid Catalog", the immediate action for Ampere and newer), in our own words.
"""

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Action = Literal["none", "restart", "reset", "reboot", "replace", "look-up"]

KMSG = Path("/dev/kmsg")
# The kernel's ring holds a few thousand records; a log that is written as fast as it is read must still end.
READ_LIMIT_S = 1.0
# Reading a large journal from a cold disk takes a while.
JOURNAL_TIMEOUT_S = 3.0
RECORD_BYTES = 8192
JOURNAL = ("journalctl", "-k", "-b", "-q", "--no-pager", "-o", "short-monotonic", "-g", "NVRM: Xid")

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:]+)(?:\.\d)?\): (\d+)(.*)")
_JOURNAL_TIME = re.compile(r"^\[\s*(\d+\.\d+)\]")


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an Xid says, and what NVIDIA advises to do first."""

    text: str
    action: Action


XIDS: dict[int, Meaning] = {
    8: Meaning("the GPU stopped processing", "restart"),
    11: Meaning("invalid command stream", "restart"),
    13: Meaning("a kernel of the program failed (address, instruction)", "restart"),
    25: Meaning("invalid command stream", "restart"),
    31: Meaning("the program touched GPU memory that is not its own", "restart"),
    32: Meaning("invalid or corrupted command stream", "restart"),
    43: Meaning("the driver stopped a program's work", "none"),
    45: Meaning("a program was cleaned up after an earlier error", "none"),
    46: Meaning("the GPU stopped processing", "reset"),
    48: Meaning("uncorrectable error in GPU memory", "reset"),
    62: Meaning("an internal micro-controller halted", "reset"),
    63: Meaning("a broken page or row of memory was taken out of use", "none"),
    64: Meaning("a broken page or row of memory could not be taken out of use", "replace"),
    69: Meaning("a kernel of the program failed (graphics engine class)", "restart"),
    74: Meaning("error on an NVLink connection", "reset"),
    79: Meaning("the GPU has fallen off the bus", "reboot"),
    92: Meaning("many correctable memory errors", "none"),
    94: Meaning("uncorrectable memory error, contained in one program", "restart"),
    95: Meaning("uncorrectable memory error, not contained", "reset"),
    109: Meaning("switching between programs timed out", "reset"),
    119: Meaning("the GPU's system processor (GSP) does not answer", "reset"),
    120: Meaning("the GPU's system processor (GSP) failed", "reset"),
    140: Meaning("uncorrectable memory error, not recovered", "reset"),
    143: Meaning("the GPU failed to initialise", "reset"),
}
UNKNOWN = Meaning("not in the table of zops; look it up in NVIDIA's Xid catalogue", "look-up")

# Xid 154 carries the driver's own advice as words; the first that is in the line counts.
_RECOVERY: tuple[tuple[str, Action], ...] = (
    ("node reboot", "reboot"), ("drain and reset", "reset"), ("gpu reset", "reset"), ("drain p2p", "restart"),
    ("(none)", "none"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Xid:
    """One event. `pci` is the GPU's address as domain:bus:device; `seconds` is its time since the machine's start."""

    number: int
    pci: str
    seconds: float
    detail: str = ""

    @property
    def meaning(self) -> Meaning:
        """What it says and what to do; for 154 what the driver itself advises in the line."""
        if self.number == 154:
            # "... changed from 0x0 (None) to 0x1 (GPU Reset Required)": what it changed to counts.
            line = self.detail.lower().rpartition(" to ")[2]
            action: Action = next((action for words, action in _RECOVERY if words in line), "look-up")
            return Meaning("the driver tells how to recover the GPU", action)
        return XIDS.get(self.number, UNKNOWN)

    @property
    def is_fatal(self) -> bool:
        """Whether the GPU must be reset, rebooted with its host or replaced before it can be trusted again."""
        return self.meaning.action in {"reset", "reboot", "replace"}


@dataclass(frozen=True, slots=True)
class KernelLog:
    """The Xid events since the machine's start, oldest first; without a `source` no log could be read: `reason`."""

    xids: tuple[Xid, ...] = ()
    source: str = ""
    reason: str = ""


def read_xids(kmsg: Path = KMSG) -> KernelLog:
    """Read the kernel's ring of messages, else the journal; never raises and never waits for new messages.

    What `dmesg --clear` has put aside is not read, so that is how an operator marks what was dealt with.
    """
    try:
        return KernelLog(tuple(_parse_kmsg(_read_kmsg(kmsg))), str(kmsg))
    except OSError as error:
        reason = f"{kmsg}: {error.strerror}"
    lines = _read_journal()
    if lines is None:
        return KernelLog(reason=f"the kernel's log cannot be read here ({reason}), nor the journal; try with sudo")
    return KernelLog(tuple(_parse_journal(lines)), "journalctl -k")


def _read_kmsg(kmsg: Path) -> list[str]:
    """Return the records of /dev/kmsg: one a read, EAGAIN at the end, EPIPE where one was overwritten meanwhile."""
    descriptor = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            os.lseek(descriptor, 0, os.SEEK_DATA)
        except OSError:
            # A file instead of the device; only kernels' own logs know what was cleared.
            os.lseek(descriptor, 0, os.SEEK_SET)
        records: list[str] = []
        until = time.monotonic() + READ_LIMIT_S
        while time.monotonic() < until:
            try:
                record = os.read(descriptor, RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue
            if not record:
                break
            records += record.decode("utf-8", "replace").splitlines()
        return records
    finally:
        os.close(descriptor)


def _parse_kmsg(records: list[str]) -> list[Xid]:
    found = []
    for record in records:
        head, _, text = record.partition(";")
        fields = head.split(",")
        match = _XID.search(text)
        if match and len(fields) >= 3 and fields[2].isdigit():
            found.append(_xid(match, int(fields[2]) / 1e6))
    return found


def _read_journal() -> list[str] | None:
    try:
        done = subprocess.run(
            JOURNAL, capture_output=True, text=True, timeout=JOURNAL_TIMEOUT_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # 1 without words is "no such line"; a user who may not see the system's journal gets 1 with words, or an old 0.
    if done.returncode > 1 or done.stderr.strip():
        return None
    return done.stdout.splitlines()


def _parse_journal(lines: list[str]) -> list[Xid]:
    found = []
    for line in lines:
        match, when = _XID.search(line), _JOURNAL_TIME.match(line)
        if match and when:
            found.append(_xid(match, float(when[1])))
    return found


def _xid(match: re.Match[str], seconds: float) -> Xid:
    return Xid(int(match[2]), match[1].lower(), seconds, match[3].strip(" ,"))
