"""A process between a Ray worker and a run: what Ray kills of a worker that leaves, so that the run can still save.

When a driver is gone, Ray ends its workers, and a worker that ends kills its own children with SIGKILL. It then kills
this process and not the run; the run's standard input closes with it, and the run saves and stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def main(command: Sequence[str]) -> int:
    """Run a command, its standard input open for as long as ours is; end as it ends.

    Args:
        command: the program and its arguments.
    """
    run = subprocess.Popen(command, stdin=subprocess.PIPE)
    stdin = run.stdin

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a thread may not hold when Python ends
            pass
        if stdin is not None:
            with contextlib.suppress(OSError):
                stdin.close()

    threading.Thread(target=watch, daemon=True).start()
    code = run.wait()
    if code < 0:
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler to put back
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
