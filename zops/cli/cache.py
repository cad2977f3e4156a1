"""`zops cache`: what lies in the cache, whether it is right, and how it gets there."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zops.cli.archive import restore
from zops.cli.backup import backup, drill, read_keys
from zops.cli.options import Loaded, with_spec
from zops.cli.output import Output, duration, size
from zops.cli.scrub import scrub
from zops.cli.space import prune, slim

if TYPE_CHECKING:
    from zops.cache.repair import Spring
    from zops.cache.status import SnapshotStatus
    from zops.cache.verify import Verification
    from zops.events import Report
    from zops.health.rehearsal import Rehearsed
    from zops.spec import Spec

SNAPSHOT = click.argument("snapshot", required=False, type=click.Path(path_type=Path))


@click.group()
def cache() -> None:
    """Pull, verify, scrub, warm, back up and restore snapshots."""


@cache.command()
@with_spec
def pull(*, loaded: Loaded, out: Output) -> None:
    """Bring the model from its source into the cache, complete and verified.

    Goes on where an earlier run stopped, fetches only what is missing, and calls the snapshot good only after the
    SHA-256 of every file was compared.

    \b
    Examples:
      zops cache pull
      zops cache pull --model Tongyi-MAI/Z-Image-Turbo --cache-dir /data/cache
      zops cache pull --set source.kind=huggingface
    """
    from zops.cache.pull import pull as pull_snapshot  # noqa: PLC0415 - the cache's modules are loaded when needed

    with out.progress() as report:
        result = pull_snapshot(loaded.spec, report)
    body = {
        "path": str(result.snapshot.path),
        "model": result.manifest.model,
        "revision": result.manifest.revision,
        "origin": result.manifest.origin,
        "manifest_digest": result.manifest.digest,
        "fetched": list(result.fetched),
        "found": list(result.found),
        "fetched_bytes": result.bytes,
        "changed": result.changed,
    }
    fetched = f"{len(result.fetched)} fetched ({size(result.bytes)}), {len(result.found)} found"
    out.data(body, f"{result.snapshot.path}\nverified: {len(result.manifest.files)} files; {fetched}")


@cache.command()
@SNAPSHOT
@click.option("--deep", is_flag=True, help="Compare the SHA-256 of every file, not only size, time and inode.")
@click.option("--reread", is_flag=True, help="Compare the BLAKE3 that the last --deep recorded; a third of its time.")
@click.option("--repair", is_flag=True, help="Fetch the bad files; needs --deep.")
@click.option("--from", "archive", metavar="ARCHIVE", help="With --repair: only from this archive, a path or s3://...")
@with_spec
def verify(
    *,
    snapshot: Path | None,
    deep: bool,
    reread: bool,
    repair: bool,
    archive: str | None,
    loaded: Loaded,
    out: Output,
) -> None:
    """Compare a snapshot with its manifest, without a network.

    SNAPSHOT is a directory; without it the best snapshot of the model in the cache is taken. Exit status 3 when there
    is nothing to compare, nobody ever hashed it, or all that is wrong is that files are missing; 4 when a file is not
    what it must be.

    --reread reads every byte as --deep does and finds what a disk does to them. It trusts what was recorded beside the
    snapshot, so it cannot find what somebody did who changed the record too: only --deep can.

    --repair asks the source first and then, for what it does not deliver, the newest archive in backup.to. What comes
    replaces nothing before it was verified.

    \b
    Examples:
      zops cache verify
      zops cache verify --deep
      zops cache verify --reread
      zops cache verify --deep --repair
      zops cache verify --deep --repair --from /mnt/backup/model.tar.zst
    """
    from zops.cache.repair import repair as mend  # noqa: PLC0415 - the cache's modules are loaded when needed
    from zops.cache.verify import verify as compare  # noqa: PLC0415

    if repair and not deep:
        raise click.UsageError("--repair needs --deep: what is bad is known only after everything was hashed")
    if deep and reread:
        raise click.UsageError("--deep and --reread exclude each other: --deep reads everything too")
    if archive and not repair:
        raise click.UsageError("--from goes with --repair")
    path = _chosen(snapshot, loaded)
    with out.progress() as report:
        if repair:
            source = None if archive else loaded.spec.source
            repaired = mend(path, source, report, archive=_spring(archive, loaded))
            result, fetched = repaired.verification, repaired.fetched
        else:
            result, fetched = compare(path, deep=deep, reread=reread, report=report), ()
    out.data(_verification_json(result, fetched), _verification_text(result, fetched))
    result.require()


@cache.command()
@SNAPSHOT
@click.option("--revision", default="", help="Branch, tag or commit; with --from-disk the name to give it.")
@click.option(
    "--from-hub/--from-disk",
    "from_hub",
    default=None,
    help="Whose word is written down (default: the hub's when source.kind is one).",
)
@with_spec
def pin(*, snapshot: Path | None, revision: str, from_hub: bool | None, loaded: Loaded, out: Output) -> None:
    """Write the manifest of a snapshot, after every file was hashed.

    From the hub: every file must be as the hub lists it at that revision, which is resolved to a commit. From the disk:
    the files are taken as they are, and the manifest says that only this disk vouches for them (origin: local), unless
    they equal the catalog's. Either way, every later change is found.

    \b
    Examples:
      zops cache pin
      zops cache pin --revision master
      zops cache pin /data/my-model --model me/my-model --from-disk
    """
    from zops.cache.pin import pin_from_hub  # noqa: PLC0415 - the cache's modules are loaded when needed
    from zops.cache.verify import pin as take  # noqa: PLC0415

    path = _chosen(snapshot, loaded)
    spec = loaded.spec
    is_hub = spec.source.kind in {"modelscope", "huggingface"}
    if from_hub and not is_hub:
        raise click.UsageError(f"source.kind is {spec.source.kind}, which is no hub; set it, or use --from-disk")
    with out.progress() as report:
        if is_hub if from_hub is None else from_hub:
            source = spec.source.model_copy(update={"revision": revision or spec.source.revision or _commit_of(path)})
            manifest = pin_from_hub(path, spec.model, source, report)
        else:
            manifest = take(path, spec.model, revision, report)
    body = {"path": str(path), "files": len(manifest.files), "manifest_digest": manifest.digest}
    body |= {"model": manifest.model, "revision": manifest.revision, "origin": manifest.origin}
    body["source"] = manifest.source
    out.data(body, f"{path}\npinned: {len(manifest.files)} files, {size(manifest.size)}, origin {manifest.origin}")


@cache.command()
@SNAPSHOT
@click.option("--check", is_flag=True, help="Only tell how much is in memory.")
@click.option("--compile", "compiles", is_flag=True, help="Also start an instance once, for what it compiles.")
@with_spec
def warm(*, snapshot: Path | None, check: bool, compiles: bool, loaded: Loaded, out: Output) -> None:
    """Bring a snapshot into the page cache, in the order in which it is loaded.

    Stops before more memory is used than this host can spare. With --compile an instance is then started, waited for
    and stopped: its kernels and the verdict of its quality gate are there for the next start.

    \b
    Examples:
      zops cache warm
      zops cache warm --compile
      zops cache warm --check --output json
    """
    from zops.cache.warm import residency  # noqa: PLC0415 - the cache's modules are loaded when needed
    from zops.cache.warm import warm as bring_in  # noqa: PLC0415

    path = _chosen(snapshot, loaded)
    if check:
        now = residency(path)
        body = {
            "path": str(path),
            "resident_bytes": now.resident,
            "size_bytes": now.total,
            "share": round(now.share, 4),
        }
        out.data(body, f"{path}\n{now.share:.0%} of {size(now.total)} in memory")
        return
    with out.progress() as report:
        result = bring_in(path, report)
        rehearsed = _rehearse(loaded.spec, report) if compiles else None
    body = {
        "path": str(path),
        "size_bytes": result.after.total,
        "resident_bytes": result.after.resident,
        "share_before": round(result.before.share, 4),
        "share": round(result.after.share, 4),
        "stopped": result.stopped,
        "seconds": round(result.seconds, 3),
        "compiled": rehearsed.done if rehearsed else None,
        "compile_seconds": round(rehearsed.seconds, 3) if rehearsed else None,
    }
    was = f"{result.before.share:.0%} before"
    text = f"{path}\n{result.after.share:.0%} of {size(result.after.total)} in memory ({was})"
    if rehearsed:
        text += f"\n{f'compiled in {rehearsed.seconds:.1f} s' if rehearsed.done else 'an instance is there already'}"
    out.data(body, text)


def _rehearse(spec: "Spec", report: "Report") -> "Rehearsed":
    from zops.health.rehearsal import rehearse  # noqa: PLC0415 - a client and an engine, for this option alone
    from zops.runtime.deployment import deploy  # noqa: PLC0415 - as above
    from zops.runtime.select import open_runtime  # noqa: PLC0415 - as above

    return rehearse(open_runtime(spec), deploy(spec), report)


@cache.command()
@click.option("--all", "every", is_flag=True, help="Every model in the cache, not only the configured one.")
@with_spec
def status(*, every: bool, loaded: Loaded, out: Output) -> None:
    """List the snapshots of a cache: layout, state, size, types of the weights, share in memory.

    And which instances use each, when it was last verified, and when it was last backed up into backup.to.

    \b
    Examples:
      zops cache status
      zops cache status --all --output json
    """
    from zops.archive.history import last_backups  # noqa: PLC0415 - zstandard and the stores, for this command alone
    from zops.cache.status import status as look  # noqa: PLC0415 - the cache's modules are loaded when needed
    from zops.runtime.usage import used_snapshots_if_known  # noqa: PLC0415 - docker-py costs 100 ms

    spec = loaded.spec
    found = look(
        spec.cache.dir,
        None if every else spec.model,
        used=used_snapshots_if_known(spec, out.warn),
        last_backup=last_backups(spec.backup.to),
    )
    columns = (
        "MODEL", "REVISION", "LAYOUT", "STATE", "SIZE", "TYPES", "IN MEMORY", "VERIFIED", "SCRUBBED", "BACKED UP",
        "DRILLED", "USED BY", "PATH",
    )  # fmt: skip
    empty = f"no snapshot in {loaded.spec.cache.dir}; fetch one with: zops cache pull"
    out.table(columns, [_status_row(each) for each in found], [each.as_json() for each in found], empty=empty)


cache.add_command(backup)
cache.add_command(drill)
cache.add_command(restore)
cache.add_command(slim)
cache.add_command(prune)
cache.add_command(scrub)


def _chosen(snapshot: Path | None, loaded: Loaded) -> Path:
    from zops.cache.layout import meant  # noqa: PLC0415 - the cache's modules are loaded when needed

    return snapshot.absolute() if snapshot else meant(loaded.spec).path


def _commit_of(path: Path) -> str | None:
    """Return the commit that a snapshot's directory is named for, which is how the SDKs name it."""
    from zops.cache.hubs import is_commit  # noqa: PLC0415 - as above

    return path.name if is_commit(path.name) else None


def _spring(archive: str | None, loaded: Loaded) -> "Spring | None":
    """Return the archive to mend from: the one that was named, the source, or the newest backup."""
    from zops.archive.mend import spring_of_archive, spring_of_store  # noqa: PLC0415 - only a repair needs archives

    spec = loaded.spec
    named = archive or (spec.source.path if spec.source.kind == "archive" else None)
    if named:
        return spring_of_archive(named, read_keys(spec))
    return spring_of_store(spec.backup.to, spec.model, read_keys(spec)) if spec.backup.to else None


def _verification_json(result: "Verification", fetched: tuple[str, ...]) -> dict[str, object]:
    return {
        "path": str(result.path),
        "model": result.manifest.model,
        "revision": result.manifest.revision,
        "manifest_digest": result.manifest.digest,
        "deep": result.deep or bool(fetched),
        "reread": result.depth == "reread",
        "ok": result.ok,
        "seconds": round(result.seconds, 3),
        "fetched": list(fetched),
        "findings": [{"path": f.path, "status": f.status, "detail": f.detail} for f in result.findings],
    }


def _verification_text(result: "Verification", fetched: tuple[str, ...]) -> str:
    lines = [str(result.path)]
    lines += [f"{f.status:<11}{f.path}  {f.detail}".rstrip() for f in result.findings if f.status != "ok"]
    lines += [f"fetched    {path}" for path in fetched]
    right = sum(f.status == "ok" for f in result.findings)
    how = {"deep": "by SHA-256", "reread": "by recorded BLAKE3", "quick": "by size, time and inode"}[result.depth]
    lines.append(f"{right} of {len(result.manifest.files)} files right {how} ({duration(result.seconds)})")
    return "\n".join(lines)


def _short(revision: str) -> str:
    """Shorten a commit, but not what was derived from it."""
    base, separator, derived = revision.partition("-bf16")
    return f"{base[:12]}{separator}{derived}" or "?"


def _status_row(each: "SnapshotStatus") -> tuple[str, ...]:
    verified = _moment(each.verified_at)
    scrubbed = _moment(each.scrubbed_at) + (" damaged" if each.scrub_result == "damaged" else "")
    backup = each.last_backup
    backed_up = f"{backup.at.astimezone():%Y-%m-%d %H:%M}" if backup else "-"
    drills = {
        None: "never",
        True: f"{backup.drilled_at.astimezone():%Y-%m-%d}" if backup and backup.drilled_at else "-",
    }
    drilled = drills.get(backup.drill_ok, "damaged") if backup else "-"
    used_by = "?" if each.used_by is None else ", ".join(each.used_by) or "-"
    types = ", ".join(f"{component} {'/'.join(dtypes)}" for component, dtypes in each.dtypes.items())
    snapshot = each.snapshot
    return (
        snapshot.model or "?", _short(snapshot.revision), snapshot.layout, each.state, size(each.size_bytes), types,
        f"{each.residency.share:.0%}", verified, scrubbed, backed_up, drilled, used_by, str(snapshot.path),
    )  # fmt: skip


def _moment(seconds: float | None) -> str:
    import time  # noqa: PLC0415 - for these columns alone

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"
