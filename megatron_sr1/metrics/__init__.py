"""Typed metrics, the sinks that keep them, and trackers on other machines.

Names are paths: `reward/total`, `seconds/rollout`. The report draws one chart per group of names.
"""

from megatron_sr1.metrics.files import JsonlSink, TensorBoardSink, read_jsonl
from megatron_sr1.metrics.progress import PROGRESS_METRICS, ProgressSink
from megatron_sr1.metrics.spikes import SpikeSink
from megatron_sr1.metrics.tracking import Trackers, send_evaluations
from megatron_sr1.metrics.values import Metric, MetricLog, Reduction, reduce_over
from megatron_sr1.metrics.writer import MetricsSink, MetricsWriter

__all__ = [
    "PROGRESS_METRICS",
    "JsonlSink",
    "Metric",
    "MetricLog",
    "MetricsSink",
    "MetricsWriter",
    "ProgressSink",
    "Reduction",
    "SpikeSink",
    "TensorBoardSink",
    "Trackers",
    "read_jsonl",
    "reduce_over",
    "send_evaluations",
]
