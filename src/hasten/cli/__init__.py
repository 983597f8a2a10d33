"""The `hasten` command: its verbs, one file each, and how it ends.

Exit codes: 0 done (or already finished), 2 wrong input, 3 the run diverged, 130, 143 and 129 stopped by SIGINT, SIGTERM
and SIGHUP (a closed terminal) with everything saved; the same command goes on.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType

DONE, WRONG_INPUT, DIVERGED, INTERRUPTED = 0, 2, 3, 130


def main(arguments: list[str] | None = None) -> None:
    """Run the `hasten` command and leave the process with its exit code.

    What a person can put right is one sentence on standard error, never a traceback.
    """
    from hasten.cli.app import app
    from hasten.errors import HastenError, SaidElsewhere, printable

    asked: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        asked.append(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(asked[0])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = signal.Signals.__members__.get(name)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, leave)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal lacks is no reason to lose a run
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=arguments, prog_name="hasten")
    except SaidElsewhere as error:
        sys.exit(error.exit_code)
    except HastenError as error:
        sys.exit(_say(printable(str(error)), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_say("stopped.", INTERRUPTED))
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)
    except Exception:
        if not asked:
            raise
        # A library that calls back into Python, such as pydantic, makes an error of its own of being told to leave.
        sys.exit(_say("stopped.", asked[0]))


def _say(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError):  # there may be nobody left to tell
        print(f"hasten: {sentence}", file=sys.stderr)
    return code
