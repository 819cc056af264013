"""transformer_engine/pytorch/ops: names that Megatron-Core writes into annotations."""

import torch


class Sequential(torch.nn.Sequential):
    pass


class FusibleOperation(torch.nn.Module):
    pass
