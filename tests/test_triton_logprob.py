"""The Triton back ends of linear_logprob: in the interpreter, compiled for a GPU that is not there, and on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.kernels import linear_logprob
from megatron_sr1.kernels.linear_logprob import chunked
from megatron_sr1.kernels.linear_logprob.backends import BackendName
from tests.logprob_cases import assert_relative

REPOSITORY = Path(__file__).resolve().parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BOTH = pytest.mark.parametrize("backend", ["triton", "fused"])


def test_in_the_interpreter() -> None:
    """Its own process: TRITON_INTERPRET counts when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/interpreted_logprob.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    summary = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else ""
    assert run.returncode == 0 and re.match(r"\d+ passed", summary.strip("= ")), run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in summary


def test_needs_a_gpu_outside_the_interpreter() -> None:
    code = (
        "import torch; from megatron_sr1.kernels import linear_logprob\n"
        "linear_logprob(torch.zeros(1, 8), torch.zeros(3, 8), torch.zeros(1, dtype=torch.int64), backend='fused')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=_compiling(), capture_output=True, text=True)
    assert run.returncode == 1 and "backend='fused' needs a GPU, but hidden is on cpu" in run.stderr


# ---------------------------------------------------------------- compiled for an H100
@dataclass(frozen=True)
class Compiled:
    """What the compiler says about a kernel."""

    registers: int
    stack_bytes: int  # spilled registers
    shared_bytes: int
    tensor_core_products: int
    bulk_loads: int


def test_compiled_for_sm90_the_kernels_fit() -> None:
    """No GPU is needed to compile: registers do not spill, shared memory suffices, products are on tensor cores."""
    code = "from tests.test_triton_logprob import print_compiled; print_compiled()"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=_compiling(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {name: Compiled(**values) for name, values in json.loads(run.stdout.splitlines()[-1]).items()}
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        # 32 bytes a thread are eight registers, where every feature is asked for at once.
        assert kernel.stack_bytes <= (32 if name == "fused bf16 full" else 0), f"{name}: {kernel}"
        assert kernel.registers <= 255 and kernel.shared_bytes <= 227 * 1024, f"{name}: {kernel}"
        if name.startswith("fused bf16"):
            assert kernel.tensor_core_products > 0 and kernel.bulk_loads > 0, f"{name}: {kernel}"


def _compiling() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def print_compiled() -> None:
    """Compiles each kernel with all features (full) and with none (bare), for compute capability 9.0; prints JSON."""
    from megatron_sr1.kernels.linear_logprob import triton_forward, triton_tiles

    pointers = {name: "*fp32" for name in ("state", "inverse_temperature", "bias", "at_target", "of_p", "of_p_log_p")}
    pointers |= {"logsumexp": "*fp32", "targets": "*i64", "gradient": "*bf16", "parts": "*fp32"}
    results = {}
    for full in (True, False):
        features = {"HAS_TEMPERATURE": full, "HAS_BIAS": full, "ENTROPY": full}
        for kernel in (triton_tiles._fold_rows, triton_tiles._differentiate_rows):
            constants = features | {"BLOCK": triton_tiles.BLOCK_COLUMNS}
            types = pointers | {"product": "*fp32" if full else "*bf16"}
            name = f"{kernel.fn.__name__} {full}"
            results[name] = _compile(kernel, types, constants, num_warps=triton_tiles.NUM_WARPS)
        for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            blocks = triton_forward.blocks_for(3584, dtype)
            types = pointers | {
                "hidden": f"tensordesc<{element}[{blocks.rows},{blocks.depth}]>",
                "head": f"tensordesc<{element}[{blocks.columns},{blocks.depth}]>",
            }
            sizes = {"HIDDEN": 3584, "ROWS": blocks.rows, "COLUMNS": blocks.columns, "DEPTH": blocks.depth}
            sizes |= {"SPLIT": blocks.split, "GROUP": blocks.group, "ROUNDED": full}
            name = f"fused {element} {'full' if full else 'bare'}"
            options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
            results[name] = _compile(triton_forward._fold_blocks, types, features | sizes, **options)
    print(json.dumps(results))


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants and types.get(name, "").startswith("*")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options | {"enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_products": compiled.asm["ptx"].count("wgmma.mma_async"),
        "bulk_loads": compiled.asm["ptx"].count("cp.async.bulk.tensor"),
    }


# ---------------------------------------------------------------- on a GPU
TOKENS, HIDDEN, VOCAB, IDS = 16384, 2048, 152064, 151936
TEMPERATURE = 0.9


def large_inputs(tokens: int = TOKENS, hidden_size: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(VOCAB, hidden_size, generator=generator, device="cuda") * 0.03).bfloat16()
    targets = torch.randint(0, IDS, (tokens,), generator=generator, device="cuda")
    targets[1::7] = (hidden[1::7] @ weight[:IDS].t()).argmax(1)  # some likely ones
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def dense_rows(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and the gradient of hidden of `logprobs.sum() + 0.1 * entropy.sum()` at a few rows, float64."""
    x = hidden.detach()[rows].double().requires_grad_()
    log_p = (x @ weight.detach()[:IDS].double().t() / TEMPERATURE).log_softmax(1)
    logprobs = log_p.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    return logprobs.detach(), entropy.detach(), x.grad


def gradients_of(
    inputs: tuple[Tensor, Tensor, Tensor], backend: BackendName, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    result = linear_logprob(*inputs, temperature=TEMPERATURE, entropy=True, vocab_size=IDS, backend=backend, **options)
    (result.logprobs.sum() + 0.1 * result.entropy.sum()).backward()
    return result.logprobs.detach(), result.entropy.detach(), hidden.grad, weight.grad


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "fused"])
def test_at_full_size_in_bfloat16(backend: BackendName) -> None:
    """T*V = 2.5e9 > 2**31; rows from the whole range against float64, the head's gradient against torch's."""
    inputs = large_inputs()
    rows = torch.tensor([0, 1, 63, 8191, 8192, 14125, TOKENS - 1], device="cuda")
    logprobs, entropy, grad_hidden, grad_weight = gradients_of(inputs, backend)
    expected_logprobs, expected_entropy, expected_grad = dense_rows(*inputs, rows)
    torch.testing.assert_close(logprobs[rows].double(), expected_logprobs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy[rows].double(), expected_entropy, rtol=1e-5, atol=2e-5)
    assert_relative(grad_hidden[rows], expected_grad, 2**-7)
    assert logprobs.max() <= 0 and not grad_weight[IDS:].any()
    reference = gradients_of(inputs, "torch")[3]
    assert_relative(grad_weight, reference.double(), 2**-7)
    main = torch.zeros(VOCAB, HIDDEN, device="cuda")
    gradients_of(inputs, backend, accumulate_into=main)
    assert_relative(main, grad_weight.double(), 2**-7)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "fused"])
def test_every_run_gives_the_same_bits(backend: BackendName) -> None:
    inputs = large_inputs(4097, 1024)  # no multiple of a block
    for options in ({}, {"logits": "bf16"}, {"grad_rows": torch.arange(0, 4097, 3, device="cuda")}):
        runs = [gradients_of(inputs, backend, **options) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@needs_gpu
@BOTH
def test_float32_on_a_gpu(backend: BackendName) -> None:
    hidden, weight, targets = (x.detach() for x in large_inputs(1000, 256))
    inputs = hidden.float().requires_grad_(), weight.float().requires_grad_(), targets
    rows = torch.arange(0, 1000, 111, device="cuda")
    logprobs, entropy, grad_hidden, _ = gradients_of(inputs, backend)
    expected_logprobs, expected_entropy, expected_grad = dense_rows(*inputs, rows)
    torch.testing.assert_close(logprobs[rows].double(), expected_logprobs, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(entropy[rows].double(), expected_entropy, rtol=1e-6, atol=4e-6)
    assert_relative(grad_hidden[rows], expected_grad, 1e-5)


@pytest.mark.gpu
@needs_gpu
@BOTH
def test_peak_memory_on_a_gpu(backend: BackendName) -> None:
    """The formula of chunked.py; 64 MiB for the libraries' workspaces and the vectors of [T]."""
    hidden, weight, targets = large_inputs()
    tile, slack = chunked.TILE_ELEMENTS_ACCELERATOR, 64 * 2**20

    def peak(action: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = action()
        del kept
        return torch.cuda.max_memory_allocated() - before

    options = {"temperature": TEMPERATURE, "entropy": True, "backend": backend}
    with torch.no_grad():
        forward = peak(lambda: linear_logprob(hidden, weight, targets, **options))
    splits = -(-VOCAB // 4096)
    temporaries = splits * 4 * 4 * TOKENS if backend == "fused" else 2 * 4 * tile
    assert forward <= temporaries + slack
    gradients = 2 * (TOKENS + VOCAB) * HIDDEN
    workspace = (4 * TOKENS + 4 * chunked.MAX_TILE_COLUMNS) * HIDDEN + 6 * tile
    both = peak(lambda: linear_logprob(hidden, weight, targets, **options).logprobs.sum().backward())
    assert both <= gradients + workspace + slack < 4 * TOKENS * VOCAB / 4
