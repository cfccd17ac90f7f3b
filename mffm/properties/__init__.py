"""Properties of structures by any ASE calculator: thin drivers over ASE, phonopy, pymatgen and torch-sim."""
