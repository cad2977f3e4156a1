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


def render(prefix: str, labels: Mapping[str, str], metrics: Iterable[Metric]) -> str:
    """Return metrics that share a prefix and labels as text."""
    shared = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "".join(
        f"# HELP {prefix}{name} {text}\n# TYPE {prefix}{name} gauge\n{prefix}{name}{{{shared}}} {float(value):.15g}\n"
        for name, text, value in metrics
    )


def write_metrics(path: Path, prefix: str, labels: Mapping[str, str], metrics: Iterable[Metric]) -> None:
    """Replace a file of metrics; a collector never sees half of it.

    Raises:
        HostShort: when the file cannot be written.
    """
    with shortage_told():
        write_text(path, render(prefix, labels, metrics))
        path.chmod(0o644)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


__all__ = ["Metric", "render", "write_metrics"]
