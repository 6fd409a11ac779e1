"""Errors that the user can cure: a plain message and an exit code instead of a traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can cure; the message says what and how."""

    exit_code = 1


class UsageError(UserError):
    """A command line or a configuration that cannot be run."""

    exit_code = 2


class RunInterruptedError(UserError):
    """The user stopped the run; what was complete is kept."""

    exit_code = 130


def require(ok: bool, name: str, allowed: str, value: object) -> None:
    """Raise UsageError with the flag of the field `name`, what it allows and its value unless `ok`."""
    if not ok:
        raise UsageError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")


def plain_errors(main: Callable[[], object]) -> int:
    """Run `main` and return the exit code: 0, 1 for a failed run, 2 for wrong use, 130 for an interrupt."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(error if isinstance(error, RunInterruptedError) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was complete is kept", file=sys.stderr)
        return RunInterruptedError.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as `head` does; the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a read-only folder
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}. Free space or choose another place.", file=sys.stderr)
        return UserError.exit_code
    return 0
