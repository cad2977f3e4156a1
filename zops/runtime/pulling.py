"""What an engine tells while it pulls an image, as one piece of work with all layers counted together."""

from collections.abc import Iterable, Mapping
from typing import Any

from zops.errors import SourceFailed
from zops.events import Progressed, Report


def follow(lines: Iterable[Mapping[str, Any]], name: str, report: Report) -> None:
    """Report what an engine tells while it pulls.

    Raises:
        SourceFailed: when it tells of an error, which it does within a stream that began well.
    """
    done: dict[str, int] = {}
    total: dict[str, int] = {}
    for line in lines:
        if "error" in line:
            raise pull_failed(name, str(line["error"]))
        detail = line.get("progressDetail") or {}
        if line.get("status") == "Downloading" and "current" in detail:
            layer = str(line.get("id", ""))
            done[layer] = int(detail["current"])
            total[layer] = int(detail.get("total") or detail["current"])
        elif line.get("status") == "Download complete" and line.get("id") in total:
            done[line["id"]] = total[line["id"]]
        else:
            continue
        report(Progressed("image", sum(done.values()), sum(total.values())))


def pull_failed(name: str, reason: str) -> SourceFailed:
    """Return the error of a pull that a registry or the way to it made fail."""
    return SourceFailed(
        f"the image {name} could not be pulled: {' '.join(reason.split())}",
        code="image-pull-failed",
        hint="check the name and the network; log in with: docker login; or build it: set image.build to true",
    )
