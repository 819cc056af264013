"""Makes Megatron-Core, which asks for CUDA devices in many places, run on a machine that has none.

Every request for a CUDA (or integer) device becomes the CPU. This is the only place that does so; it is installed once,
before Megatron-Core is imported, and only where there is no accelerator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = """
    zeros ones empty full tensor arange linspace rand randn randint randperm eye as_tensor empty_strided
    zeros_like ones_like empty_like full_like rand_like randn_like
"""
_CPU = torch.device("cpu")
_CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.DoubleTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_installed = False


def _on_cpu(device: Any) -> Any:
    """The CPU where `device` names an accelerator (also by bare index), else `device` unchanged."""
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _wrap_factory(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*arguments: Any, **options: Any) -> torch.Tensor:
        if "device" in options:
            options["device"] = _on_cpu(options["device"])
        options.pop("pin_memory", None)
        return factory(*arguments, **options)

    return wrapped


def _wrap_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: Any, *arguments: Any, **options: Any) -> Any:
        if arguments and not isinstance(arguments[0], torch.Tensor):
            arguments = (_on_cpu(arguments[0]), *arguments[1:])
        if "device" in options:
            options["device"] = _on_cpu(options["device"])
        return original(self, *arguments, **options)

    return to


def _identity(self: Any, *_: Any, **__: Any) -> Any:
    return self


def install_cpu_shim() -> None:
    """Installs the shim. Calling it again does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    # imports torch's checkpoints, too, which a process that only starts ranks does not need
    from megatron_sr1.platform.torch_private import remember_factories

    remember_factories()  # the real ones, not the wrappers
    for name in _FACTORIES.split():
        setattr(torch, name, _wrap_factory(getattr(torch, name)))
    torch.Tensor.to = _wrap_to(torch.Tensor.to)
    torch.nn.Module.to = _wrap_to(torch.nn.Module.to)
    torch.Tensor.cuda = _identity
    torch.nn.Module.cuda = _identity

    plain_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, **options: Any) -> Any:
        # Megatron's optimizer compares this string with the CUDA names
        return _CUDA_TYPES.get(self.dtype, plain_type(self)) if dtype is None else plain_type(self, dtype, **options)

    torch.Tensor.type = tensor_type

    torch.cuda.current_device = lambda: _CPU
    torch.cuda.current_stream = torch.cpu.current_stream  # waits for nothing; Megatron-Core asks for it from 0.19 on
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def patch_megatron() -> None:
    """Replaces what in Megatron-Core asks CUDA for more than a device: generators and streams."""
    from megatron_sr1.platform.megatron_private import keep_token_counts_on_host, use_cpu_generator

    use_cpu_generator()
    keep_token_counts_on_host()
