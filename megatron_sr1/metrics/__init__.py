"""Typed metrics, the sinks that keep them, and trackers on other machines.

Names are paths: `reward/total`, `seconds/rollout`. The report draws one chart per group of names.
"""

from megatron_sr1.metrics.files import JsonlSink, TensorBoardSink, read_jsonl
from megatron_sr1.metrics.pace import Course, Pace
from megatron_sr1.metrics.progress import ProgressSink
from megatron_sr1.metrics.spikes import SpikeSink
from megatron_sr1.metrics.status import Status, StatusFile, StatusSink, read_status
from megatron_sr1.metrics.tracking import Trackers, send_evaluations
from megatron_sr1.metrics.values import Metric, MetricLog, Reduction, reduce_over
from megatron_sr1.metrics.writer import MetricsSink, MetricsWriter

__all__ = [
    "Course",
    "JsonlSink",
    "Metric",
    "MetricLog",
    "MetricsSink",
    "MetricsWriter",
    "Pace",
    "ProgressSink",
    "Reduction",
    "SpikeSink",
    "Status",
    "StatusFile",
    "StatusSink",
    "TensorBoardSink",
    "Trackers",
    "read_jsonl",
    "read_status",
    "reduce_over",
    "send_evaluations",
]
