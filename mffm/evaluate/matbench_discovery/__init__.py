"""Matbench Discovery (Riebesell et al., Nat. Mach. Intell. 7, 836 (2025)): metrics, protocols, submissions.

Formulas and rules are those of github.com/janosh/matbench-discovery at commit 2c7f9fc (2026-07-16).
"""
