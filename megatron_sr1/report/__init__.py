"""The report of one run, of several side by side, of a sweep, or of what two objectives credit: terminal tables and one
self-contained page."""

from megatron_sr1.report.credit.numbers import CreditReport
from megatron_sr1.report.credit.page import write_credit
from megatron_sr1.report.credit.tables import print_credit
from megatron_sr1.report.page import write_report
from megatron_sr1.report.runs import find_runs
from megatron_sr1.report.summary_table import SummaryRow, print_table, summary_rows
from megatron_sr1.report.sweep.groups import GroupRow, RunGroup
from megatron_sr1.report.sweep.page import write_sweep_report
from megatron_sr1.report.sweep.tables import print_tables

__all__ = [
    "CreditReport",
    "GroupRow",
    "RunGroup",
    "SummaryRow",
    "find_runs",
    "print_credit",
    "print_table",
    "print_tables",
    "summary_rows",
    "write_credit",
    "write_report",
    "write_sweep_report",
]
