"""The one error that a user is meant to see: a value, the place and the remedy, without a traceback (exit code 2)."""

import errno
import sys
from pathlib import Path

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, to be resumed


class InputError(ValueError):
    """Bad input from outside: a file, a recipe, a label. The message gives the value, the place and the remedy.

    The command line prints it and exits with code 2; library callers catch it as a ``ValueError``.
    """


def known(names: object) -> str:
    """Return the names of a collection for an error message, sorted and comma-separated, or "none"."""
    return ", ".join(sorted(str(n) for n in names)) or "none"  # type: ignore[attr-defined]


def told(error: BaseException) -> str | None:
    """Return an error as one message for the user: bad input, and what the system refused. None: a fault of mffm."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        place = next((f"{a}: " for a in sys.argv[1:] if Path(a).is_file()), "")
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        return f"{place}not UTF-8 text ({byte}); save the file as UTF-8"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "; what was written before is intact: make room, then give the command again or resume" if full else ""
        return f"{place}{error.strerror}{remedy}"
    return None
