"""Before the first step: does the machine, and does this configuration, lead anywhere? A row for each answer."""

from megatron_sr1.preflight.earning import earning_rows
from megatron_sr1.preflight.facts import RankFacts, is_first_here, measure_rank
from megatron_sr1.preflight.gold import gold_groups, gold_rows, known_rewards, unearned
from megatron_sr1.preflight.kept import has_passed, keep_rows
from megatron_sr1.preflight.logprobs import LOGPROBS, logprob_row
from megatron_sr1.preflight.machine import disk_rows, fact_rows, write_speed
from megatron_sr1.preflight.memory import memory_rows
from megatron_sr1.preflight.rows import Row, check_rows, failed, not_checked, table_of, to_json
from megatron_sr1.preflight.samples import canary_row, demonstrations_row, pixels_row, samples_row

__all__ = [
    "LOGPROBS",
    "RankFacts",
    "Row",
    "canary_row",
    "check_rows",
    "demonstrations_row",
    "disk_rows",
    "earning_rows",
    "fact_rows",
    "failed",
    "gold_groups",
    "gold_rows",
    "has_passed",
    "is_first_here",
    "keep_rows",
    "known_rewards",
    "logprob_row",
    "measure_rank",
    "memory_rows",
    "not_checked",
    "pixels_row",
    "samples_row",
    "table_of",
    "to_json",
    "unearned",
    "write_speed",
]
