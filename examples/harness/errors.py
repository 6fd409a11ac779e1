"""Errors that the user can cure: a plain message and an exit code instead of a traceback."""

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

INTERRUPTED = "interrupted; what was complete is kept"


class UserError(Exception):
    """Something that the user can cure; the message says what and how."""

    exit_code = 1


class UsageError(UserError):
    """A command line or a configuration that cannot be run."""

    exit_code = 2


class RunInterruptedError(UserError):
    """The user stopped the run; what was complete is kept."""

    exit_code = 130


def require(ok: bool, name: str, allowed: str, value: object, cure: str = "") -> None:
    """Raise UsageError with the flag of the field `name`, what it allows, its value and a cure unless `ok`."""
    if not ok:
        raise UsageError(f"--{name.replace('_', '-')} must be {allowed}, got {value}" + (cure and f"; {cure}"))


def plain_errors(main: Callable[[], object]) -> int:
    """Run `main` and return the exit code: 0, 1 for a failed run, 2 for wrong use, 130 for an interrupt."""
    with contextlib.redirect_stderr(_Lossy(sys.stderr)):
        try:
            try:
                main()
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            _discard(sys.stdout)
            return 1
        except KeyboardInterrupt:
            print(INTERRUPTED, file=sys.stderr)
            return RunInterruptedError.exit_code
        except Exception as error:
            if (text := _message(error)) is None:
                raise
            print(text if isinstance(error, RunInterruptedError) else f"error: {text}", file=sys.stderr)
            _Lossy(sys.stdout).flush()
            return error.exit_code if isinstance(error, UserError) else UserError.exit_code
    return 0


@contextlib.contextmanager
def program_name(name: str) -> Iterator[str]:
    """A program's name for tyro, which cuts names at their first space: with no-break spaces, printed as spaces."""
    out: Any = _PlainSpaces(sys.stdout)
    err: Any = _PlainSpaces(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield name.replace(" ", "\xa0")


class _Stream:
    """Another stream, with some methods changed."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _PlainSpaces(_Stream):
    """A stream that writes no-break spaces as spaces."""

    def write(self, text: str) -> int:
        return self._stream.write(text.replace("\xa0", " "))


class _Lossy(_Stream):
    """A stream that discards what it cannot write: progress that nobody can see ends no run."""

    def write(self, text: str) -> int:
        self._or_discard(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._or_discard(self._stream.flush)

    def _or_discard(self, do: Callable[[], object]) -> None:
        try:
            do()
        except OSError:
            _discard(self._stream)


def _discard(stream: Any) -> None:
    """Let what is still written to a stream go nowhere."""
    with contextlib.suppress(io.UnsupportedOperation):  # a stream in memory
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _message(error: Exception) -> str | None:
    """What the user can do about an error; None if it is a defect of ours."""
    import jax  # takes a moment, and is not needed by those who import this module for its checks

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}; {'free space there' if is_full(error) else 'choose another path'}"
    if isinstance(error, MemoryError | OverflowError) or "RESOURCE_EXHAUSTED" in str(error):
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else "out of memory"
        return f"{reason}; choose a smaller batch, model, data set or window"
    try:
        jax.devices()
    except Exception as reason:  # an AssertionError, too
        variables = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("JAX_"))
        return f"JAX has no device ({reason or type(reason).__name__}); change the environment, which has {variables}"
    return None


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of space."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare_process() -> None:
    """Make this process a command: what happens outside of `plain_errors` ends in a plain message, too."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, and the next file that is opened would take its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r+"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ["MPLBACKEND"] = "agg"  # pictures are files
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.excepthook = _excepthook


def _interrupt(*_: object) -> None:
    """End at once: Python may swallow KeyboardInterrupt, and crashes if it ends by it while XLA computes."""
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(RunInterruptedError.exit_code)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say of an import that failed what is missing; show the traceback of other errors."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    if isinstance(error, ModuleNotFoundError):
        print(f"error: {error}; pip install -e '.[examples]', or '.[bench]' for benchmarks", file=sys.stderr)
    elif "jax._src.config" in frames:  # of a variable that JAX reads when it is imported
        print(f"error: {error}; change or unset that variable of the environment", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
