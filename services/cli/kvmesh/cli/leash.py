"""`python leash.py PARENT COMMAND...` becomes COMMAND, which the kernel kills when its parent dies.

A program of its own, and not code between fork and exec, because the supervisor has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); kept over exec


def main() -> None:
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit("cannot tie the process to its supervisor's life: prctl failed")
    if os.getppid() != int(parent):  # died before the call above
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
