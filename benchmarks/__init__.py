"""Runnable comparisons. `python -m benchmarks.run` runs all; results are dated JSON in benchmarks/results/."""
