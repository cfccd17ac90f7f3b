"""The one error that a user is meant to see: a value, the place and the remedy, without a traceback (exit code 2)."""


class InputError(ValueError):
    """Bad input from outside: a file, a recipe, a label. The message gives the value, the place and the remedy.

    The command line prints it and exits with code 2; library callers catch it as a ``ValueError``.
    """


def known(names: object) -> str:
    """Return the names of a collection for an error message, sorted and comma-separated, or "none"."""
    return ", ".join(sorted(str(n) for n in names)) or "none"  # type: ignore[attr-defined]
