"""transformer_engine/pytorch: the modules, as far as their parameters go."""

from typing import Any

import torch

from transformer_engine.pytorch import distributed, fp8, ops, tensor  # noqa: F401
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init  # noqa: F401


class _Base(torch.nn.Module):
    """Every module has an extra state, empty as long as nothing was computed in FP8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}


class Linear(_Base):
    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.parallel_mode, ranks = options["parallel_mode"], options["tp_size"]
        rows = out_features // ranks if self.parallel_mode == "column" else out_features
        columns = in_features // ranks if self.parallel_mode == "row" else in_features
        dtype = options["params_dtype"]
        self.use_bias = options["bias"]
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype))
        if self.use_bias:
            self.bias = torch.nn.Parameter(torch.empty(rows, dtype=dtype))


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float, normalization: str, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm"  # a LayerNorm would have a bias too
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=options["params_dtype"]))


class GroupedLinear(_Base):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.num_gemms, self.parallel_mode, ranks = num_gemms, options["parallel_mode"], options["tp_size"]
        assert ranks == 1 and not options["bias"]
        self.use_bias = False
        self.init_fp8_metadata()
        for number in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=options["params_dtype"])
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight))


class RMSNorm(_Base):
    def __init__(self, normalized_shape: int = 0, *, hidden_size: int = 0, eps: float, **options: Any) -> None:
        super().__init__()
        self.eps = eps
        size = normalized_shape or hidden_size  # the newer and the older name
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=options["params_dtype"]))


class LayerNorm(RMSNorm):
    pass


class DotProductAttention(_Base):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options


class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms: int) -> None:
        super().__init__()


class Fp8Unpadding(Fp8Padding):
    pass
