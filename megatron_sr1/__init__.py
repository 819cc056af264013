"""Self-rewarding reinforcement learning of vision-language models on Megatron-Core."""

__version__ = "0.1.0"
