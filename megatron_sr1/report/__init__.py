"""The report of one run, or of several runs side by side: a terminal table and one self-contained HTML file."""

from megatron_sr1.report.page import write_report
from megatron_sr1.report.runs import find_runs
from megatron_sr1.report.table import Row, print_table, summary_rows

__all__ = ["Row", "find_runs", "print_table", "summary_rows", "write_report"]
