"""The command line of an experiment: presets, flags, and errors that say what to do."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .files import DataError
from .run_folder import RunFolderError


class Stop(Exception):
    """The run ended early; the message says why and how to go on."""


def plain_errors(main: Callable[[], Any]) -> int:
    """Run `main`; what a user can mend is told in plain words. Returns the exit status."""
    try:
        main()
    except (ValueError, DataError, RunFolderError, Stop) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; nothing that was written before is lost", file=sys.stderr)
    else:
        return 0
    return 1


def chosen(flag: str, argv: Sequence[str]) -> str | None:
    """The value of one flag, looked up before the others are parsed because their defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag)
    try:
        return vars(parser.parse_known_args(list(argv))[0]).popitem()[1]
    except argparse.ArgumentError:
        return None
