"""Measurements: ``python -m benchmarks.<name>`` prints a table, then one JSON line."""

import lowmem_reft  # noqa: F401 - before PEFT and bitsandbytes, whose notices it hides
