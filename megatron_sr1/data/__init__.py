"""Files of data in, prompts and demonstrations out: build, write, index, read, shuffle, mix, resume."""

from megatron_sr1.data.entries import expand_shards
from megatron_sr1.data.feed import Batch, Check, Deal, SampleFeed
from megatron_sr1.data.index import IndexedSample
from megatron_sr1.data.kinds import only_demonstrations, only_prompts
from megatron_sr1.data.opening import DataList, check_data, files_of, open_dataset, open_stream, prepare_data
from megatron_sr1.data.patterns import MissingFiles
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
    "DataList",
    "Deal",
    "IndexedSample",
    "LeftOut",
    "MissingFiles",
    "Quarantine",
    "SampleFeed",
    "SampleSize",
    "SampleStream",
    "ShardDataset",
    "StepPrompts",
    "StreamState",
    "VisualTokens",
    "check_data",
    "expand_shards",
    "files_of",
    "only_demonstrations",
    "only_prompts",
    "open_dataset",
    "open_stream",
    "prepare_data",
    "write_shards",
]
