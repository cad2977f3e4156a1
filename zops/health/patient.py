"""An instance under examination: what was asked of it once, so that every probe judges the same moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from zops.errors import ZopsError
from zops.health.client import Ask, Client, Readiness
from zops.once import once
from zops.runtime.base import Instance, Runtime

LOG_LINES = 5


@dataclass(frozen=True)
class Patient:
    """An instance under examination, with what the probes share."""

    instance: Instance
    runtime: Runtime | None
    expected_digest: str
    probe_timeout_s: float
    canary_timeout_s: float
    startup_timeout_s: float
    ask: Ask | None = None
    host: str = ""
    engine: str = ""

    @property
    def asked(self) -> Mapping[str, Any]:
        """What the deployment asked for when the instance was made."""
        return self.instance.traits

    @property
    def age_s(self) -> float:
        """Seconds since the instance started; infinity when its runtime does not say."""
        try:
            began = datetime.fromisoformat(self.instance.started_at)
        except ValueError:
            return float("inf")
        return (datetime.now(UTC) - (began if began.tzinfo else began.replace(tzinfo=UTC))).total_seconds()

    @once
    def client(self) -> Client:
        """For questions that are answered from memory."""
        return Client(self.instance.url, timeout_s=self.probe_timeout_s, ask=self.ask)

    @once
    def readiness(self) -> Readiness:
        """How far the instance is, asked once.

        Raises:
            ZopsError: when nothing answers, or something else than zops.
        """
        return self.client.ready()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that the instance says of itself in that answer; an older one says less."""
        return self.readiness.facts

    @property
    def gpus(self) -> Mapping[str, Any] | None:
        """What NVML says inside the instance; None when it uses no GPU, or does not tell."""
        return _mapping(self.facts.get("gpus"))

    @property
    def queue(self) -> Mapping[str, Any]:
        """Requests that wait and run, and whether they move; empty when it does not tell."""
        return _mapping(self.facts.get("queue")) or {}

    @property
    def snapshot(self) -> Mapping[str, Any] | None:
        """What lies on its disk now; None when it does not tell."""
        return _mapping(self.facts.get("snapshot"))

    @once
    def writable(self) -> bool:
        """Whether it could write to its snapshot; an older instance tells that only in /v1/zops/info."""
        if self.snapshot is not None:
            return bool(self.snapshot.get("writable"))
        return bool(self.client.info().get("snapshot_writable"))

    @property
    def named(self) -> str:
        """The options by which a command means this instance, and no other host's."""
        return f"--name {self.instance.name}" + (f" --engine {self.engine}" if self.engine else "")

    @property
    def logs(self) -> str:
        """The command that shows its log."""
        return f"zops logs {self.named}"

    @property
    def wait(self) -> str:
        """The remedy for what may be well by itself."""
        return f"zops health --wait {self.named}; see why with: {self.logs}"

    @property
    def anew(self) -> str:
        """The commands that put a new instance in its place."""
        return f"zops down {self.named} && zops up {self.named}"

    @property
    def recreate(self) -> str:
        """The remedy where a restart is not enough: that gives a container the same lost devices and mounts."""
        return f"recreate it: {self.anew}"

    def last_lines(self) -> list[str]:
        """Return the end of its log; nothing when that cannot be had, for a verdict stands without."""
        if self.runtime is None:
            return []
        try:
            return list(islice(self.runtime.logs(self.instance.name, tail=LOG_LINES), LOG_LINES))
        except ZopsError:
            return []


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None
