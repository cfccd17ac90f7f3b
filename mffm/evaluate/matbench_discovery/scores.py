"""The combined performance score of the leaderboard (``site/src/lib/combined-scores.svelte.ts`` at 2c7f9fc)."""

import math

WEIGHTS = {"F1": 0.5, "κ_SRME": 0.4, "RMSD": 0.1}
RMSD_OF_NOTHING = 0.15  # an RMSD that earns no point


def combined(f1: float | None, kappa_srme: float | None, rmsd: float | None) -> float | None:
    """Return CPS = 0.5 F1 + 0.4 (1 − κ_SRME/2) + 0.1 clip(1 − RMSD/0.15, 0, 1); None where a part is missing.

    Args:
        f1: of unique prototypes, 0 to 1.
        kappa_srme: 0 to 2.
        rmsd: normalised by (V/N)^(1/3), no unit.
    """
    if f1 is None or kappa_srme is None or rmsd is None:
        return None
    if not all(map(math.isfinite, (f1, kappa_srme, rmsd))) or not (0 <= f1 <= 1 and 0 <= kappa_srme <= 2 and rmsd >= 0):
        return None
    closeness = max(0.0, 1 - rmsd / RMSD_OF_NOTHING)
    return WEIGHTS["F1"] * f1 + WEIGHTS["κ_SRME"] * (1 - kappa_srme / 2) + WEIGHTS["RMSD"] * closeness
