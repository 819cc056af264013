"""What the package needs of the libraries for GPUs, asked of those libraries where there is no GPU: `make contracts`.

The environment is `.venv-contracts`, made from constraints-gpu.txt. The files are named check_*.py, which the other
tests' run does not collect. What the package uses is read from its syntax trees, so that a new use is a new question.
"""
