"""A backup as it is made every night: choose the base, encrypt, write, note, and let go of what need not be kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zops.archive.age import Recipient
from zops.archive.backup import BackupResult, backup
from zops.archive.chain import choose_base, read_earlier
from zops.archive.encryption import NO_KEYS, EncryptedStore, Keys, sealed_name
from zops.archive.history import bad_archives
from zops.archive.keep import Decision, Keep, decide, prune
from zops.archive.names import ENCRYPTED
from zops.archive.notes import Note, write_note
from zops.archive.store import Store, join
from zops.cache.verify import require_manifest
from zops.errors import ZopsError
from zops.events import Report, Warned, silent


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
    keep: Keep | None = None
    options: "dict[str, Any] | None" = None


@dataclass(frozen=True, slots=True)
class Made:
    """An archive that was made, on which other it builds (empty when it stands alone), and what went for it."""

    result: BackupResult
    base: str
    decisions: tuple[Decision, ...]


def make_backup(snapshots: Sequence[Path], store: Store, routine: Routine, report: Report = silent) -> Made:
    """Make one archive of verified snapshots, note how it was made, and remove what the rules do not keep.

    What cannot be noted or removed is a warning: the archive is there.

    Raises:
        As `backup`, `choose_base` and `read_earlier` do.
    """
    models = [require_manifest(path).model for path in snapshots]
    base = choose_base(store, models, routine.incremental) if routine.incremental else None
    if base and base.name in bad_archives(store, [base]):
        report(Warned(f"{base.name} is known to be damaged, so the new archive stands alone"))
        base = None
    if base and base.name.endswith(ENCRYPTED) and not routine.recipients:
        report(Warned(f"{base.name} is encrypted, but what changed since is written unencrypted: see --encrypt-to"))
    earlier = read_earlier(store, base, routine.keys) if base else None
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
    return Made(result, base.name if base else "", decisions)


def tidy(
    store: Store, keep: Keep, models: Sequence[str] = (), *, dry_run: bool = False, report: Report = silent
) -> tuple[Decision, ...]:
    """Decide by the rules about the archives of these models, all of them when empty, and carry it out.

    An archive that also holds another model stays, since nobody asked about that one.

    Raises:
        SourceFailed, HostShort: when the store fails or refuses.
    """
    archives = store.list()
    decisions = decide(archives, keep, models=models or None, bad=bad_archives(store, archives))
    return decisions if dry_run else prune(store, decisions, report)


__all__ = ["Made", "Routine", "make_backup", "tidy"]
