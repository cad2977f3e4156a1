"""Where zops keeps what it must remember on this host."""

import os
from collections.abc import Mapping
from pathlib import Path

SYSTEM_STATE_DIR = Path("/var/lib/zops")


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the directory for state: `ZOPS_STATE_DIR`, else the system's for root, else the user's; it may not exist.

    Args:
        environ: the environment, `os.environ` by default.
    """
    environ = os.environ if environ is None else environ
    if environ.get("ZOPS_STATE_DIR"):
        return Path(os.path.abspath(Path(environ["ZOPS_STATE_DIR"]).expanduser()))  # noqa: PTH100 - keeps links
    if os.geteuid() == 0:
        return SYSTEM_STATE_DIR
    home = environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return Path(home) / "zops"
