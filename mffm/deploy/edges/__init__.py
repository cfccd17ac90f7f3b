"""A potential in edge form: edges in, energies and their derivatives by edges out.

    (rij, z, edge_index, mask) → energy, energies, dE/drij

The list of edges is the caller's: whole systems with their periodic images, or a domain with ghost atoms, whose
energies ``mask`` leaves out. Forces are F_i = Σ_(i←j) dE/drij - Σ_(j←i) dE/drij, the virial dE/dstrain is
Σ rij ⊗ dE/drij. ``model`` is the form with its checks, the same for a release as it is, exported and compiled; ``form``
is what is exported, ``export`` writes and loads files, ``assembled`` turns its values into those of structures.
"""

from mffm.deploy.edges.assembled import evaluate, predictor
from mffm.deploy.edges.export import compile_export, export, load
from mffm.deploy.edges.form import EdgeValues
from mffm.deploy.edges.model import Description, EdgeModel, of_release

__all__ = [
    "Description",
    "EdgeModel",
    "EdgeValues",
    "compile_export",
    "evaluate",
    "export",
    "load",
    "of_release",
    "predictor",
]
