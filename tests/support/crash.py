"""A process that dies just before its n-th change to the file system, as by SIGKILL: nothing is cleaned up."""

import os
import sys

STATUS = 99
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "os.chmod", "shutil.rmtree"}


def exit_at(moment: int, below: str) -> None:
    """Die before change number `moment` (from 0) to a path that holds `below`."""
    left = moment

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and below in str(arguments[0]):
            left -= 1
            if left < 0:
                os._exit(STATUS)

    sys.addaudithook(watch)
