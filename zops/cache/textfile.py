"""Metrics in a file, in Prometheus' text format: what commands that end leave for node_exporter to collect."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from zops.cache.manifest import write_text
from zops.cache.room import shortage_told


class Metric(NamedTuple):
    """A gauge: its name behind the common prefix, what it means, and its value."""

    name: str
    text: str
    value: float


Labelled = tuple[Mapping[str, str], Iterable[Metric]]
"""Metrics that share labels."""


def render(prefix: str, *groups: Labelled) -> str:
    """Return metrics that share a prefix as text: of each name all values together, as the format wants it."""
    families: dict[str, list[str]] = {}
    for labels, metrics in groups:
        shared = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        for name, text, value in metrics:
            head = f"# HELP {prefix}{name} {text}\n# TYPE {prefix}{name} gauge\n"
            families.setdefault(name, [head]).append(f"{prefix}{name}{{{shared}}} {float(value):.15g}\n")
    return "".join(line for lines in families.values() for line in lines)


def write_metrics(path: Path, text: str) -> None:
    """Replace a file of metrics; a collector never sees half of it.

    Raises:
        HostShort: when the file cannot be written.
    """
    with shortage_told():
        write_text(path, text)
        path.chmod(0o644)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


__all__ = ["Labelled", "Metric", "render", "write_metrics"]
