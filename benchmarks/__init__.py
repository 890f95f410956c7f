"""Measurements: ``python -m benchmarks.<name>`` prints a table, then one JSON line."""
