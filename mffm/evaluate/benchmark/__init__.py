"""Runs the tasks of benchmark suites with any ASE calculator: in parallel, resumable, structure by structure."""
