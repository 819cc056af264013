"""Draws one chart of the report as a PNG file.

    python tools/draw_chart.py runs/quickstart/grpo --chart Accuracy --out docs/quickstart.png

Several runs are drawn into one chart, each with a line style of its own.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.report.plots import CHARTS, draw_chart
from megatron_sr1.report.runs import read_run


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    charts = {chart.title: chart for chart in CHARTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--chart", choices=sorted(charts), default="Accuracy")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    runs = [read_run(path) for path in args.runs]
    address = draw_chart(
        [[run] for run in runs], [run.preset or run.name for run in runs], charts[args.chart], args.theme
    )
    if address is None:
        parser.error(f"none of the runs has a metric of the chart {args.chart!r}.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(base64.b64decode(address.split(",", 1)[1]))
    print(args.out)


if __name__ == "__main__":
    main()
