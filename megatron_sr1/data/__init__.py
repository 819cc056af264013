"""WebDataset shards in, prompts and demonstrations out: write, index, read, shuffle, resume."""

from megatron_sr1.data.shards import ShardDataset, expand_shards
from megatron_sr1.data.stream import SampleStream
from megatron_sr1.data.writer import write_shards

__all__ = ["SampleStream", "ShardDataset", "expand_shards", "write_shards"]
