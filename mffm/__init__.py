"""mffm: distributed, multi-fidelity training of machine-learning interatomic potentials.

Importing the package imports neither torch nor any reader; ``mffm.deploy.ase.Calculator`` is the way in for users of
a release.
"""

__version__ = "0.1.0"
