"""Evaluation: records of what was answered, their numbers with confidence intervals, and the judge."""

from megatron_sr1.evaluation.control_table import print_controls
from megatron_sr1.evaluation.identity import (
    Identity,
    check_identity,
    check_same_data,
    digest_of,
    file_digests,
    keep_identity,
    model_digest,
)
from megatron_sr1.evaluation.records import (
    Record,
    Response,
    Sample,
    Verdict,
    drop_unfinished,
    read_records,
    record_of,
    replace_lines,
    replace_records,
)
from megatron_sr1.evaluation.source_table import print_sources
from megatron_sr1.evaluation.statistics import Share, ks_of, pass_at_k, share_of, wilson
from megatron_sr1.evaluation.summary import summarise_records
from megatron_sr1.evaluation.verdicts import Judging, judge_records

__all__ = [
    "Identity",
    "Judging",
    "Record",
    "Response",
    "Sample",
    "Share",
    "Verdict",
    "check_identity",
    "check_same_data",
    "digest_of",
    "drop_unfinished",
    "file_digests",
    "judge_records",
    "keep_identity",
    "ks_of",
    "model_digest",
    "pass_at_k",
    "print_controls",
    "print_sources",
    "read_records",
    "record_of",
    "replace_lines",
    "replace_records",
    "share_of",
    "summarise_records",
    "wilson",
]
