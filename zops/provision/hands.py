"""Everything that provisioning does to the world, in one place, so that a dry run can be given none of it."""

from pathlib import Path

from zops.archive.encryption import read_keys
from zops.archive.restore import restore
from zops.archive.store import open_archive
from zops.cache.pull import pull
from zops.cache.verify import verify
from zops.cache.warm import warm
from zops.events import Report
from zops.health.waiting import wait_instance
from zops.provision import canary
from zops.runtime.base import Deployment, Instance, Runtime, WriteRefused
from zops.spec import Spec


class Hands:
    """The writing half of provisioning; each method returns, in a few words, what it did."""

    def pull(self, spec: Spec, report: Report) -> str:
        """Bring the snapshot from its source into the cache, verified."""
        result = pull(spec, report)
        return f"pulled {len(result.fetched)} files from {spec.source.kind}, {len(result.found)} were there"

    def restore(self, archive: str, spec: Spec, report: Report) -> str:
        """Bring the snapshot from an archive into the cache, verified."""
        keys = read_keys(spec.backup.identities, spec.backup.passphrase_file)
        result = restore(open_archive(archive, keys), spec.cache.dir, model=spec.model, report=report)
        return f"restored {result.files} files from {archive}"

    def verify(self, snapshot: Path, report: Report) -> str:
        """Hash every file of the snapshot."""
        verification = verify(snapshot, deep=True, report=report).require()
        return f"hashed {len(verification.findings)} files, all match the manifest"

    def warm(self, snapshot: Path, report: Report) -> str:
        """Bring the snapshot into the page cache."""
        result = warm(snapshot, report)
        return f"{result.after_share:.0%} in memory"

    def obtain_image(self, runtime: Runtime, spec: Spec, report: Report) -> str:
        """Build or pull the image."""
        runtime.obtain_image(spec, report)
        return f"{'built' if spec.image.build else 'pulled'} {spec.image.name}"

    def up(self, runtime: Runtime, deployment: Deployment, report: Report) -> str:
        """Start or recreate the instance."""
        instance = runtime.up(deployment, report)
        return f"started {instance.name} ({instance.id[:12]})"

    def wait(self, runtime: Runtime, deployment: Deployment, report: Report) -> str:
        """Wait until the instance is ready."""
        return f"ready after {wait_instance(runtime, deployment, report):.1f} s"

    def make_canary(self, deployment: Deployment, instance: Instance) -> str:
        """Make and keep the canary image."""
        made = canary.make(deployment, instance)
        return f"{made.path} in {made.seconds:.2f} s"


class NoHands(Hands):
    """What a dry run is given: every method of `Hands` refused."""

    def __getattribute__(self, name: str) -> object:
        if name in vars(Hands) and not name.startswith("_"):
            raise WriteRefused(f"a dry run called Hands.{name}")
        return super().__getattribute__(name)
