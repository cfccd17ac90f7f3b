"""The data doctor: what is wrong with a store, a data YAML or files, found before a training is misled by it.

    inputs ──one pass──▶ columns (a few numbers a frame) ──▶ duplicates, outliers, units, levels, coverage, against
                 └─ scratch file ◀── frames that a check asks for by their row

The checks of ingest (``mffm.data.checks``) are the same functions here. Each other check is a function from frames and
columns to findings.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ase.data import chemical_symbols

from mffm.data.checks import Finding
from mffm.data.doctor.against import check_against
from mffm.data.doctor.coverage import check_coverage, coverage
from mffm.data.doctor.duplicates import check_duplicates
from mffm.data.doctor.inputs import Frames, open_inputs
from mffm.data.doctor.levels import check_levels
from mffm.data.doctor.outliers import check_outliers
from mffm.data.doctor.report import ORDER, Diagnosis, write
from mffm.data.doctor.scan import Columns, scan
from mffm.data.doctor.units import check_units
from mffm.errors import InputError
from mffm.keys import Property


def examine(
    paths: Sequence[Path],
    against: Sequence[Path] = (),
    keys: Mapping[Property, str] | None = None,
    folder: Path | None = None,
    with_plots: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> Diagnosis:
    """Examine stores (folders), data YAMLs and files of structures together.

    Args:
        against: benchmark sets, each a store, data YAML or file, that no structure may be shared with.
        keys: property → key of plain files, where the guess is not to be trusted.
        folder: for doctor.md, doctor.json and plots; None writes nothing.
        workers: processes that read; what is found does not depend on it.

    Raises:
        InputError: an input that cannot be read, or no frame in any of them.
    """
    with open_inputs(paths, keys) as frames:
        try:
            columns = scan(frames, workers, progress)
        except BrokenProcessPool as error:
            raise InputError(
                f"a worker process ended unexpectedly (out of memory?); run again with fewer than {workers} workers"
            ) from error
        if not columns.n:
            reasons = [
                reason for part in frames.parts for found in part.rejected.examples.values() for _, reason in found
            ]
            first = f"; the first is left out for: {reasons[0]}" if reasons else ""
            raise InputError(f"{', '.join(map(str, paths))}: no frame that can be examined{first}")
        diagnosis = _diagnose(frames, columns, paths, against, workers, progress)
        if folder is not None:
            write(diagnosis, columns, folder, with_plots)
        return diagnosis


def _diagnose(
    frames: Frames, columns: Columns, paths: Sequence[Path], against: Sequence[Path], workers: int, progress: bool
) -> Diagnosis:  # fmt: skip
    counted = coverage(columns)
    findings: list[Finding] = check_coverage(frames, columns, counted)
    for check in (check_duplicates, check_outliers, check_units, check_levels):
        findings += check(frames, columns)
    for path in against:
        findings += check_against(frames, columns, path, workers, progress)
    return Diagnosis(
        [str(p) for p in paths],
        [str(p) for p in against],
        columns.n,
        sum(sum(part.rejected.counts.values()) for part in frames.parts),
        columns.fidelities,
        counted,
        [chemical_symbols[z] for z in sorted(set(columns.element.tolist()))],
        sorted(findings, key=lambda f: ORDER.index(f.severity)),
    )


__all__ = ["Diagnosis", "Finding", "examine"]
