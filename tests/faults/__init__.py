"""Faults that are tried on real runs: `python -m tests.faults --trials 30 --seed 1`."""
