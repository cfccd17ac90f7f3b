"""Step-0 parity: before its first step a fine-tuning predicts what its release does, or does not begin.

Old fidelities must give the release's reference outputs. A new fidelity must be no worse on its training labels than
its parent with refitted references. Where that fails, the parts that differ from the release are named.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from mffm.data.pools import choose
from mffm.errors import InputError
from mffm.keys import ENERGY, REPORT_UNITS
from mffm.models.adapter import merged
from mffm.release import Loaded, inspection, outputs, refit_references
from mffm.training import finetune

if TYPE_CHECKING:
    from mffm.training.setup import Setup

MOST_ROWS = 2000  # training labels of a new fidelity that are compared
ROUNDING = 1e-3  # relative, of mean absolute errors in float32
SAMPLED = 0.1  # relative, where references were fitted to more labels than are compared
SMALLEST = {"energy": 1e-6, "forces": 1e-6, "stress": 1e-8}  # eV/atom, eV/Å, eV/Å³


def require(setup: "Setup", base: Loaded) -> None:
    """Refuse a start that does not predict what its release does.

    Args:
        base: the release, as ``finetune.Start`` has it.

    Raises:
        InputError: what is off and by how much, and which parts differ from the release.
    """
    own = replace(base, spec=setup.spec, potential=setup.potential.eval().requires_grad_(False))
    problem = _old(own, base) or _new(setup, own, base)
    setup.potential.train().requires_grad_(True)
    if problem:
        parts = differing_parts(own, base, setup.recipe.model.init_from)
        shown = "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")
        raise InputError(
            f"step 0 is not what {base.path} predicts: {problem}. Differing parts: {shown or 'none of the weights'}"
        )


def _old(own: Loaded, base: Loaded) -> str:
    """Return how the release's fidelities differ from its reference outputs; nothing where they do not."""
    stored = inspection.stored_outputs(base) or outputs.compute(base.potential, base.spec)
    before = next(own.potential.parameters()).dtype
    found = outputs.compare(stored, outputs.predictor(own.potential.double(), own.spec))
    own.potential.to(before)
    beyond = [d for d in found if not d.is_within]
    worst = max(beyond, key=lambda d: np.nan_to_num(d.value / d.tolerance, nan=np.inf), default=None)
    return "" if worst is None else f"reference outputs, {worst}"


def _new(setup: "Setup", own: Loaded, base: Loaded) -> str:
    """Return how a new fidelity is worse than its parent with refitted references; nothing where none is."""
    recipe, store = setup.recipe, setup.store
    for name, parent in recipe.model.init_from.items():
        every = finetune.rows_of(setup.plan.pools, name)
        rows = choose(store, every, 0, MOST_ROWS)
        labelled = rows[store.has(name, ENERGY)[rows]]
        refitted = refit_references(base, store, labelled, name, parent) if len(labelled) else None
        wanted = finetune.errors(base, store, rows, name, parent, refitted)
        again = refit_references(own, store, labelled, name, name) if len(labelled) else None
        found = finetune.errors(own, store, rows, name, name, again)
        for prop, error in wanted.items():
            if not found[prop] <= (1 + ROUNDING) * error + SMALLEST[prop]:
                return f"{name!r} is worse than {parent!r} with refitted references, {_told(prop, found[prop], error)}"
        if refitted is None or not recipe.references.refit or name in recipe.references.given:
            continue  # references that the recipe chose
        table = own.spec.references.array([name])[0]
        actual, error = finetune.errors(own, store, rows, name, name, table).get(ENERGY, np.nan), wanted[ENERGY]
        slack = ROUNDING if len(rows) == len(every) else SAMPLED
        if not actual <= (1 + slack) * error + SMALLEST[ENERGY]:
            return (
                f"{name!r} with its element references is worse than {parent!r} with refitted ones, "
                f"{_told(ENERGY, actual, error)}: the references of {name!r} differ"
            )
    return ""


def _told(prop: str, found: float, wanted: float) -> str:
    unit, factor = REPORT_UNITS[prop]
    return f"{prop} MAE {found * factor:.4g} instead of {wanted * factor:.4g} {unit}"


def differing_parts(own: Loaded, base: Loaded, init_from: Mapping[str, str]) -> list[str]:
    """Return what of a potential is not as in the release that it starts from, in words.

    Args:
        init_from: new fidelity → the one of the release that it starts as.
    """
    parts = [
        f"{name} {mine:g} instead of {theirs:g}"
        for name, mine, theirs in (
            ("avg_neighbors", own.spec.avg_neighbors, base.spec.avg_neighbors),
            ("scale", own.spec.scale, base.spec.scale),
            ("cutoff", own.spec.model.backbone.cutoff, base.spec.model.backbone.cutoff),
        )
        if mine != theirs
    ]
    source = {name: init_from.get(name, name) for name in own.fidelities.names}
    parts += list(_references(own, base))
    state, theirs_state = merged(own.potential.state_dict()), base.potential.state_dict()
    per_fidelity = own.potential.per_fidelity()
    for name, tensor in state.items():
        parts += _of_tensor(name, tensor, theirs_state.get(name), name in per_fidelity, source, base.fidelities.names)
    return parts


def _references(own: Loaded, base: Loaded) -> Iterator[str]:
    for name in own.fidelities.names:
        if name not in base.fidelities:
            continue
        mine, theirs = (x.spec.references.array([name])[0] for x in (own, base))
        both = ~np.isnan(mine) & ~np.isnan(theirs)
        off = np.flatnonzero(both & (mine != theirs))
        if len(off):
            z = int(off[0])
            yield f"references of {name!r} ({chemical_symbols[z]} {mine[z]:.4f} instead of {theirs[z]:.4f} eV)"


def _of_tensor(
    name: str, mine: Tensor, theirs: Tensor | None, stacked: bool, source: Mapping[str, str], old: Sequence[str]
) -> Iterator[str]:
    part = "conditioning" if ".conditioning." in name else "head" if ".heads." in name else "backbone"
    if theirs is None or mine.shape[1:] != theirs.shape[1:] or (not stacked and mine.shape != theirs.shape):
        yield f"{part} tensor {name}, which the release has in another shape or not at all"
    elif stacked:
        for i, (fidelity, parent) in enumerate(source.items()):
            if parent in old and not torch.equal(mine[i], theirs[old.index(parent)].to(mine)):
                yield f"{part} row of {fidelity!r} ({name})"
    elif not torch.equal(mine, theirs.to(mine)):
        yield f"{part} tensor {name}"
