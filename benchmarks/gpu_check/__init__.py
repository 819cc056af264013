"""Everything that only a machine with a card can show, in one command: `python -m benchmarks.gpu_check`."""
