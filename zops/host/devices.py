"""Device nodes of the NVIDIA driver, and the links to them that systemd needs to let a container keep its GPUs.

With runc and systemd's control groups, `systemctl daemon-reload` writes the device rules of every container anew, from
names in /dev/char. NVIDIA's devices have no such links of their own, so the container loses its GPUs: NVML says Unknown
Error inside while the host sees nothing wrong (NVIDIA/nvidia-container-toolkit, issue 48).
"""

import os
import stat
from pathlib import Path

DEV = Path("/dev")


def missing_char_links(dev: Path = DEV) -> tuple[str, ...] | None:
    """Return the links in /dev/char that NVIDIA's device nodes lack; None where there are no such nodes."""
    nodes = [node for pattern in ("nvidia*", "nvidia-caps/*") for node in sorted(dev.glob(pattern))]
    numbers = {}
    for node in nodes:
        found = node.stat()
        if stat.S_ISCHR(found.st_mode):
            numbers[f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"] = node
    if not numbers:
        return None
    # The link counts even where it leads nowhere from here: systemd only reads its name and target.
    return tuple(f"/dev/char/{number}" for number in numbers if not (dev / "char" / number).is_symlink())
