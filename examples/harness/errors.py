"""What a user can mend, told in plain words instead of a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend; the message says what and how."""


def plain_errors(main: Callable[[], object]) -> int:
    """Run `main` and return the exit status: 1, with one message, after an error that the user can mend."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full disk, a read-only folder
        message = f"{error.filename or 'writing'}: {error.strerror or error}. Free or choose another place"
        message += "; a run that has begun goes on with --resume and its folder."
    except KeyboardInterrupt:
        message = "interrupted; what was complete is kept"
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 1
