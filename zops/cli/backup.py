"""`zops cache backup` and `drill`, `zops archive prune` and `clean`: making archives, proving and removing them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zops.cli import quantities
from zops.cli.options import Loaded, confirm, with_spec
from zops.cli.output import Output, duration, size
from zops.errors import UsageError, ZopsError

if TYPE_CHECKING:
    from zops.archive.drill import Drill
    from zops.archive.encryption import Keys
    from zops.archive.keep import Decision, Keep
    from zops.archive.routine import Made, Routine
    from zops.archive.store import Store
    from zops.spec import Spec

FILE = click.Path(path_type=Path)
METRICS = click.option("--metrics", type=FILE, help="Write the state of the backups for node_exporter's textfiles.")
IDENTITY = click.option("--identity", "identities", type=FILE, multiple=True, help="File of keys that decrypt.")
PASSPHRASE = click.option("--passphrase-file", type=FILE, help="File whose first line encrypts and decrypts.")
KEEP = click.option("--keep", metavar="RULES", help="As last=7,daily=7,weekly=4,monthly=6 (default: backup.keep).")


@click.command(
    "backup",
    epilog="The archive is a plain tar that GNU tar extracts (docs/reference/archive-format.md), encrypted one that "
    "the age program decrypts. A bucket's credentials come from AWS_* variables, ~/.aws, or the instance.",
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--to", "store", metavar="STORE", help="A directory or s3://bucket/prefix (default: backup.to).")
@click.option("--compression", type=click.Choice(["zstd", "gzip", "none"]), help="Default: backup.compression.")
@click.option(
    "--incremental",
    is_flag=False,
    flag_value="auto",
    metavar="[BASE]",
    help="Store only files that this archive, or the newest, does not have.",
)
@click.option("--encrypt-to", multiple=True, metavar="KEY", help="age1..., ssh-..., or a file of such; repeatable.")
@PASSPHRASE
@IDENTITY
@KEEP
@click.option("--rate", type=quantities.rate, metavar="RATE", help="Bytes a second to read at most: 200MB/s.")
@click.option("--allow-mismatch", is_flag=True, help="Back up what does not match its manifest, and record that.")
@click.option("--trust-marker", is_flag=True, help="Where the disk shares blocks, believe the last verification.")
@METRICS
@with_spec
def backup(
    *, models: tuple[str, ...], store: str | None, metrics: Path | None, loaded: Loaded, out: Output, **options: Any
) -> None:
    """Write verified snapshots into a store as one tarball; of the configured model, or of each MODEL.

    Every file is read once and must have the SHA-256 of the manifest; else no archive is left.

    \b
    Examples:
      zops cache backup
      zops cache backup --to /mnt/backup --compression none
      zops cache backup --to s3://bucket/models --encrypt-to age1... --keep daily=7,weekly=4
      zops cache backup --incremental
      zops cache backup Tongyi-MAI/Z-Image-Turbo acme/painter
    """
    from zops.archive.routine import make_backup  # noqa: PLC0415 - the archive's modules are loaded when needed
    from zops.archive.store import open_store  # noqa: PLC0415

    spec = loaded.spec
    target = open_store(store_location(store, spec, "--to"))
    chosen = models or (spec.model,)
    try:
        with out.progress() as report:
            made = make_backup(_snapshots(chosen, spec), target, _routine(spec, options), report)
    except ZopsError:
        _write_metrics(metrics, target, chosen, ok=False)
        raise
    _write_metrics(metrics, target, chosen, ok=True)
    out.data(_made_json(made), _made_text(made))


@click.command("drill")
@click.argument("model", required=False)
@click.option("--from", "source", metavar="STORE|ARCHIVE", help="A store or one archive (default: backup.to).")
@click.option("--scratch", type=FILE, help="Where there is room for it (default: beside the cache's snapshots).")
@IDENTITY
@PASSPHRASE
@METRICS
@with_spec
def drill(
    *,
    model: str | None,
    source: str | None,
    scratch: Path | None,
    identities: tuple[Path, ...],
    passphrase_file: Path | None,
    metrics: Path | None,
    loaded: Loaded,
    out: Output,
) -> None:
    """Prove a backup: restore the newest archive into scratch space, read every byte again, and remove it.

    The outcome is noted on the archive, where `zops cache status` and `zops doctor` find it. Exit status 4 when a byte
    is wrong.

    \b
    Examples:
      zops cache drill
      zops cache drill --from s3://bucket/models --scratch /data/scratch
      zops cache drill --from /mnt/backup/model.tar.zst.age --identity key.txt
    """
    from zops.archive.drill import drill as practise  # noqa: PLC0415 - the archive's modules are loaded when needed
    from zops.archive.store import open_archive  # noqa: PLC0415

    spec = loaded.spec
    wanted = model or spec.model
    location = archive_location(source, wanted, spec)
    archive = open_archive(location, read_keys(spec, identities, passphrase_file))
    try:
        with out.progress() as report:
            done = practise(archive, scratch or spec.cache.dir, model=wanted, report=report)
    except ZopsError:
        _write_metrics(metrics, archive.store, (wanted,), ok=None)
        raise
    _write_metrics(metrics, archive.store, (wanted,), ok=None)
    out.data(_drill_json(done), _drill_text(done))


@click.command("prune")
@click.option("--from", "store", metavar="STORE", help="A directory or s3://bucket/prefix (default: backup.to).")
@KEEP
@click.option("--all", "every", is_flag=True, help="Every model in the store, not only the configured one.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_spec
def prune(
    *, store: str | None, keep: str | None, every: bool, dry_run: bool, yes: bool, loaded: Loaded, out: Output
) -> None:
    """Remove the archives that the rules do not keep.

    Never the newest good one of a model, never one that another builds on, never what zops did not name.

    \b
    Examples:
      zops archive prune --keep last=7,daily=7,weekly=4,monthly=6 --dry-run
      zops archive prune --yes
    """
    from zops.archive.routine import tidy  # noqa: PLC0415 - the archive's modules are loaded when needed
    from zops.archive.store import open_store  # noqa: PLC0415

    spec = loaded.spec
    target, rules = open_store(store_location(store, spec, "--from")), _rules(keep, spec)
    if rules is None:
        raise UsageError("nothing says what to keep", hint="give --keep last=7,daily=7,weekly=4, or set backup.keep")
    models = () if every else (spec.model,)
    decisions = tidy(target, rules, models, dry_run=True)
    going = [decision for decision in decisions if not decision.kept]
    if going and not dry_run:
        freed = size(sum(decision.archive.size for decision in going))
        confirm(out, f"Remove {len(going)} of {len(decisions)} archives ({freed}) from {target.location}?", yes=yes)
        with out.progress() as report:
            decisions = tidy(target, rules, models, report=report)
    body = {"dry_run": dry_run, "keep": str(rules), "archives": [_decision_json(each) for each in decisions]}
    rows = [_decision_row(each, dry_run=dry_run) for each in decisions]
    out.table(("STATE", "SIZE", "ARCHIVE", "WHY"), rows, body, empty=f"there are no archives in {target.location}")


@click.command("clean")
@click.option("--from", "store", metavar="STORE", help="A directory or s3://bucket/prefix (default: backup.to).")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@with_spec
def clean(*, store: str | None, dry_run: bool, loaded: Loaded, out: Output) -> None:
    """Remove what killed backups left in a store: parts of files, and of uploads, which a bucket bills.

    A backup does this too before it begins. What a running one is at work on stays; so do uploads of other hosts that
    are younger than a day.

    \b
    Examples:
      zops archive clean --dry-run
      zops archive clean --from s3://bucket/models
    """
    from zops.archive.store import open_store  # noqa: PLC0415 - the archive's modules are loaded when needed

    target = open_store(store_location(store, loaded.spec, "--from"))
    found = target.clean(dry_run=dry_run)
    body = {
        "dry_run": dry_run,
        "store": target.location,
        "leftovers": [{"name": f.name, "size_bytes": f.size, "began": f.began.isoformat()} for f in found],
    }
    state = "would go" if dry_run else "removed"
    rows = [(state, size(f.size) if f.size else "?", f"{f.began.astimezone():%Y-%m-%d %H:%M}", f.name) for f in found]
    out.table(("STATE", "SIZE", "BEGAN", "OF"), rows, body, empty=f"nothing was left in {target.location}")


def read_keys(spec: "Spec", identities: tuple[Path, ...] = (), passphrase_file: Path | None = None) -> "Keys":
    """Return what opens encrypted archives: by flag, else by zops.yaml, and the passphrase variable."""
    from zops.archive.encryption import read_keys as read  # noqa: PLC0415 - only who has archives pays for it

    files, passphrase = identities or spec.backup.identities, passphrase_file or spec.backup.passphrase_file
    return read(files, passphrase, ask=_ask if sys.stdin.isatty() and sys.stderr.isatty() else None)


def _ask(file: str) -> str:
    return str(click.prompt(f"Passphrase of {file}", hide_input=True, err=True))


def _routine(spec: "Spec", options: dict[str, Any]) -> "Routine":
    from zops.archive.encryption import read_passphrase, read_recipients  # noqa: PLC0415 - as above
    from zops.archive.routine import Routine  # noqa: PLC0415

    named, file = options["encrypt_to"], options["passphrase_file"]
    # A flag decides alone; what zops.yaml or the environment says is for backups without one.
    if not named and not file:
        named, file = spec.backup.encrypt_to, spec.backup.passphrase_file
    passphrase = None if named and not file else read_passphrase(file)
    return Routine(
        recipients=read_recipients(named, passphrase),
        keys=read_keys(spec, options["identities"], options["passphrase_file"]),
        incremental=options["incremental"] or ("auto" if spec.backup.incremental else ""),
        keep=_rules(options["keep"], spec),
        options={
            "compression": options["compression"] or spec.backup.compression,
            "limit": options["rate"],
            "allow_mismatch": options["allow_mismatch"],
            "trust_marker": options["trust_marker"],
        },
    )


def _rules(asked: str | None, spec: "Spec") -> "Keep | None":
    text = asked or spec.backup.keep
    if not text:
        return None
    from zops.archive.keep import Keep  # noqa: PLC0415 - only who has rules pays for it

    return Keep.parse(text)


def _snapshots(models: tuple[str, ...], spec: "Spec") -> list[Path]:
    from zops.cache.layout import meant  # noqa: PLC0415 - as above
    from zops.spec.model import Source  # noqa: PLC0415

    # The revision in zops.yaml is the configured model's.
    others = {"source": Source()}
    specs = [spec.model_copy(update={"model": model} | ({} if model == spec.model else others)) for model in models]
    return [meant(each).path for each in specs]


def store_location(asked: str | None, spec: "Spec", flag: str) -> str:
    location = asked or spec.backup.to
    if not location:
        raise UsageError(
            "there is no store for archives",
            code="backup-store-missing",
            hint=f"set backup.to in zops.yaml, or give {flag} with a directory or s3://bucket/prefix",
        )
    return location


def archive_location(asked: str | None, model: str, spec: "Spec") -> str:
    """Return the archive that was asked for, or the newest of the model in the store that was."""
    from zops.archive.names import read_name  # noqa: PLC0415 - as above
    from zops.archive.store import newest, open_store  # noqa: PLC0415
    from zops.errors import SourceFailed  # noqa: PLC0415

    location = store_location(asked, spec, "--from")
    path = location.partition("?")[0]
    if read_name(path.rpartition("/")[2], 0, "") or (
        not path.startswith("s3://") and Path(path).expanduser().is_file()
    ):
        return location
    found = newest(open_store(location), model)
    if found is None:
        raise SourceFailed(
            f"there is no archive of {model} in {location}",
            code="archive-not-found",
            hint="make one with: zops cache backup, or name an archive",
        )
    return found.location


def _write_metrics(path: Path | None, store: "Store", models: tuple[str, ...], *, ok: bool | None) -> None:
    """Write the metrics of models; a store that does not answer now must not hide how the run ended."""
    if path is None:
        return
    from zops.archive.history import History, read_history, write_history  # noqa: PLC0415 - as above

    histories = {}
    for model in models:
        try:
            histories[model] = read_history(store, model)
        except ZopsError:
            histories[model] = History()
    write_history(path, store.location, histories, ok=ok)


def _made_json(made: "Made") -> dict[str, object]:
    result = made.result
    return {
        "archive": result.location,
        "base": made.base or None,
        "size_bytes": result.size,
        "content_bytes": result.content_size,
        "stored_bytes": result.stored_size,
        "resumed_bytes": result.resumed_size,
        "ratio": round(result.ratio, 4),
        "seconds": round(result.seconds, 3),
        "files": result.files,
        "manifest_digests": result.digests,
        "cloned": result.cloned,
        "mismatched": result.mismatched,
        "removed": [decision.archive.name for decision in made.decisions if decision.removed],
    }


def _made_text(made: "Made") -> str:
    result = made.result
    share = f"{size(result.size)}, {result.ratio:.0%} of the snapshot"
    lines = [f"{result.location}  ({result.files} files, {share}, {duration(result.seconds)})"]
    lines += [f"builds on {made.base}"] if made.base else []
    lines += [f"not as its manifest says: {name}" for name in result.mismatched]
    lines += [f"removed {decision.archive.name}" for decision in made.decisions if decision.removed]
    return "\n".join(lines)


def _drill_json(done: "Drill") -> dict[str, object]:
    return {
        "archive": done.archive,
        "models": list(done.models),
        "manifest_digests": list(done.digests),
        "files": done.files,
        "size_bytes": done.size,
        "restore_seconds": round(done.restore_seconds, 3),
        "seconds": round(done.seconds, 3),
        "bytes_per_second": round(done.rate),
    }


def _drill_text(done: "Drill") -> str:
    return (
        f"{done.archive}\n{done.files} files ({size(done.size)}) restored in {duration(done.restore_seconds)}, "
        f"{done.rate / 1e6:.0f} MB/s, read again and compared by SHA-256; removed ({duration(done.seconds)})"
    )


def _decision_json(decision: "Decision") -> dict[str, object]:
    archive = decision.archive
    return {
        "archive": archive.location,
        "created": archive.created.isoformat(),
        "size_bytes": archive.size,
        "kept": decision.kept,
        "removed": decision.removed,
        "reasons": list(decision.reasons),
    }


def _decision_row(decision: "Decision", *, dry_run: bool) -> tuple[str, ...]:
    state = "kept" if decision.kept else "would go" if dry_run else "removed" if decision.removed else "goes"
    archive = decision.archive
    return state, size(archive.size), archive.name, ", ".join(decision.reasons) or "no rule keeps it"
