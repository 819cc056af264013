"""The fused loss against the readable one, against numbers worked out by hand and against liger-kernel.

Whatever is parametrised over BACKENDS runs on torch in every process, and on Triton where its kernels can run: in the
process that test_triton_kernels_in_the_interpreter starts, whose Triton is interpreted on the CPU.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sr1.kernels.policy_loss.fused import METRICS, LossBackend, fused_stream_loss
from megatron_sr1.objective import stream_loss
from megatron_sr1.types import Clip, LossInputs, RewardStream
from tests import test_objective_liger as liger_case
from tests import test_objective_losses as by_hand

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS: tuple[LossBackend, ...] = ("torch", "triton") if INTERPRETED else ("torch",)
EXAMPLES = 20 if INTERPRETED else 60  # an interpreted kernel takes a hundred times as long
LN2 = math.log(2)


def make_stream(name: str, weight: float = 1.0, kl_coef: float = 0.1, estimator: str = "k3") -> RewardStream:
    return RewardStream(name, "first", "response", (("acc", 1.0),), weight, kl_coef, estimator)


THREE = (make_stream("a", 0.5, 0.1, "k1"), make_stream("b", 1.0, 0.2, "k2"), make_stream("c", 1.5, 0.3, "k3"))
BOTH_CLIPS = Clip(0.2, 0.3, 3.0)


def make_inputs(
    num_tokens: int,
    streams: tuple[RewardStream, ...] = THREE,
    clips: Sequence[Clip] = (BOTH_CLIPS,),
    *,
    old: bool = True,
    reference: bool = True,
    masked: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LossInputs:
    """Ratios from about e^-2 to e^2; the weights of a stream add up to 1, or are all 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    trainer = -3 * torch.rand(num_tokens, generator=generator, dtype=dtype)
    shape = (len(streams), num_tokens)
    weights = torch.rand(shape, generator=generator, dtype=dtype)
    weights = weights * (torch.rand(shape, generator=generator) >= masked)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return LossInputs(
        trainer_logprobs=trainer.clone().requires_grad_(),
        old_logprobs=trainer + 0.6 * normal(num_tokens) if old else None,
        ref_logprobs=trainer + 0.5 * normal(num_tokens) if reference else None,
        advantages=normal(*shape),
        token_weights=weights,
        streams=tuple(
            replace(stream, kl_coef=stream.kl_coef * reference, clip=clips[index % len(clips)])
            for index, stream in enumerate(streams)
        ),
    )


def double(inputs: LossInputs) -> LossInputs:
    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().double()

    return replace(
        inputs,
        trainer_logprobs=cast(inputs.trainer_logprobs).requires_grad_(),
        old_logprobs=cast(inputs.old_logprobs),
        ref_logprobs=cast(inputs.ref_logprobs),
        advantages=cast(inputs.advantages),
        token_weights=cast(inputs.token_weights),
    )


def gradient_of(loss: Tensor, inputs: LossInputs, incoming: float = 1.0) -> Tensor:
    return torch.autograd.grad(loss * incoming, inputs.trainer_logprobs)[0]


def assert_near(name: str, got: Tensor, expected: Tensor, scale: Tensor | float, tolerance: float) -> None:
    error = (got.detach().double() - expected.detach()).abs()
    assert (error <= tolerance * (expected.detach().abs() + scale)).all(), f"{name}: off by {error.max().item():.2e}"


def assert_matches_reference(inputs: LossInputs, backend: LossBackend, tolerance: float = 1e-6) -> None:
    """Against the reference in float64. Errors are relative to the sum of the magnitudes that a number is made of:
    a sum of weights 1 for loss and metrics, and for a token's gradient w (1 + |A| ratio + e^|d|), all streams."""
    loss, metrics = fused_stream_loss(inputs, backend=backend)
    exact = double(inputs)
    expected_loss, expected = stream_loss(exact)
    assert loss.shape == () and loss.dtype == inputs.trainer_logprobs.dtype
    assert_near("loss", loss, expected_loss, len(inputs.streams), tolerance)
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        assert metrics[name].shape == () and not metrics[name].requires_grad
        assert_near(name, metrics[name], value, 1.0, tolerance)
    trainer = exact.trainer_logprobs.detach()
    ratio = (trainer - (trainer if exact.old_logprobs is None else exact.old_logprobs)).exp()
    distance = 0 * trainer if exact.ref_logprobs is None else (exact.ref_logprobs - trainer).abs()
    scale = (exact.token_weights * (1 + exact.advantages.abs() * ratio + distance.exp())).sum(0)
    got, wanted = gradient_of(loss, inputs, 3.0), gradient_of(expected_loss, exact, 3.0)
    assert got.dtype == inputs.trainer_logprobs.dtype
    assert_near("gradient", got, wanted, 3.0 * scale, tolerance)


# ---------------------------------------------------------------- the reference, over all combinations
STREAMS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 0.0, 0.3, -0.5]), st.sampled_from([0.0, 0.01, 0.7]), st.sampled_from(["k1", "k2", "k3"])
    ),
    min_size=1,
    max_size=4,
).map(lambda rows: tuple(make_stream(f"s{index}", *row) for index, row in enumerate(rows)))
CLIPS = st.lists(  # of the streams in turn
    st.builds(
        Clip, st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.0, 0.28, 5.0]), st.sampled_from([None, 1.3, 3.0])
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    num_tokens=st.sampled_from([0, 1, 2, 37, 511, 513, 1100]),
    streams=STREAMS,
    clips=CLIPS,
    old=st.booleans(),
    reference=st.booleans(),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(
    backend: LossBackend, num_tokens: int, streams: tuple, clips: list[Clip], **drawn: object
) -> None:
    assert_matches_reference(make_inputs(num_tokens, streams, clips, **drawn), backend)


@settings(deadline=None, max_examples=40)
@given(streams=STREAMS, clips=CLIPS, old=st.booleans(), reference=st.booleans(), seed=st.integers(0, 2**31))
def test_equals_the_reference_in_float64(streams: tuple, clips: list[Clip], **drawn: object) -> None:
    assert_matches_reference(make_inputs(60, streams, clips, dtype=torch.float64, **drawn), "torch", 1e-13)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_triton_kernels_in_the_interpreter")
@pytest.mark.parametrize("num_tokens", [511, 513, 1025, 2600])
def test_partial_sums_of_many_blocks_triton(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six blocks and more where the second kernel takes two at a time."""
    from megatron_sr1.kernels.policy_loss import triton_loss

    monkeypatch.setattr(triton_loss, "BLOCK_PARTIALS", 2)
    assert_matches_reference(make_inputs(num_tokens), "triton")


def test_many_tokens() -> None:
    assert_matches_reference(make_inputs(70_000), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_and_strides_are_read_as_they_are(backend: LossBackend) -> None:
    inputs = make_inputs(600)
    one_row = torch.randn(600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strided = replace(
        inputs,
        advantages=one_row.expand(3, 600),
        token_weights=inputs.token_weights.t().contiguous().t(),
        old_logprobs=inputs.old_logprobs.repeat_interleave(2)[::2],
        ref_logprobs=inputs.ref_logprobs.double(),
    )
    assert not strided.token_weights.is_contiguous() and not strided.old_logprobs.is_contiguous()
    assert_matches_reference(strided, backend)


def test_gradcheck() -> None:
    inputs = make_inputs(40, dtype=torch.float64)

    def loss(logprobs: Tensor) -> Tensor:
        return fused_stream_loss(replace(inputs, trainer_logprobs=logprobs))[0]

    assert torch.autograd.gradcheck(loss, (inputs.trainer_logprobs,))


# ---------------------------------------------------------------- numbers worked out by hand
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("advantage", "ratio", "value", "slope", "held"), by_hand.CLIP_CASES)
def test_clipping_by_hand(
    backend: LossBackend, advantage: float, ratio: float, value: float, slope: float, held: str | None
) -> None:
    old = torch.tensor([-2.0])
    weights = torch.ones(1, 1)
    trainer = (old + math.log(ratio)).requires_grad_()
    streams = (replace(make_stream("one", kl_coef=0.0), clip=by_hand.CLIP),)
    inputs = LossInputs(trainer, old, None, torch.tensor([[advantage]]), weights, streams)
    loss, metrics = fused_stream_loss(inputs, backend=backend)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert gradient_of(loss, inputs).item() == pytest.approx(slope, rel=1e-6)
    assert metrics["loss/one/clip_fraction"] == (held == "clip")
    assert metrics["loss/one/dual_clip_fraction"] == (held == "dual")
    assert metrics["loss/one/ratio_mean"].item() == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_by_hand(backend: LossBackend) -> None:
    """Three tokens, ratios 1, 2 and 1/2, d = ln 2, 0 and -ln 2; the second belongs to both streams.

    x: lambda 2, beta 0.5, k3, weights 1/4, 3/4, 0, advantages 4, -1: policy -4/4 + 2 * 3/4 = 1/2,
       kl (1 - ln 2) / 4; gradient 2 (-1, 3/2) + 0.5 (-1/4, 0)
    y: lambda 1, beta 1, k1, weights 0, 1/2, 1/2, advantages 1, 1: ratio 2 is held at 1.25: policy -0.625 - 0.25,
       kl ln(2) / 2; gradient (0, -1/4) + (1/2, 1/2)
    """
    trainer = torch.tensor([-1.0, -2.0, -3.0]).requires_grad_()
    inputs = LossInputs(
        trainer_logprobs=trainer,
        old_logprobs=trainer.detach() - torch.tensor([0.0, LN2, -LN2]),
        ref_logprobs=trainer.detach() + torch.tensor([LN2, 0.0, -LN2]),
        advantages=torch.tensor([[4.0, -1.0, 9.0], [9.0, 1.0, 1.0]]),
        token_weights=torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]),
        streams=tuple(
            replace(stream, clip=Clip(0.6, 0.25))
            for stream in (make_stream("x", 2.0, 0.5, "k3"), make_stream("y", 1.0, 1.0, "k1"))
        ),
    )
    loss, metrics = fused_stream_loss(inputs, backend=backend)
    expected = [1.0, 0.5, (1 - LN2) / 4, 1.75, 0.0, 0.0, 1.0, -0.875, LN2 / 2, 1.25, 0.5, 0.0]
    assert [value.item() for value in metrics.values()] == pytest.approx(expected, rel=1e-6)
    assert list(metrics) == [f"loss/{stream}/{metric}" for stream in "xy" for metric in METRICS]
    assert loss.item() == pytest.approx(2 * 0.5 + 0.5 * (1 - LN2) / 4 - 0.875 + LN2 / 2, rel=1e-6)
    assert gradient_of(loss, inputs).tolist() == pytest.approx([-2.125, 3.5, 0.25], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_keeps_its_digits_at_every_distance(backend: LossBackend, estimator: str) -> None:
    """One token at a time against float64, from differences whose square is lost beside 1 to those beyond e^80."""
    distances = [s * 10.0**e for e in range(-6, 2) for s in (1, -1, 3, -3)] + [0.0, 0.999, -0.999, 1.001, 79.0, 85.0]
    got = []
    for distance in distances:
        streams = (make_stream("one", 0.0, 1.0, estimator),)
        reference = torch.tensor([distance])
        ones = torch.ones(1, 1)
        inputs = LossInputs(torch.zeros(1, requires_grad=True), None, reference, ones, ones, streams)
        loss, _ = fused_stream_loss(inputs, backend=backend)
        got.append((loss.item(), gradient_of(loss, inputs).item()))
    d = torch.tensor(distances).double()
    # e^d - d - 1 itself has no digits left in float64 for small d; its series has them all
    k3 = torch.where(d.abs() < 0.01, d**2 / 2 + d**3 / 6 + d**4 / 24, torch.expm1(d) - d)
    value, slope = {"k1": (-d, torch.ones_like(d)), "k2": (d**2 / 2, -d), "k3": (k3, -torch.expm1(d))}[estimator]
    # torch's float32 expm1 keeps the difference of two numbers of size d: no better than the reference
    lost = 2e-7 * d.abs() if backend == "torch" and estimator == "k3" else 0.0 * d
    values, slopes = torch.tensor(got, dtype=torch.float64).unbind(1)
    assert ((values - value).abs() <= 2e-6 * value.abs() + lost).all()
    torch.testing.assert_close(slopes, slope, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_has_ratio_one_and_kl_zero_exactly(backend: LossBackend) -> None:
    inputs = make_inputs(50, THREE[2:], masked=0.0)
    same = inputs.trainer_logprobs.detach().clone()
    for old in (None, same):
        first = replace(inputs, old_logprobs=old, ref_logprobs=same, streams=(make_stream("c", 1.0, 0.1),))
        loss, metrics = fused_stream_loss(first, backend=backend)
        assert metrics["loss/c/ratio_mean"] == metrics["loss/c/weight"]
        assert metrics["loss/c/kl"] == 0 and metrics["loss/c/clip_fraction"] == 0
        assert torch.equal(gradient_of(loss, first), (-first.advantages * first.token_weights)[0])


# ---------------------------------------------------------------- an implementation that is not ours
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dual", [None, 1.6])
def test_equals_liger(backend: LossBackend, dual: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_case, "stream_loss", lambda inputs: fused_stream_loss(inputs, backend=backend))
    liger_case.test_loss_and_gradients_equal("token_mean", "dapo", dual)


# ---------------------------------------------------------------- the edge of float32
def one_token(backend: LossBackend, log_ratio: float, advantage: float, weight: float, clip: Clip) -> tuple[float, ...]:
    """Loss, gradient and ratio_mean of one token beside a quiet one; the other token's part is 0."""
    inputs = LossInputs(
        trainer_logprobs=torch.tensor([log_ratio, 0.0]).requires_grad_(),
        old_logprobs=torch.zeros(2),
        ref_logprobs=None,
        advantages=torch.tensor([[advantage, 0.0]]),
        token_weights=torch.tensor([[weight, 0.0]]),
        streams=(replace(make_stream("one", kl_coef=0.0), clip=clip),),
    )
    loss, metrics = fused_stream_loss(inputs, backend=backend)
    return loss.item(), gradient_of(loss, inputs)[0].item(), metrics["loss/one/ratio_mean"].item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_ratios(backend: LossBackend) -> None:
    clip, dual, infinite = Clip(0.2, 0.3), Clip(0.2, 0.3, 3.0), math.inf
    assert one_token(backend, 200.0, 1.0, 0.5, clip) == (pytest.approx(-0.65), 0.0, infinite)
    assert one_token(backend, 200.0, -2.0, 0.5, dual) == (pytest.approx(3.0), 0.0, infinite)
    assert one_token(backend, 200.0, -2.0, 0.5, clip) == (infinite, infinite, infinite)  # nothing bounds it
    assert one_token(backend, 200.0, -2.0, 0.0, clip) == (0.0, 0.0, 0.0)  # not in the stream
    assert one_token(backend, -200.0, 1.0, 0.5, clip) == (0.0, 0.0, 0.0)
    assert one_token(backend, -math.inf, 1.0, 0.5, clip) == (0.0, 0.0, 0.0)
    assert one_token(backend, -200.0, -2.0, 0.5, clip) == (pytest.approx(0.8), 0.0, 0.0)
    largest = math.exp(torch.tensor(88.5).item())
    assert one_token(backend, 88.5, -1.0, 1.0, clip) == pytest.approx((largest, largest, largest), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_that_counts_is_not_lost_and_one_that_does_not_is(backend: LossBackend) -> None:
    inputs = make_inputs(5, THREE, masked=0.0)
    with torch.no_grad():
        inputs.trainer_logprobs[2] = math.nan
    for broken in (inputs, replace(inputs, old_logprobs=None)):
        loss, metrics = fused_stream_loss(broken, backend=backend)
        assert loss.isnan() and metrics["loss/a/kl"].isnan() and metrics["loss/c/policy"].isnan()
        assert gradient_of(loss, broken).isnan().tolist() == [False, False, True, False, False]
        weights = broken.token_weights.clone()
        weights[:, 2] = 0
        quiet = replace(broken, token_weights=weights)
        loss, metrics = fused_stream_loss(quiet, backend=backend)
        assert not any(value.isnan() for value in (loss, *metrics.values()))
        assert not gradient_of(loss, quiet).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "masked"), [(0, 0.0), (9, 1.0)])
def test_nothing_to_score_is_zero(backend: LossBackend, num_tokens: int, masked: float) -> None:
    inputs = make_inputs(num_tokens, masked=masked)
    loss, metrics = fused_stream_loss(inputs, backend=backend)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert torch.equal(gradient_of(loss, inputs), torch.zeros(num_tokens))


# ---------------------------------------------------------------- what it keeps, and what it refuses
@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_one_tensor_for_backward_and_repeats_to_the_bit(backend: LossBackend) -> None:
    inputs = make_inputs(1100)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, metrics = fused_stream_loss(inputs, backend=backend)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in kept] == [((1100,), torch.float32)]
    again, metrics_again = fused_stream_loss(inputs, backend=backend)
    assert torch.equal(gradient_of(loss, inputs), gradient_of(again, inputs))
    assert loss == again and metrics == metrics_again
    with torch.no_grad():
        quiet, _ = fused_stream_loss(inputs, backend=backend)
    assert quiet == again and not quiet.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer_logprobs": torch.zeros(4, dtype=torch.bfloat16)}, "trainer_logprobs.*bfloat16"),
        ({"advantages": torch.zeros(3, 5)}, "advantages"),
        ({"ref_logprobs": None}, "ref_logprobs: None, but streams"),
        ({"streams": tuple(replace(each, clip=Clip(dual=1.0)) for each in THREE)}, "clip="),
        ({"streams": (*THREE[:2], make_stream("c", estimator="k4"))}, "'c' has kl_estimator='k4'"),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_stream_loss(replace(make_inputs(4), **change))


def test_wrong_backends_are_named() -> None:
    with pytest.raises(ValueError, match="backend='liger': must be one of auto, torch, triton"):
        fused_stream_loss(make_inputs(4), backend="liger")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"trainer_logprobs are torch\.float64"):
        fused_stream_loss(make_inputs(4, dtype=torch.float64), backend="triton")
    if INTERPRETED:
        elsewhere = replace(make_inputs(4), token_weights=torch.zeros(3, 4, device="meta"))
        with pytest.raises(ValueError, match="token_weights: on meta"):
            fused_stream_loss(elsewhere, backend="triton")
    else:
        with pytest.raises(ValueError, match="trainer_logprobs are on cpu"):
            fused_stream_loss(make_inputs(4), backend="triton")


# ---------------------------------------------------------------- the kernels
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_triton_kernels_in_the_interpreter() -> None:
    """Triton reads its switch when it is imported, so the interpreter needs a process of its own."""
    pytest.importorskip("triton")
    chosen = "triton- or -triton or triton] or blocks_triton or wrong_backends"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 25 and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, from arguments of the kinds that triton_loss passes, and without atomics. The compiler needs no
    card, only its name; device -1 keeps what is compiled here away from a card that is there."""
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    from triton.runtime import driver

    from megatron_sr1.kernels.policy_loss.triton_kernels import add_blocks, loss_of_blocks

    card = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: -1, get_current_stream=lambda device: 0
    )
    monkeypatch.setattr(driver, "_active", card)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    loss_of_blocks.device_caches.clear()
    add_blocks.device_caches.clear()
    x, weights, coefs = torch.zeros(1), (1.0, 0.5), (0.0, 0.1)
    switches = {"HAS_DUAL": (True, False), "HAS_REFERENCE": True, "ESTIMATORS": (1, 3), "BLOCK": 512}
    numbers = (1, 1, weights, coefs, (0.8, 0.9), (1.2, 1.3), (3.0, 0.0))
    first = loss_of_blocks.warmup(x, x, x, x.double(), x, x, x, *numbers, **switches, grid=(1,))
    second = add_blocks.warmup(x, x, x, 1, weights, coefs, STREAMS=2, BLOCK=128, grid=(1,))
    for kernel in (first, second):
        assert len(kernel.asm["cubin"]) > 1000
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
    assert first.src.signature["num_tokens"] == "i32"  # not the constant 1: no new kernel for another length


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [0, 1, 513, 65_536])
def test_on_a_gpu(num_tokens: int) -> None:
    """auto takes Triton: equal to the reference, two launches forward, [R] + O(blocks) memory, the same bits again."""
    inputs = to_device(make_inputs(num_tokens), torch.device("cuda"))
    assert_matches_reference(inputs, "auto", 2e-6)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss, metrics = fused_stream_loss(inputs)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * num_tokens + 18 * 4 * (num_tokens // 512 + 1) + 4096
    launched = [e.key for e in profile.key_averages() if e.key in ("loss_of_blocks", "add_blocks")]
    assert len(launched) == (2 if num_tokens else 1)
    assert sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA") == len(launched)
    again, metrics_again = fused_stream_loss(inputs)
    assert torch.equal(gradient_of(loss, inputs), gradient_of(again, inputs))
    assert torch.equal(loss, again) and all(torch.equal(metrics[name], metrics_again[name]) for name in metrics)
    exact_in_float64 = double(inputs)
    assert_matches_reference(exact_in_float64, "auto", 1e-12)


def to_device(inputs: LossInputs, device: torch.device) -> LossInputs:
    return replace(
        inputs,
        trainer_logprobs=inputs.trainer_logprobs.detach().to(device).requires_grad_(),
        old_logprobs=inputs.old_logprobs.to(device),
        ref_logprobs=inputs.ref_logprobs.to(device),
        advantages=inputs.advantages.to(device),
        token_weights=inputs.token_weights.to(device),
    )
