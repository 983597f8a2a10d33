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
        code = app(args=arguments, prog_name="hasten", standalone_mode=False)
    except HastenError as error:
        code = _say(printable(str(error)), error.exit_code)
    except KeyboardInterrupt:
        code = _say("stopped.", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except Exception as error:
        code = _usage(error)
    sys.exit(code if isinstance(code, int) else DONE)


def _usage(error: Exception) -> int:
    """Print a wrong command line the way the command-line library words it; let everything else be a traceback."""
    import click

    if isinstance(error, click.exceptions.Abort):
        return _say("stopped.", INTERRUPTED)
    if isinstance(error, click.ClickException):
        error.show()
        return WRONG_INPUT
    raise error


def _say(sentence: str, code: int) -> int:
    print(f"hasten: {sentence}", file=sys.stderr)
    return code


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
