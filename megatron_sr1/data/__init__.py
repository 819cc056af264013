"""WebDataset shards in, prompts and demonstrations out: write, index, read, shuffle, mix, resume."""

from megatron_sr1.data.feed import Batch, Check, SampleFeed, part_of
from megatron_sr1.data.kinds import only_demonstrations, only_prompts
from megatron_sr1.data.opening import open_dataset, open_stream
from megatron_sr1.data.patterns import expand_shards
from megatron_sr1.data.quarantine import BadSample, LeftOut, Quarantine
from megatron_sr1.data.shards import ShardDataset
from megatron_sr1.data.state import StreamState
from megatron_sr1.data.step_prompts import StepPrompts
from megatron_sr1.data.stream import SampleSize, SampleStream, VisualTokens
from megatron_sr1.data.writer import write_shards

__all__ = [
    "BadSample",
    "Batch",
    "Check",
    "LeftOut",
    "Quarantine",
    "SampleFeed",
    "SampleSize",
    "SampleStream",
    "ShardDataset",
    "StepPrompts",
    "StreamState",
    "VisualTokens",
    "expand_shards",
    "only_demonstrations",
    "only_prompts",
    "open_dataset",
    "open_stream",
    "part_of",
    "write_shards",
]
