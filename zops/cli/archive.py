"""`zops cache backup` and `zops cache restore`."""

import click

from zops.archive import backup as backups
from zops.archive import restore as restores
from zops.archive.store import newest, open_archive, open_store
from zops.cache.layout import meant
from zops.cli.options import with_spec
from zops.cli.output import Output, duration, size
from zops.errors import SourceFailed, UsageError
from zops.spec import Loaded, Spec


@click.command(
    "backup",
    epilog="The archive is a plain tar that GNU tar extracts (docs/reference/archive-format.md). A bucket's "
    "credentials, region and endpoint come from the usual AWS_* variables.",
)
@click.option("--to", "store", metavar="STORE", help="A directory or s3://bucket/prefix (default: backup.to).")
@click.option("--compression", type=click.Choice(["zstd", "none"]), help="Default: backup.compression.")
@with_spec
def backup(*, loaded: Loaded, out: Output, store: str | None, compression: backups.Compression | None) -> None:
    """Write the model's verified snapshot into a store as one tarball.

    Every file is read once and must have the SHA-256 of the manifest; else no archive is left.

    \b
    Examples:
      zops cache backup
      zops cache backup --to /mnt/backup --compression none
      zops cache backup --to s3://bucket/models
    """
    spec = loaded.spec
    target = open_store(_store(store, spec, "--to"))
    snapshot = meant(spec)
    with out.progress() as report:
        result = backups.backup([snapshot], target, compression=compression or spec.backup.compression, report=report)
    body = {
        "archive": result.location,
        "size_bytes": result.size,
        "content_bytes": result.content_size,
        "ratio": round(result.ratio, 4),
        "seconds": round(result.seconds, 3),
        "files": result.files,
        "manifest_digests": result.digests,
    }
    share = f"{size(result.size)}, {result.ratio:.0%} of the snapshot"
    out.data(body, f"{result.location}  ({result.files} files, {share}, {duration(result.seconds)})")


@click.command(
    "restore",
    epilog="ARCHIVE is a path or s3://bucket/prefix/name; without it, the newest archive of the model in the store. "
    "Archives of other programs (.tar, .tar.gz, .tar.zst) are restored too.",
)
@click.argument("archive", required=False)
@click.option("--from", "store", metavar="STORE", help="A directory or s3://bucket/prefix (default: backup.to).")
@with_spec
def restore(*, loaded: Loaded, out: Output, archive: str | None, store: str | None) -> None:
    """Bring the model's snapshot back from a tarball, every byte verified, or change nothing.

    What is there already and equal is left alone; what differs is replaced after the archive's one is complete.

    \b
    Examples:
      zops cache restore
      zops cache restore modelscope_cache_backup.tar.gz
      zops cache restore --from s3://bucket/models
    """
    spec = loaded.spec
    location = archive or _find(store, spec)
    with out.progress() as report:
        result = restores.restore(open_archive(location), spec.cache.dir, model=spec.model, report=report)
    out.data(_as_json(result), _as_text(result))


def _store(asked: str | None, spec: Spec, flag: str) -> str:
    location = asked or spec.backup.to
    if not location:
        raise UsageError(
            "there is no store for archives",
            code="backup-store-missing",
            hint=f"set backup.to in zops.yaml, or give {flag} with a directory or s3://bucket/prefix",
        )
    return location


def _find(asked: str | None, spec: Spec) -> str:
    """Return the archive to restore when none was named: the spec's source, else the newest in the store."""
    if asked is None and spec.source.kind == "archive" and spec.source.path:
        return spec.source.path
    store = open_store(_store(asked, spec, "--from"))
    found = newest(store, spec.model)
    if found is None:
        raise SourceFailed(
            f"there is no archive of {spec.model} in {store.location}",
            code="archive-not-found",
            hint="make one with: zops cache backup, or name an archive",
        )
    return found.location


def _as_json(result: restores.RestoreResult) -> dict[str, object]:
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
                "size_bytes": s.size,
                "changed": s.changed,
            }
            for s in result.snapshots
        ],
    }


def _as_text(result: restores.RestoreResult) -> str:
    found = {True: "restored and verified", False: "already there, verified and equal"}
    return "\n".join(f"{s.path}  ({found[s.changed]}; {s.files} files, {size(s.size)})" for s in result.snapshots)
