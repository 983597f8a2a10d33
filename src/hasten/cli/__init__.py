"""The `hasten` command: its verbs, one file each, and how it ends.

Exit codes: 0 done (or already finished), 2 wrong input, 3 the run diverged, 130 and 143 stopped by SIGINT and SIGTERM
with everything saved; the same command goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

DONE, WRONG_INPUT, DIVERGED, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


def main(arguments: list[str] | None = None) -> None:
    """Run the `hasten` command and leave the process with its exit code.

    What a person can put right is one sentence on standard error, never a traceback.
    """
    from hasten.cli.app import app
    from hasten.errors import HastenError, printable

    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(args=arguments, prog_name="hasten")
    except HastenError as error:
        sys.exit(_say(printable(str(error)), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_say("stopped.", INTERRUPTED))
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)


def _say(sentence: str, code: int) -> int:
    print(f"hasten: {sentence}", file=sys.stderr)
    return code


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
