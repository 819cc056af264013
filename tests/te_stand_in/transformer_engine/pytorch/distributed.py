"""transformer_engine/pytorch/distributed.py: names that Megatron-Core imports; nothing here is called without a GPU."""


class CudaRNGStatesTracker:
    pass


def activation_recompute_forward() -> None: ...


def checkpoint() -> None: ...
