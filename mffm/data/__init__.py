"""Data: source files → store → plan → batches."""
