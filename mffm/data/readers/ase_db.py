"""ASE databases: SQLite ``.db``, ``.json`` and, with the ase-db-backends package, LMDB ``.aselmdb`` (OMat24, OMol25).

A label key is looked for in the row's own properties (energy, forces, stress, …), its key-value pairs and its ``data``.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mffm.data.readers import plain
from mffm.data.readers.chunk import Chunk
from mffm.data.readers.convert import Wanted
from mffm.data.readers.plain import Plain
from mffm.errors import InputError

parse = plain.parse


def _connect(path: Path) -> Any:
    from ase.db import connect

    if path.suffix == ".aselmdb":
        try:
            import ase_db_backends  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{path}: .aselmdb needs the ase-db-backends package; pip install 'mffm[fairchem]'"
            ) from error
        _refuse_damaged(path)
        return connect(str(path), type="aselmdb", readonly=True, use_lock_file=False)
    return connect(str(path))


# What another process runs to copy every value once, as the reading will do. Keys rise; where damaged pages point back,
# the walk would not end.
_WALK = """
import lmdb, sys
last = b""
for key, value in lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False).begin().cursor():
    if key <= last:
        sys.exit("keys out of order")
    last = key
"""


def _refuse_damaged(path: Path) -> None:
    """Refuse a file that LMDB cannot walk through. It trusts what it maps: a file that was cut, or has a byte too many,
    ends the process that reads it (SIGBUS, SIGSEGV), so another one looks first; the file is in memory after that.

    Raises:
        InputError: the file is damaged.
    """
    done = subprocess.run([sys.executable, "-c", _WALK, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        ended = signal.Signals(-done.returncode).name if done.returncode < 0 else "an error"
        fault = next(reversed(done.stderr.strip().splitlines()), ended)
        raise InputError(f"{path}: damaged or cut short: LMDB cannot read it ({fault}); fetch it again")


def _plain(row: Any) -> Plain:
    info: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for mapping in (row.data or {}, row.key_value_pairs or {}):
        values.update(mapping)
    for name in ("energy", "forces", "stress", "free_energy", "charge", "charges", "magmom", "magmoms", "dipole"):
        value = row.get(name) if name in row else None  # row.charge is 0.0 where the row has none
        if value is not None:
            values[name] = value
    n = len(row.numbers)
    for name, value in values.items():
        if isinstance(value, list | tuple | np.ndarray) and np.shape(value) == (n, 3) and n != 3:
            arrays[name] = np.asarray(value)
        else:
            info[name] = value
    info.setdefault("id", row.id)
    info.setdefault("unique_id", row.get("unique_id"))
    return Plain(row.numbers, row.positions, np.asarray(row.cell), row.pbc, info, arrays)


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield rows some at a time in the order of their ids, passing over the first ``start``."""
    del want, first
    try:
        rows = _connect(path).select(sort="id") if path.suffix == ".db" else _connect(path).select()
        yield from plain.chunked(path, (_plain(row) for row in rows), start)
    except InputError:
        raise
    except Exception as error:  # backends raise anything
        raise InputError(
            f"{path}: not readable as an ASE database ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
