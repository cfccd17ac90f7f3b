"""Predict the frames of extxyz files with a peer's model; runs in that peer's environment.

    python evaluate.py PEER MODEL FRAMES.xyz@INDEX PREDICTIONS.npz [FRAMES.xyz@INDEX PREDICTIONS.npz ...]

PEER: mace, sevennet, sevennet=FIDELITY of a model of several, nequip or mffm=FIDELITY (then MODEL is <run>=<weights>);
INDEX is ASE's, such as ``::3``.
A file holds energies [n_frames], forces [n_atoms of all, 3] and, for periodic frames, stress [n_frames, 3, 3], in
ASE's units and signs.
"""

import sys
from typing import Any

import ase.io
import numpy as np
from clock import prepare


def calculator(peer: str, model: str) -> Any:
    """Return the peer's own ASE calculator in float32."""
    if peer == "mace":
        from mace.calculators import MACECalculator

        return MACECalculator(model_paths=model, device="cpu", default_dtype="float32")
    if peer.startswith("sevennet"):
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator(model, device="cpu", modal=peer.partition("=")[2] or None)
    if peer == "nequip":
        from nequip.integrations.ase import NequIPCalculator

        return NequIPCalculator._from_saved_model(model)
    from mffm.deploy.ase import Calculator

    run, weights = model.split("=")
    return Calculator(run, peer.removeprefix("mffm="), weights=weights)


def main() -> None:
    prepare()
    peer, model, *files = sys.argv[1:]
    predict = calculator(peer, model)
    for frames, output in zip(files[::2], files[1::2], strict=True):
        energies, forces, stress = [], [], []
        for atoms in ase.io.iread(frames):
            atoms.calc = predict
            energies.append(float(atoms.get_potential_energy()))
            forces.append(atoms.get_forces())
            if atoms.pbc.all():
                stress.append(atoms.get_stress(voigt=False))
        np.savez(output, energy=np.array(energies), forces=np.concatenate(forces), stress=np.array(stress))


if __name__ == "__main__":
    main()
