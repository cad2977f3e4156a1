"""What this machine hands to a build of the image: the same that its pip was configured with."""

import os
import subprocess
import sys
from pathlib import Path


def find_links() -> Path | None:
    """The directory of wheels that pip prefers on this machine, if it has one: the build is handed the same."""
    configured = os.environ.get("PIP_FIND_LINKS", "")
    if not configured:
        argv = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        configured = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout
    return next((Path(part) for part in configured.split() if Path(part).is_dir()), None)


def ca_bundle() -> Path | None:
    """The CA bundle that this machine's programs were told to trust, if they were: the build needs it too."""
    named = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    return Path(named) if named and Path(named).is_file() else None
