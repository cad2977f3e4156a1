"""A backup as it is made every night: choose the base, encrypt, write, note, and let go of what need not be kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops.archive.age import Recipient
from zops.archive.backup import BackupResult, backup
from zops.archive.encryption import NO_KEYS, EncryptedStore, Keys, sealed_name
from zops.archive.names import ENCRYPTED
from zops.archive.notes import Note, write_note
from zops.archive.plan import Earlier
from zops.archive.store import Store, join
from zops.cache.manifest import read_manifest
from zops.errors import ZopsError
from zops.events import Report, Warned, silent

if TYPE_CHECKING:
    from zops.archive.keep import Decision, Keep

# Reading archives, and the rules of which to keep, are imported by who needs them: a plain backup begins sooner.


@dataclass(frozen=True, slots=True)
class Routine:
    """How backups are made.

    Attributes:
        recipients: for whom archives are encrypted; for nobody when empty.
        keys: what opens an encrypted base.
        incremental: the name of the base, `auto` for the newest, empty for an archive that stands alone.
        keep: what stays afterwards; everything when None.
        options: what `backup` takes besides.
    """

    recipients: tuple[Recipient, ...] = ()
    keys: Keys = NO_KEYS
    incremental: str = ""
    keep: "Keep | None" = None
    options: "dict[str, Any] | None" = None


@dataclass(frozen=True, slots=True)
class Made:
    """An archive that was made, on which other it builds (empty when it stands alone), and what went for it."""

    result: BackupResult
    base: str
    decisions: "tuple[Decision, ...]"


def make_backup(snapshots: Sequence[Path], store: Store, routine: Routine, report: Report = silent) -> Made:
    """Make one archive of verified snapshots, note how it was made, and remove what the rules do not keep.

    What cannot be noted or removed is a warning: the archive is there.

    Raises:
        As `backup`, `choose_base` and `read_earlier` do.
    """
    models = [_model_of(path) for path in snapshots]
    earlier = _earlier(store, models, routine, report) if routine.incremental else None
    target = EncryptedStore(store, routine.recipients, routine.keys) if routine.recipients else store
    result = backup(snapshots, target, earlier=earlier, report=report, **(routine.options or {}))
    if routine.recipients:
        name = sealed_name(result.name)
        result = replace(result, name=name, location=join(store, name), size=store.size(name))
    note = Note(seconds=round(result.seconds, 3), files=result.files, content_size=result.content_size)
    try:
        write_note(store, result.name, note)
    except ZopsError as error:
        report(Warned(f"how long the backup took is not noted: {error.message}"))
    decisions: tuple[Decision, ...] = ()
    if routine.keep:
        try:
            decisions = tidy(store, routine.keep, models, report=report)
        except ZopsError as error:
            report(Warned(f"old archives are not removed: {error.message}"))
    return Made(result, earlier.base.name if earlier else "", decisions)


def _model_of(snapshot: Path) -> str:
    manifest = read_manifest(snapshot)
    if manifest is None:
        from zops.cache.verify import require_manifest  # noqa: PLC0415 - only to say why there is none

        manifest = require_manifest(snapshot)
    return manifest.model


def _earlier(store: Store, models: Sequence[str], routine: Routine, report: Report) -> Earlier | None:
    """Read what an incremental backup need not store again; None when it has to stand alone."""
    from zops.archive.chain import choose_base, read_earlier  # noqa: PLC0415 - as above
    from zops.archive.history import bad_archives  # noqa: PLC0415

    base = choose_base(store, models, routine.incremental)
    if base and base.name in bad_archives(store, [base]):
        report(Warned(f"{base.name} is known to be damaged, so the new archive stands alone"))
        return None
    if base and base.name.endswith(ENCRYPTED) and not routine.recipients:
        report(Warned(f"{base.name} is encrypted, but what changed since is written unencrypted: see --encrypt-to"))
    return read_earlier(store, base, routine.keys) if base else None


def tidy(
    store: Store, keep: "Keep", models: Sequence[str] = (), *, dry_run: bool = False, report: Report = silent
) -> "tuple[Decision, ...]":
    """Decide by the rules about the archives of these models, all of them when empty, and carry it out.

    An archive that also holds another model stays, since nobody asked about that one.

    Raises:
        SourceFailed, HostShort: when the store fails or refuses.
    """
    from zops.archive.history import bad_archives  # noqa: PLC0415 - as above
    from zops.archive.keep import decide, prune  # noqa: PLC0415

    archives = store.list()
    decisions = decide(archives, keep, models=models or None, bad=bad_archives(store, archives))
    return decisions if dry_run else prune(store, decisions, report)


__all__ = ["Made", "Routine", "make_backup", "tidy"]
