"""The report of one run, of several side by side, of a sweep, or of what two objectives credit: terminal tables and one
self-contained page."""

from megatron_sr1.report.credit.numbers import CreditReport
from megatron_sr1.report.credit.page import write_credit
from megatron_sr1.report.credit.tables import print_credit
from megatron_sr1.report.page import write_report
from megatron_sr1.report.runs import ReportedRun, find_runs
from megatron_sr1.report.summary_table import SummaryRow, print_table, summary_rows
from megatron_sr1.report.sweep.groups import GroupRow, RunGroup
from megatron_sr1.report.sweep.page import write_sweep_report
from megatron_sr1.report.sweep.tables import print_tables
from megatron_sr1.report.viewer.evaluations import evaluation_sets, no_blocks
from megatron_sr1.report.viewer.server import LOOPBACK, check_address, report_server
from megatron_sr1.report.viewer.shown import RunToShow, SetToShow
from megatron_sr1.report.viewer.steps import chosen_steps

__all__ = [
    "LOOPBACK",
    "CreditReport",
    "GroupRow",
    "ReportedRun",
    "RunGroup",
    "RunToShow",
    "SetToShow",
    "SummaryRow",
    "check_address",
    "chosen_steps",
    "evaluation_sets",
    "find_runs",
    "no_blocks",
    "print_credit",
    "print_table",
    "print_tables",
    "report_server",
    "summary_rows",
    "write_credit",
    "write_report",
    "write_sweep_report",
]
