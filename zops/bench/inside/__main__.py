"""Read a task from stdin, measure it, and tell what came of it on stdout, one JSON object a line."""

import importlib
import json
import sys
from typing import Any

KINDS = ("load", "generate", "roofline")


def tell(**body: Any) -> None:
    """Send one object to the process that started this one."""
    sys.__stdout__.write(json.dumps(body) + "\n")  # type: ignore[union-attr] # a pipe, always
    sys.__stdout__.flush()  # type: ignore[union-attr] # as above


def main() -> None:
    """Measure one task."""
    kind = sys.argv[1]
    assert kind in KINDS, kind
    task = json.load(sys.stdin)
    sys.stdout = sys.stderr  # what libraries print is none of ours
    importlib.import_module(f"zops.bench.inside.{kind}").measure(task, tell)


if __name__ == "__main__":
    main()
