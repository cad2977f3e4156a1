"""What is to be backed up, and how: from which a draft of the archive is made, down to the place of every byte."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import islice
from pathlib import Path

from zops import __version__
from zops.archive.clone import can_clone
from zops.archive.format import ALIGNMENT, SUFFIXES, ArchiveManifest, Compression
from zops.archive.names import archive_name, read_name
from zops.archive.pieces import Layout, Piece, cut, lay_out
from zops.archive.plan import Earlier, Plan, plan, root_of
from zops.archive.resume import Leftover
from zops.archive.store import DirectoryStore, Store
from zops.archive.tar import BLOCK, END
from zops.cache.layout import INDEX
from zops.cache.manifest import Manifest
from zops.events import Report, Warned


@dataclass(frozen=True)
class Draft:
    """An archive of a name, as it is to be."""

    name: str
    manifest: ArchiveManifest
    plan: Plan
    layout: Layout
    closing: bytes
    """What ends the tar, where that is compressed with it."""

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """Return the pieces of the tar from one on; they are made as they are asked for, for they are many."""
        return islice(cut(self.layout, self.closing), start, None)

    @cached_property
    def piece_count(self) -> int:
        """How many pieces there are."""
        return sum(1 for _ in self.pieces())

    @property
    def fingerprint(self) -> str:
        """What two runs must have in common to write the same bytes, as a hash in hex."""
        sources = [
            [str(source.file), source.size, source.sha256, *source.stat]
            for source in (item.source for item in self.plan.items)
            if source
        ]
        text = json.dumps([__version__, self.layout.structure_sha256, self.manifest.as_bytes().decode(), sources])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be backed up, and how."""

    paths: Sequence[Path]
    manifests: Sequence[Manifest]
    store: Store
    compression: Compression
    earlier: Earlier | None
    limit: float | None
    allow_mismatch: bool
    share: bool = False
    trusted: bool = False

    @property
    def directory(self) -> Path | None:
        """The store's directory, when it is one."""
        return self.store.directory if isinstance(self.store, DirectoryStore) else None

    def sharing(self, report: Report, *, trust_marker: bool) -> "Order":
        """Find out whether the archive can share the blocks of the files."""
        # With a limit the files are read at that pace, and so may as well be written.
        wanted = self.compression == "none" and self.directory and (self.limit is None or trust_marker)
        if wanted and self.directory:
            index = self.paths[0] / INDEX
            existing = next((p for p in (self.directory, *self.directory.parents) if p.is_dir()), self.directory)
            share = can_clone(index, existing)
        else:
            share = False
        trusted = trust_marker and share and not self.allow_mismatch
        if trust_marker and not trusted:
            report(Warned("every file is read all the same: only an archive that shares blocks can do without"))
        return replace(self, share=share, trusted=trusted)

    def begin(self) -> tuple[Draft, Leftover | None]:
        """Return the archive to write, and what a killed run left of it."""
        if not self.share and not self.allow_mismatch:
            for found in self.store.resumable():
                if not found.name.endswith(SUFFIXES[self.compression]):
                    continue
                draft = self._draft(found.name, found.id, datetime.fromisoformat(found.created))
                if draft.fingerprint == found.fingerprint and found.pieces <= draft.piece_count:
                    return draft, found
        created = datetime.now(UTC).replace(microsecond=0)
        base = read_name(self.earlier.base.name, 0, "") if self.earlier else None
        if base:
            created = max(created, base.created + timedelta(seconds=1))
        while True:
            name = archive_name(
                self.manifests, created, compression=self.compression, base=base.created if base else None
            )
            if not self.store.exists(name):
                return self._draft(name, uuid.uuid4().hex, created), None
            # A second one in the same second is dated one later.
            created += timedelta(seconds=1)

    def _draft(self, name: str, identity: str, created: datetime) -> Draft:
        manifest = ArchiveManifest(
            id=identity,
            created=created.isoformat(),
            zops=__version__,
            snapshots={root_of(m): m for m in self.manifests},
            base=self.earlier.base if self.earlier else None,
            trusted=self.trusted,
        )
        planned = plan(manifest, self.paths, earlier=self.earlier, allow_mismatch=self.allow_mismatch)
        layout = lay_out(planned.items, ALIGNMENT if self.compression == "none" else BLOCK)
        return Draft(name, manifest, planned, layout, END if self.compression == "zstd" else b"")
