"""The eight steps from a bare host to a serving one."""

from dataclasses import dataclass
from typing import cast

from zops.archive.store import names_revision, newest, open_store
from zops.cache.layout import Snapshot, is_verified, meant
from zops.cache.redact import redacted
from zops.cache.warm import residency, room
from zops.errors import RuntimeUnreachable, SnapshotDamaged, SnapshotMissing, ZopsError
from zops.events import Report, silent
from zops.health.client import Client
from zops.health.examine import examine_host
from zops.host.doctor import refusal
from zops.provision import canary
from zops.provision.hands import Hands, NoHands
from zops.provision.plan import Look, Step
from zops.runtime.base import Instance, ReadOnly, Runtime, drift
from zops.runtime.deployment import deploy
from zops.runtime.select import open_runtime
from zops.spec import Loaded, Spec

# A snapshot counts as warm from here on: the kernel drops a page now and then, and reading it costs less than asking.
WARM_SHARE = 0.98
READY_TIMEOUT_S = 5.0


def plan(loaded: Loaded, *, dry_run: bool) -> "Provision":
    """Return the plan for a specification; a dry one is given hands and a runtime that refuse to change anything."""
    runtime = open_runtime(loaded.spec)
    if dry_run:
        return Provision(loaded, cast("Runtime", ReadOnly(runtime)), NoHands())
    return Provision(loaded, runtime, Hands())


@dataclass(frozen=True, slots=True)
class Provision:
    """The plan for one specification. In a dry run `runtime` and `hands` are the kinds that refuse to write."""

    loaded: Loaded
    runtime: Runtime
    hands: Hands

    @property
    def spec(self) -> Spec:
        """What is to be deployed."""
        return self.loaded.spec

    def steps(self) -> list[Step]:
        """Return the steps in their order."""
        spec, hands, runtime = self.spec, self.hands, self.runtime
        return [
            Step("doctor", self._host_is_fit, lambda _: ""),
            Step("snapshot", self._snapshot_is_there, self._bring_snapshot),
            Step("verify", self._snapshot_is_verified, lambda report: hands.verify(self._snapshot().path, report)),
            Step("warm", self._snapshot_is_warm, lambda report: hands.warm(self._snapshot().path, report)),
            Step("image", self._image_is_there, lambda report: hands.obtain_image(runtime, spec, report), claimed=True),
            Step("up", self._instance_is_up, lambda report: hands.up(runtime, deploy(spec), report), claimed=True),
            Step(
                "ready", self._instance_is_ready, lambda report: hands.wait(runtime, deploy(spec), report), claimed=True
            ),
            Step("canary", self._canary_is_made, lambda _: hands.make_canary(deploy(spec), self._instance())),
        ]

    def _host_is_fit(self) -> Look:
        diagnosis = examine_host(self.loaded, runtime=self.runtime, only=(), report=silent)
        if error := refusal(diagnosis):
            raise error
        return Look(done=True, reason=diagnosis.summary)

    def _snapshot(self) -> Snapshot:
        return meant(self.spec)

    def _snapshot_is_there(self) -> Look:
        try:
            snapshot = self._snapshot()
        except SnapshotMissing:
            return Look(done=False, reason=f"no snapshot of {self.spec.model} in {self.spec.cache.dir}; {self._way()}")
        if is_verified(snapshot.path):
            return Look(done=True, reason=str(snapshot.path))
        return Look(done=False, reason=f"{snapshot.path} is incomplete or not as it was verified; {self._way()}")

    def _way(self) -> str:
        archive = self._archive()
        if archive:
            return f"restore it from {archive}"
        place = redacted(self.spec.source.path or self.spec.source.endpoint or "")
        return f"pull it from {self.spec.source.kind}{f' {place}' if place else ''}"

    def _bring_snapshot(self, report: Report) -> str:
        """Restore from an archive where there is one, since it lies nearer than a hub; else pull."""
        archive = self._archive()
        return self.hands.restore(archive, self.spec, report) if archive else self.hands.pull(self.spec, report)

    def _archive(self) -> str | None:
        """Return the archive to restore from: the one that is the source, else the newest backup that fits."""
        spec = self.spec
        if spec.source.kind == "archive":
            return spec.source.path
        if spec.backup.to is None:
            return None
        found = newest(open_store(spec.backup.to), spec.model)
        if found is None:
            return None
        wanted = spec.source.revision
        revisions = [revision for model, revision in found.snapshots if model == spec.model]
        return found.location if not wanted or any(names_revision(revision, wanted) for revision in revisions) else None

    def _snapshot_is_verified(self) -> Look:
        try:
            snapshot = self._snapshot()
        except SnapshotMissing:
            return Look(done=False, reason="hash every file once the snapshot is there")
        if is_verified(snapshot.path):
            return Look(done=True, reason="every file is as it was when its SHA-256 was last compared")
        return Look(done=False, reason="files changed since they were verified; hash them")

    def _snapshot_is_warm(self) -> Look:
        try:
            cached = residency(self._snapshot().path)
        except SnapshotMissing:
            return Look(done=False, reason="read the snapshot into memory once it is there")
        state = f"{cached.share:.0%} of {cached.total / 1e9:.2f} GB in memory"
        if cached.share >= WARM_SHARE:
            return Look(done=True, reason=state)
        if room() == 0:
            return Look(done=True, reason=f"{state}; more would push out what this host needs")
        return Look(done=False, reason=f"{state}; read the rest")

    def _image_is_there(self) -> Look:
        if self.runtime.has_image(self.spec):
            return Look(done=True, reason=self.spec.image.name if self.spec.runtime != "process" else "needs none")
        how = "build" if self.spec.image.build else "pull"
        return Look(done=False, reason=f"{how} {self.spec.image.name}")

    def _instance(self) -> Instance:
        instance = self.runtime.find(self.spec.name)
        if instance is None:
            raise ZopsError(
                f"the instance {self.spec.name} disappeared", code="instance-missing", hint="see why with: zops logs"
            )
        return instance

    def _instance_is_up(self) -> Look:
        instance = self.runtime.find(self.spec.name)
        if instance is None:
            return Look(done=False, reason=f"there is no instance {self.spec.name}; start one")
        try:
            differences = drift(deploy(self.spec), instance)
        except (SnapshotMissing, SnapshotDamaged):
            return Look(done=False, reason="compare the instance with the snapshot once that is verified")
        if differences:
            return Look(done=False, reason=f"drifted ({'; '.join(differences)}); recreate it")
        if not instance.running:
            return Look(done=False, reason=f"{instance.state}; start it")
        return Look(done=True, reason=f"{instance.name} runs since {instance.started_at}")

    def _instance_is_ready(self) -> Look:
        instance = self.runtime.find(self.spec.name)
        if instance is None or not instance.running:
            return Look(done=False, reason="wait until a warm-up image was made")
        if self._in_cluster:
            return Look(done=instance.health == "healthy", reason=f"the cluster's own probe says {instance.health}")
        try:
            seen = Client(instance.url, timeout_s=READY_TIMEOUT_S).ready()
        except RuntimeUnreachable:
            return Look(done=False, reason="does not answer yet; wait until a warm-up image was made")
        return Look(done=seen.ready, reason=instance.url if seen.ready else f"in phase {seen.phase}; wait")

    @property
    def _in_cluster(self) -> bool:
        """Whether the instance answers inside a cluster only, and the cluster's own probes must be believed."""
        return self.spec.runtime == "kubernetes"

    def _canary_is_made(self) -> Look:
        if self._in_cluster:
            return Look(done=True, reason="not asked for: in a cluster readiness itself takes a warm-up image")
        instance = self.runtime.find(self.spec.name)
        made = canary.recorded(instance) if instance and instance.running else None
        if made is None:
            return Look(done=False, reason="make a small image through the instance's own door")
        return Look(done=True, reason=f"{made.path} ({made.sha256[:12]})")
