"""`zops cache restore`, and `zops archive`: what lies in a store, what is in it, and whether it is right."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zops.cli.backup import FILE, IDENTITY, PASSPHRASE, archive_location, clean, prune, read_keys, store_location
from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output, duration, size
from zops.errors import UsageError

if TYPE_CHECKING:
    from zops.archive.check import ArchiveCheck
    from zops.archive.compare import Difference
    from zops.archive.describe import Description
    from zops.archive.names import ArchiveInfo
    from zops.archive.pick import Picked
    from zops.archive.restore import RestoreResult
    from zops.archive.store import StoredArchive
    from zops.spec import Spec

ARCHIVE = click.argument("archive", required=False)
STORE = click.option("--from", "store", metavar="STORE", help="A directory or s3://bucket/prefix (default: backup.to).")


@click.command(
    "restore",
    epilog="ARCHIVE is a path or s3://bucket/prefix/name; without it, the newest archive of the model in the store. "
    "Archives of other programs (.tar, .tar.gz, .tar.zst) are restored too.",
)
@ARCHIVE
@STORE
@click.option("--to", "into", type=FILE, help="Make this directory the snapshot, not its place in the cache.")
@click.option("--only", "files", metavar="PATH", multiple=True, help="Only this file of it, into --to; repeatable.")
@click.option("--verify-only", is_flag=True, help="Read and check every byte, write nothing.")
@click.option("--allow-mismatch", is_flag=True, help="Also what did not match its manifest; it counts as unverified.")
@IDENTITY
@PASSPHRASE
@with_spec
def restore(
    *,
    archive: str | None,
    store: str | None,
    into: Path | None,
    files: tuple[str, ...],
    verify_only: bool,
    allow_mismatch: bool,
    identities: tuple[Path, ...],
    passphrase_file: Path | None,
    loaded: Loaded,
    out: Output,
) -> None:
    """Bring the model's snapshot back from a tarball, every byte verified, or change nothing.

    What is there already and equal is left alone. Of a snapshot that differs, the files that are right stay; it is
    replaced after the new one is complete. After a kill, the same command goes on with what was complete.

    \b
    Examples:
      zops cache restore
      zops cache restore modelscope_cache_backup.tar.gz
      zops cache restore --from s3://bucket/models
      zops cache restore --verify-only
      zops cache restore --only transformer/config.json --to /tmp/look
    """
    from zops.archive import restore as restores  # noqa: PLC0415 - the archive's modules are loaded when needed
    from zops.archive.pick import pick  # noqa: PLC0415

    spec = loaded.spec
    if files and not into:
        raise click.UsageError("--only needs --to: the directory for the files")
    if verify_only and (files or into):
        raise click.UsageError("--verify-only writes nothing, so it goes with neither --only nor --to")
    found = _find(archive, store, spec, identities, passphrase_file)
    if verify_only:
        _verify(found, out)
        return
    with out.progress() as report:
        if files and into:
            picked = pick(found, files, into, model=spec.model, report=report)
            body, text = _picked_json(picked), _picked_text(picked)
        else:
            result = restores.restore(
                found, spec.cache.dir, model=spec.model, into=into, allow_mismatch=allow_mismatch, report=report
            )
            body, text = _as_json(result), _as_text(result)
    out.data(body, text)


@click.group("archive")
def archive() -> None:
    """List, show, verify, compare and prune archives."""


@archive.command("list")
@STORE
@click.option("--all", "every", is_flag=True, help="Every model in the store, not only the configured one.")
@with_spec
def list_archives(*, store: str | None, every: bool, loaded: Loaded, out: Output) -> None:
    """List the archives in a store by model and date, newest first; none of them is read.

    \b
    Examples:
      zops archive list
      zops archive list --all --from s3://bucket/models --output json
    """
    from zops.archive.store import open_store  # noqa: PLC0415 - the archive's modules are loaded when needed

    place = open_store(store_location(store, loaded.spec, "--from"))
    model = None if every else loaded.spec.model
    infos = [i for i in reversed(place.list()) if model is None or model in {named for named, _ in i.snapshots}]
    rows = [_info_row(info) for info in infos]
    empty = f"there is no archive{f' of {model}' if model else ''} in {place.location}"
    out.table(
        ("CREATED", "MODEL", "REVISION", "SIZE", "KIND", "ARCHIVE"), rows, [_info_json(i) for i in infos], empty=empty
    )


@archive.command("show")
@ARCHIVE
@STORE
@IDENTITY
@PASSPHRASE
@with_spec
def show(
    *,
    archive: str | None,
    store: str | None,
    identities: tuple[Path, ...],
    passphrase_file: Path | None,
    loaded: Loaded,
    out: Output,
) -> None:
    """Show what an archive holds: who made it, of what, its members, what it builds on. Only its ends are read.

    ARCHIVE is a path or s3://bucket/prefix/name; without it, the newest of the model in the store.

    \b
    Examples:
      zops archive show
      zops archive show /mnt/backup/model.tar.zst --output json
    """
    from zops.archive.describe import describe  # noqa: PLC0415 - the archive's modules are loaded when needed

    spec = loaded.spec
    with out.progress():
        found = describe(_find(archive, store, spec, identities, passphrase_file), model=spec.model)
    out.data(_description_json(found), _description_text(found))


@archive.command("verify")
@ARCHIVE
@STORE
@IDENTITY
@PASSPHRASE
@with_spec
def verify(
    *,
    archive: str | None,
    store: str | None,
    identities: tuple[Path, ...],
    passphrase_file: Path | None,
    loaded: Loaded,
    out: Output,
) -> None:
    """Read an archive whole and check every byte of it; that what it builds on is there, but not its bytes.

    Exit status 4 when anything is wrong; every damaged member is named.

    \b
    Examples:
      zops archive verify
      zops archive verify s3://bucket/models/model.tar.zst
    """
    _verify(_find(archive, store, loaded.spec, identities, passphrase_file), out)


@archive.command("diff")
@click.argument("first", required=False)
@click.argument("second", required=False)
@IDENTITY
@PASSPHRASE
@with_spec
def diff(
    *,
    first: str | None,
    second: str | None,
    identities: tuple[Path, ...],
    passphrase_file: Path | None,
    loaded: Loaded,
    out: Output,
) -> None:
    """Compare an archive with another, or with a snapshot: which files were added, removed, or changed by SHA-256.

    FIRST and SECOND are archives or directories of snapshots; without them, the newest archive of the model in the
    store, and the model's snapshot in the cache. No data is read of archives that zops made, nor of snapshots that are
    verified.

    \b
    Examples:
      zops archive diff
      zops archive diff /mnt/backup/old.tar.zst
      zops archive diff old.tar.zst new.tar.zst --output json
    """
    from zops.archive.compare import compare  # noqa: PLC0415 - the archive's modules are loaded when needed
    from zops.cache.layout import meant  # noqa: PLC0415

    spec = loaded.spec
    one, other = first or archive_location(None, spec.model, spec), second or str(meant(spec).path)
    with out.progress() as report:
        found = compare(one, other, spec.model, keys=read_keys(spec, identities, passphrase_file), report=report)
    out.data(_difference_json(found), _difference_text(found))


archive.add_command(prune)
archive.add_command(clean)


def _find(
    asked: str | None, store: str | None, spec: "Spec", identities: tuple[Path, ...], passphrase_file: Path | None
) -> "StoredArchive":
    """Return the archive that was named, else the specification's source, else the newest in the store."""
    from zops.archive.store import open_archive  # noqa: PLC0415 - as above

    if asked and store:
        raise UsageError("an archive and --from exclude each other", hint="name the archive by its whole path or URL")
    if asked is None and store is None and spec.source.kind == "archive" and spec.source.path:
        asked = spec.source.path
    return open_archive(
        asked or archive_location(store, spec.model, spec), read_keys(spec, identities, passphrase_file)
    )


def _verify(found: "StoredArchive", out: Output) -> None:
    from zops.archive.check import verify_archive  # noqa: PLC0415 - as above

    with out.progress() as report:
        check = verify_archive(found, report)
    out.data(_check_json(check), _check_text(check))


def _as_json(result: "RestoreResult") -> dict[str, object]:
    return {
        "archive": result.archive,
        "changed": result.changed,
        "seconds": round(result.seconds, 3),
        "snapshots": [
            {
                "model": s.model,
                "revision": s.revision,
                "path": str(s.path),
                "manifest_digest": s.digest,
                "files": s.files,
                "kept": s.kept,
                "size_bytes": s.size,
                "changed": s.changed,
                "verified": s.verified,
            }
            for s in result.snapshots
        ],
    }


def _as_text(result: "RestoreResult") -> str:
    lines = []
    for each in result.snapshots:
        state = "restored and verified" if each.changed else "already there, verified and equal"
        state = state if each.verified else "restored as it was, NOT verified"
        kept = f", {each.kept} of them were there" if each.changed and each.kept else ""
        lines.append(f"{each.path}  ({state}; {each.files} files{kept}, {size(each.size)})")
    return "\n".join(lines)


def _picked_json(picked: "Picked") -> dict[str, object]:
    return {
        "archive": picked.archive,
        "model": picked.model,
        "revision": picked.revision,
        "paths": [str(path) for path in picked.paths],
        "size_bytes": picked.size,
        "verified": picked.verified,
    }


def _picked_text(picked: "Picked") -> str:
    state = "verified" if picked.verified else "NOT verified: nothing in the archive vouches for it"
    return "\n".join(f"{path}  ({state})" for path in picked.paths)


def _info_json(info: "ArchiveInfo") -> dict[str, object]:
    return {
        "archive": info.location,
        "name": info.name,
        "created": info.created.isoformat(),
        "size_bytes": info.size,
        "snapshots": [{"model": model, "revision": revision} for model, revision in info.snapshots],
        "base_created": info.base.isoformat() if info.base else None,
        "encrypted": info.encrypted,
    }


def _info_row(info: "ArchiveInfo") -> tuple[str, ...]:
    models, revisions = zip(*info.snapshots, strict=True)
    kind = "incremental" if info.base else "whole"
    return (
        f"{info.created.astimezone():%Y-%m-%d %H:%M:%S}", ", ".join(models), ", ".join(revisions), size(info.size),
        f"{kind}, encrypted" if info.encrypted else kind, info.name,
    )  # fmt: skip


def _description_json(found: "Description") -> dict[str, object]:
    manifest = found.manifest
    return {
        "archive": found.archive,
        "size_bytes": found.size,
        "content_bytes": found.content_size,
        "ratio": round(found.ratio, 4),
        "compression": found.compression,
        "id": manifest.id if manifest else None,
        "created": manifest.created if manifest else None,
        "zops": manifest.zops if manifest else None,
        "trusted": manifest.trusted if manifest else False,
        "chain": [{"id": identity, "name": name} for identity, name in found.chain],
        "snapshots": [
            {
                "model": s.model,
                "revision": s.revision,
                "manifest_digest": s.manifest.digest if s.manifest else None,
                "files": len(s.files) + len(s.links) + len(s.elsewhere),
                "elsewhere": sorted(s.elsewhere),
                "mismatched": sorted(s.mismatched),
            }
            for s in found.snapshots
        ],
        "members": [
            {"name": m.name, "kind": m.kind, "size_bytes": m.size, "mode": f"{m.mode:04o}", "link": m.link or None}
            for m in found.members
        ],
    }


def _description_text(found: "Description") -> str:
    manifest = found.manifest
    made = f"made {manifest.created} by zops {manifest.zops}" if manifest else "not made by zops"
    lines = [f"{found.archive}", f"{made}; {size(found.size)}, {found.ratio:.0%} of its content ({found.compression})"]
    for s in found.snapshots:
        vouched = f"manifest {s.manifest.digest[:12]}" if s.manifest else "nothing vouches for it"
        lines.append(f"{s.model} at {s.revision}: {len(s.files) + len(s.links) + len(s.elsewhere)} files, {vouched}")
        lines += [f"  in an older archive: {path}" for path in sorted(s.elsewhere)]
        lines += [f"  not as its manifest says: {path}" for path in sorted(s.mismatched)]
    lines += [f"builds on {name}" for _, name in found.chain]
    width = max((len(size(member.size)) for member in found.members), default=0)
    for m in found.members:
        shown = size(m.size) if m.kind == "file" else m.kind
        lines.append(f"  {shown:>{max(width, 9)}}  {m.name}{f' -> {m.link}' if m.link else ''}")
    return "\n".join(lines)


def _check_json(check: "ArchiveCheck") -> dict[str, object]:
    manifest = check.manifest
    return {
        "archive": check.archive,
        "verified": check.verified,
        "members": check.members,
        "size_bytes": check.size,
        "seconds": round(check.seconds, 3),
        "manifest_digests": [m.digest for m in manifest.snapshots.values()] if manifest else [],
    }


def _check_text(check: "ArchiveCheck") -> str:
    state = "every byte is right" if check.verified else "whole, but nothing in it vouches for its content"
    return f"{check.archive}\n{state}: {check.members} members, {size(check.size)} ({duration(check.seconds)})"


def _difference_json(found: "Difference") -> dict[str, object]:
    return {
        "first": found.first,
        "second": found.second,
        "equal": found.equal,
        "added": list(found.added),
        "removed": list(found.removed),
        "changed": list(found.changed),
        "same": found.same,
    }


def _difference_text(found: "Difference") -> str:
    lines = [f"added    {path}" for path in found.added]
    lines += [f"removed  {path}" for path in found.removed]
    lines += [f"changed  {path}" for path in found.changed]
    return "\n".join([*lines, f"{found.same} files are the same"])
