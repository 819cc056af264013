"""The child process that asks math-verify. Run as a script by `symbolic.py`; one JSON line in, one out.

In:  ["<answer as LaTeX>", "<gold as LaTeX>"]     Out: true | false     The first line out is "ready".
It has no time limit of its own: the parent kills it.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

MEMORY_LIMIT = 2 * 1024**3  # bytes: a tower of powers fails here instead of taking the machine down

# Units are compared before; math-verify would drop them, and would read the algebra in "5m" as 5 metres.
LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
)


def same_expression(answer: str, gold: str) -> bool:
    """True where math-verify finds the answer equal to the gold. Text it cannot read equals nothing."""
    no_limit: Any = None  # the parent keeps one; the library's own annotation wants a number
    first, second = (parse(f"${side}$", [LATEX], "no_fallback", parsing_timeout=no_limit) for side in (gold, answer))
    return bool(first) and bool(second) and verify(first, second, timeout_seconds=None)


def main() -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns about the missing time limit, which the parent keeps
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a request to stop the run must not cost an answer its verdict
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        print(json.dumps(bool(same_expression(answer, gold))), flush=True)


if __name__ == "__main__":
    main()
