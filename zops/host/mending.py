"""Running the fixes that the doctor found: commands that lose nothing and stop nobody, one by one."""

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The slowest, writing CDI specifications, takes a second or two.
FIX_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Mended:
    """A fix that was run. `reason` is why it did not work, empty when it did."""

    argv: tuple[str, ...]
    reason: str = ""


def command(fix: Sequence[str], *, can_ask: bool) -> tuple[str, ...]:
    """Return the command for a fix as this user must run it.

    Args:
        fix: the fix of a finding.
        can_ask: whether sudo may ask for a password.
    """
    if os.geteuid() == 0:
        return tuple(fix)
    return ("sudo", *fix) if can_ask else ("sudo", "-n", *fix)


def mend(argv: Sequence[str], run: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run) -> Mended:
    """Run one fix and say whether it worked; what it says is told only when it did not."""
    try:
        done = run(list(argv), capture_output=True, text=True, timeout=FIX_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return Mended(tuple(argv), f"there is no {argv[0]} here")
    except subprocess.TimeoutExpired:
        return Mended(tuple(argv), f"not done within {FIX_TIMEOUT_S} s")
    except OSError as error:
        return Mended(tuple(argv), str(error.strerror))
    if done.returncode == 0:
        return Mended(tuple(argv))
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return Mended(tuple(argv), said[-1] if said else f"it ended with status {done.returncode}")
