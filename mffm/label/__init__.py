"""Labels from calculators: xTB, density functionals, coupled cluster, any ASE calculator, a release as a teacher.

structures ──▶ worker processes, one structure at a time ──▶ journals ──▶ a label layer of the store, or extxyz and YAML
"""
