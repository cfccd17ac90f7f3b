"""LAMBench (Peng et al., arXiv:2504.19578): metrics, tasks and aggregates.

Formulas and rules are those of github.com/deepmodeling/LAMBench at commit c20f07d (2026-04-07).
"""
