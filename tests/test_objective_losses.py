"""The losses, against numbers worked out by hand: values and gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.objective import kl_estimate, sft_loss, stream_advantages, stream_loss, token_weights
from megatron_sr1.streams import PRESETS
from megatron_sr1.types import Clip, LossInputs, RewardStream

LN2 = math.log(2)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- every preset, end to end
# Five rollouts of two prompts. Tokens: description / rest of the first pass / second pass. Rollout 2 has no
# description, so it has no second pass and no visual reward.
GROUPS = [0, 0, 0, 1, 1]
REWARDS = {
    "acc": [1, 0, 0, 1, 0],
    "fmt": [1, 1, 0, 1, 1],
    "fmt_cot": [1, 0, 1, 1, 1],
    "acc_vis": [1, 0, 0, 0, 1],
    "fmt_vis": [1, 1, 0, 1, 1],
}
NUM_TOKENS = {"description": [1, 1, 0, 1, 1], "reasoning": [1, 2, 1, 1, 1], "second": [1, 1, 0, 2, 1]}
# log pi_ref - log pi of each token, by segment.
# k3(ln 2) = 2 - ln 2 - 1, k3(-ln 2) = 1/2 + ln 2 - 1; dk3/dlogpi = 1 - e^d
DIFFERENCE = {"description": LN2, "reasoning": -LN2, "second": LN2}
K3_SLOPE = {"description": -1.0, "reasoning": 0.5, "second": -1.0}
SEGMENTS = {  # which segments a stream's tokens are
    ("first", "response"): ("description", "reasoning"),
    ("first", "description"): ("description",),
    ("first", "reasoning"): ("reasoning",),
    ("second", "response"): ("second",),
}

R37, R127, R3, H = math.sqrt(0.37), math.sqrt(1.27), math.sqrt(3), math.sqrt(0.5)
# (1.1, 0.1, 0): mean 0.4, deviations (0.7, -0.3, -0.4), variance (0.49 + 0.09 + 0.16)/2 = 0.37.
# Any two unequal rewards give (H, -H).
ANSWER = [0.7 / R37, -0.3 / R37, -0.4 / R37, H, -H]
VISUAL = [0.7 / R37, -0.3 / R37, -0.4 / R37, -H, H]  # second group: (0.1, 1.1)
ADVANTAGES = {
    "vision_r1": [[0.7 / R37, -0.4 / R37, -0.3 / R37, H, -H]],  # (1.1, 0, 0.1), (1.1, 0.1)
    "see_think": [ANSWER],
    # (2, 0.1, 0): mean 0.7, deviations (1.3, -0.6, -0.7), variance (1.69 + 0.36 + 0.49)/2 = 1.27; (1, 1.1)
    "summed": [[1.3 / R127, -0.6 / R127, -0.7 / R127, -H, H]],
    # acc, acc_vis: (2, -1, -1)/R3; fmt, fmt_vis: (1, 1, -2)/R3 with weight 0.1. Second group: fmt equal, so 0; acc and
    # acc_vis opposite, so 0 in all.
    "gdpo": [[4.2 / R3, -1.8 / R3, -2.4 / R3, 0, 0]],
    "vision_sr1": [ANSWER, VISUAL],
    "perception_credit": [ANSWER, VISUAL],
}
# token_mean, on-policy. Tokens: response 2, 3, 1, 2, 2 = 10; second 1, 1, 0, 2, 1 = 5; description 4; reasoning 6.
KL_RESPONSE = 0.4 * (1 - LN2) + 0.6 * (LN2 - 0.5)
LOSS = {
    "vision_r1": -(2 * 0.7 - 3 * 0.4 - 0.3) / R37 / 10 + 0.01 * KL_RESPONSE,
    "see_think": -(2 * 0.7 - 3 * 0.3 - 0.4) / R37 / 10 + 0.01 * KL_RESPONSE,
    "summed": -(2 * 1.3 - 3 * 0.6 - 0.7) / R127 / 10 + 0.01 * KL_RESPONSE,
    "gdpo": -(2 * 4.2 - 3 * 1.8 - 2.4) / R3 / 10 + 0.01 * KL_RESPONSE,
    "vision_sr1": 0.5 * -(2 * 0.7 - 3 * 0.3 - 0.4) / R37 / 10
    + 0.5 * -((0.7 - 0.3) / R37 - 2 * H + H) / 5
    + 0.01 * KL_RESPONSE
    + 0.01 * (1 - LN2),
    "perception_credit": 0.5 * -(0.7 - 2 * 0.3 - 0.4) / R37 / 6
    + 0.5 * -((0.7 - 0.3) / R37) / 4
    + 0.01 * (LN2 - 0.5)
    + 0.01 * (1 - LN2),
}

TOKENS = [(r, segment) for r in range(5) for segment, counts in NUM_TOKENS.items() for _ in range(counts[r])]


def preset_inputs(name: str, aggregation: str = "token_mean") -> LossInputs:
    """The fixture through our own advantages and weights."""
    streams = PRESETS[name].streams
    rewards = {component: f64(*values) for component, values in REWARDS.items()}
    advantages, weights = [], []
    for stream in streams:
        segments = SEGMENTS[stream.trajectory, stream.tokens]
        per_rollout = stream_advantages(stream, rewards, torch.tensor(GROUPS), 1e-12)
        counts = torch.tensor([sum(NUM_TOKENS[segment][r] for segment in segments) for r in range(5)])
        weight = token_weights(counts, aggregation).double()
        advantages.append(torch.stack([per_rollout[r] for r, _ in TOKENS]))
        weights.append(f64(*[float(weight[r]) if segment in segments else 0.0 for r, segment in TOKENS]))
    trainer = -torch.arange(1, len(TOKENS) + 1, dtype=torch.float64) / 7
    reference = trainer + f64(*[DIFFERENCE[segment] for _, segment in TOKENS])
    return LossInputs(trainer.requires_grad_(), None, reference, torch.stack(advantages), torch.stack(weights), streams)


def gradient(inputs: LossInputs) -> torch.Tensor:
    (grad,) = torch.autograd.grad(stream_loss(inputs)[0], inputs.trainer_logprobs)
    return grad


def expected_gradient(name: str) -> list[float]:
    """-lambda w A + beta w dkl, summed over the streams that hold the token; plain floats."""
    total = [0.0] * len(TOKENS)
    for stream, advantages in zip(PRESETS[name].streams, ADVANTAGES[name], strict=True):
        segments = SEGMENTS[stream.trajectory, stream.tokens]
        weight = 1 / sum(sum(NUM_TOKENS[segment]) for segment in segments)
        for index, (rollout, segment) in enumerate(TOKENS):
            if segment in segments:
                total[index] += weight * (-stream.loss_weight * advantages[rollout] + 0.01 * K3_SLOPE[segment])
    return total


@pytest.mark.parametrize("name", ADVANTAGES)
def test_preset_loss_and_gradient_by_hand(name: str) -> None:
    inputs = preset_inputs(name)
    by_token = [[advantages[r] for r, _ in TOKENS] for advantages in ADVANTAGES[name]]
    torch.testing.assert_close(inputs.advantages, torch.tensor(by_token, dtype=torch.float64), rtol=0, atol=1e-10)
    loss, _ = stream_loss(inputs)
    assert loss.item() == pytest.approx(LOSS[name], abs=1e-7)  # the weights are float32
    torch.testing.assert_close(gradient(inputs), f64(*expected_gradient(name)), rtol=0, atol=1e-7)


def test_presets_are_told_apart() -> None:
    """No two presets of the fixture give one gradient, so no test above passes for the wrong stream."""
    gradients = [gradient(preset_inputs(name)) for name in tuple(ADVANTAGES)]
    for index, one in enumerate(gradients):
        assert all((one - other).abs().max() > 1e-3 for other in gradients[:index])


def test_paper_normalisation_is_one_over_2b() -> None:
    """Eq. 7: -1/(2B) sum over rollouts and tokens of both passes, B = 5 though one rollout has no second pass."""
    streams = tuple(replace(stream, kl_coef=0.0) for stream in PRESETS["vision_sr1"].streams)
    inputs = replace(preset_inputs("vision_sr1", "sequence_sum"), streams=streams, ref_logprobs=None)
    advantages = [VISUAL[r] if segment == "second" else ANSWER[r] for r, segment in TOKENS]
    torch.testing.assert_close(gradient(inputs), -f64(*advantages) / (2 * 5), rtol=0, atol=1e-7)


# ---------------------------------------------------------------- one stream, token by token
ONE = RewardStream("one", "first", "response", (("acc", 1.0),), loss_weight=1.0, kl_coef=0.0)


def one_stream(ratio: list[float], advantages: list[float], clip: Clip, stream: RewardStream = ONE) -> LossInputs:
    old = -torch.linspace(2.0, 3.0, len(ratio), dtype=torch.float64)
    trainer = (old + f64(*ratio).log()).requires_grad_()
    weights = torch.ones(1, len(ratio), dtype=torch.float64)
    return LossInputs(trainer, old, None, f64(*advantages)[None], weights, (replace(stream, clip=clip),))


CLIP = Clip(low=0.2, high=0.3, dual=3.0)
CLIP_CASES = [  # A, ratio, loss, dloss/dlogp, what holds the token
    (2.0, 1.2, -2.4, -2.4, None),
    (2.0, 1.5, -2.6, 0.0, "clip"),  # -2 * 1.3
    (2.0, 0.5, -1.0, -1.0, None),  # the lower bound never holds a positive advantage back
    (2.0, 4.0, -2.6, 0.0, "clip"),  # dual clip is for negative advantages only
    (-2.0, 0.9, 1.8, 1.8, None),
    (-2.0, 0.5, 1.6, 0.0, "clip"),  # 2 * 0.8
    (-2.0, 1.5, 3.0, 3.0, None),
    (-2.0, 4.0, 6.0, 0.0, "dual"),  # 8, but at most 2 * 3
    (0.0, 4.0, 0.0, 0.0, None),
]


@pytest.mark.parametrize(("advantage", "ratio", "value", "slope", "held"), CLIP_CASES)
def test_clipping_by_hand(advantage: float, ratio: float, value: float, slope: float, held: str | None) -> None:
    inputs = one_stream([ratio], [advantage], CLIP)
    loss, metrics = stream_loss(inputs)
    assert loss.item() == pytest.approx(value)
    assert gradient(inputs).item() == pytest.approx(slope)
    assert metrics["loss/one/clip_fraction"] == (held == "clip")
    assert metrics["loss/one/dual_clip_fraction"] == (held == "dual")
    assert metrics["loss/one/ratio_mean"].item() == pytest.approx(ratio)


def test_without_dual_clip_a_negative_advantage_is_unbounded() -> None:
    loss, metrics = stream_loss(one_stream([4.0], [-2.0], Clip(0.2, 0.3)))
    assert loss.item() == pytest.approx(8.0)
    assert metrics["loss/one/dual_clip_fraction"] == 0


@pytest.mark.parametrize(
    ("estimator", "difference", "value", "slope"),
    [
        ("k1", LN2, -LN2, 1.0),
        ("k1", -LN2, LN2, 1.0),
        ("k2", LN2, LN2 * LN2 / 2, -LN2),
        ("k2", -LN2, LN2 * LN2 / 2, LN2),
        ("k3", LN2, 1 - LN2, -1.0),
        ("k3", -LN2, LN2 - 0.5, 0.5),
    ],
)
def test_kl_by_hand_and_beta_is_not_multiplied_by_lambda(
    estimator: str, difference: float, value: float, slope: float
) -> None:
    stream = replace(ONE, loss_weight=0.25, kl_coef=0.5, kl_estimator=estimator)
    inputs = one_stream([1.0], [0.0], Clip(), stream)
    inputs = replace(inputs, ref_logprobs=inputs.trainer_logprobs.detach() + difference)
    loss, metrics = stream_loss(inputs)
    assert loss.item() == pytest.approx(0.5 * value)
    assert gradient(inputs).item() == pytest.approx(0.5 * slope)
    assert metrics["loss/one/kl"].item() == pytest.approx(value)


def test_k3_of_a_small_difference_keeps_its_digits() -> None:
    """e^d - d - 1 in float32 would round 5e-9 to 0 or 1e-7; float32 keeps d^2/2 through expm1."""
    got = kl_estimate(torch.tensor([0.0]), torch.tensor([0.25]) / 64, "k3")
    difference = 0.25 / 64
    assert got.item() == pytest.approx(math.expm1(difference) - difference, rel=1e-4)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(5)
    streams = tuple(
        replace(ONE, name=estimator, loss_weight=0.3 + index, kl_coef=0.1, kl_estimator=estimator)
        for index, estimator in enumerate(("k1", "k2", "k3"))
    )
    num = 40
    old = -3 * torch.rand(num, generator=generator, dtype=torch.float64)
    trainer = (old + 0.8 * torch.randn(num, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = old + 0.3 * torch.randn(num, generator=generator, dtype=torch.float64)
    advantages = torch.randn(3, num, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, num, generator=generator, dtype=torch.float64)

    clipped = tuple(replace(stream, clip=CLIP) for stream in streams)

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return stream_loss(LossInputs(logprobs, old, reference, advantages, weights, clipped))[0]

    assert torch.autograd.gradcheck(loss, (trainer,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_step_has_ratio_one_and_kl_zero_exactly(dtype: torch.dtype) -> None:
    trainer = (-5 * torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=dtype)).requires_grad_()
    advantages = torch.randn(1, 50, generator=torch.Generator().manual_seed(2), dtype=dtype)
    weights = torch.full((1, 50), 1 / 64, dtype=dtype)
    same = trainer.detach().clone()
    for old in (None, same):
        stream = replace(ONE, kl_coef=0.01, kl_estimator="k3")
        inputs = LossInputs(trainer, old, same, advantages, weights, (stream,))
        _, metrics = stream_loss(inputs)
        assert metrics["loss/one/ratio_mean"] == metrics["loss/one/weight"]
        assert metrics["loss/one/kl"] == 0
        assert metrics["loss/one/clip_fraction"] == 0
        assert torch.equal(gradient(inputs), (-advantages * weights)[0])  # neither ratio nor KL adds anything


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, len(TOKENS)), max_size=4), name=st.sampled_from(tuple(ADVANTAGES)))
def test_micro_batches_add_up(cuts: list[int], name: str) -> None:
    """Loss, metrics and gradient do not depend on how the tokens are cut, empty pieces included."""
    whole = preset_inputs(name)
    loss, metrics = stream_loss(whole)
    edges = [0, *sorted(cuts), len(TOKENS)]
    pieces = []
    for start, end in pairwise(edges):
        piece = replace(
            whole,
            trainer_logprobs=whole.trainer_logprobs[start:end],
            ref_logprobs=whole.ref_logprobs[start:end],
            advantages=whole.advantages[:, start:end],
            token_weights=whole.token_weights[:, start:end],
        )
        pieces.append(stream_loss(piece))
    torch.testing.assert_close(torch.stack([piece[0] for piece in pieces]).sum(), loss, rtol=0, atol=1e-12)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(piece[1][key] for piece in pieces), value, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(sum(piece[0] for piece in pieces), whole.trainer_logprobs)
    torch.testing.assert_close(grad, gradient(whole), rtol=0, atol=1e-12)


def test_metrics_are_detached_and_recompose_the_loss() -> None:
    inputs = preset_inputs("vision_sr1")
    loss, metrics = stream_loss(inputs)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    total = sum(
        stream.loss_weight * metrics[f"loss/{stream.name}/policy"] + stream.kl_coef * metrics[f"loss/{stream.name}/kl"]
        for stream in inputs.streams
    )
    torch.testing.assert_close(total, loss.detach())
    assert metrics["loss/visual/weight"].item() == pytest.approx(1.0)  # token_mean


# ---------------------------------------------------------------- wrong inputs
def valid_inputs() -> LossInputs:
    inputs = preset_inputs("vision_sr1")
    return replace(inputs, old_logprobs=inputs.trainer_logprobs.detach())


SHORT = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer_logprobs": torch.zeros(2, 3)}, "trainer_logprobs"),
        ({"trainer_logprobs": torch.zeros(len(TOKENS), dtype=torch.bfloat16)}, "trainer_logprobs.*bfloat16"),
        ({"old_logprobs": SHORT}, "old_logprobs"),
        ({"old_logprobs": torch.zeros(len(TOKENS)).requires_grad_()}, "old_logprobs: carries a gradient"),
        ({"ref_logprobs": SHORT}, "ref_logprobs"),
        ({"ref_logprobs": None}, r"ref_logprobs: None, but streams \['answer', 'visual'\]"),
        ({"advantages": torch.zeros(1, len(TOKENS))}, "advantages"),
        ({"token_weights": torch.zeros(len(TOKENS))}, "token_weights"),
        ({"streams": ()}, "streams: empty"),
        ({"streams": (replace(ONE, clip=Clip(dual=1.0)),) * 2}, "clip="),
        ({"streams": (ONE, replace(ONE, clip=Clip(low=-0.1)))}, "clip="),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_loss(replace(valid_inputs(), **change))


def test_unknown_kl_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="kl_estimator='k4'"):
        kl_estimate(f64(0), f64(0), "k4")


# ---------------------------------------------------------------- supervised
def test_sft_loss_by_hand() -> None:
    logprobs = f64(-1.0, -2.0, -4.0).requires_grad_()
    weights = f64(0.25, 0.25, 0.5)
    loss, metrics = sft_loss(logprobs, weights)
    assert loss.item() == 0.25 + 0.5 + 2.0
    assert (metrics["loss/sft/nll"].item(), metrics["loss/sft/weight"].item()) == (2.75, 1.0)
    loss.backward()
    assert torch.equal(logprobs.grad, -weights)


def test_sft_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="weights"):
        sft_loss(f64(-1.0), f64(1.0, 1.0))
    with pytest.raises(ValueError, match="logprobs"):
        sft_loss(torch.zeros(2, dtype=torch.float16), torch.zeros(2))
