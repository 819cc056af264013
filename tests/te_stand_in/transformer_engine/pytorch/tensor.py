"""transformer_engine/pytorch/tensor: the base class of FP8 tensors."""

import torch


class QuantizedTensor(torch.Tensor):
    pass
