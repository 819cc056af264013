"""Every layout gives the log-probs, the loss and all gradients of one rank.

One rank writes the expectation for each family of models; each launch of several ranks then walks through many layouts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from megatron_sr1.packing import gather_rows
from megatron_sr1.types import Routing, Scoring
from tests import trainer_cases
from tests.model_zoo import create_family
from tests.policy_cases import (
    BUDGET,
    LEARNING_RATE,
    STEP_TOLERANCE,
    TOLERANCE,
    MeanLoss,
    built,
    make_sequences,
    packed_rows,
    processor_of,
    relative_error,
)
from tests.ranks import run_ranks
from tests.routing_cases import led

TP, PP, VPP, CP, EP = (f"layout.{name}" for name in ("tensor", "pipeline", "virtual", "context", "expert"))
SP = "layout.sequence_parallel=true"
PLAIN = "layout.distributed_optimizer=false"
DENSE, DEEPSTACK, MIXTURE = "qwen2_5_vl_tied", "qwen3_vl", "qwen3_vl_moe"
UNTIED, RECURRENT, RECURRENT_MIXTURE = "qwen2_5_vl_untied", "qwen3_5", "qwen3_5_moe"
EVERY = (DENSE, DEEPSTACK, MIXTURE)

MAX_THREADS = 150  # three for each of a layout's groups, and torch's own
FROZEN = "model.freeze=['.*layers[.][0][.].*','.*layers[.]3[.].*o_proj.*',embeddings,vision]"
SMALL_BUDGET = 60  # most sequences alone: rows of text only, of images only
# number of ranks -> (families, overrides); a mixture under tensor parallelism needs sequence parallelism
LAYOUTS: dict[int, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    1: [
        ((*EVERY, RECURRENT), ("recompute.mode=full", "recompute.vision=true")),
        (EVERY, ("recompute.mode=block", "recompute.layers=2")),
        ((*EVERY, RECURRENT), ("recompute.mode=selective", "recompute.modules=[core_attn,mlp]")),
    ],
    2: [
        ((DENSE, UNTIED, DEEPSTACK), (f"{TP}=2",)),
        ((*EVERY, RECURRENT), (f"{TP}=2", SP)),
        ((UNTIED, *EVERY), (f"{PP}=2",)),
        (EVERY, (f"{PP}=2", "layout.stage_layers=[1,3]", "recompute.mode=full")),
        ((*EVERY, RECURRENT), (f"{PP}=2", f"{VPP}=2")),
        (EVERY, (f"{CP}=2",)),
        (EVERY, ()),
        (EVERY, (PLAIN,)),
        ((MIXTURE,), (f"{EP}=2",)),
        ((MIXTURE, RECURRENT_MIXTURE), (f"{EP}=2", f"{TP}=2", SP, PLAIN)),
        ((DENSE,), (f"{TP}=2", "recompute.mode=full", FROZEN)),
        ((DEEPSTACK,), (f"{PP}=2", f"{VPP}=2", "recompute.mode=full", FROZEN)),
        ((MIXTURE,), (f"{EP}=2", f"{TP}=2", SP, FROZEN)),
    ],
    4: [
        ((DENSE, UNTIED, DEEPSTACK, RECURRENT), (f"{TP}=4",)),  # of 2 key/value heads
        ((UNTIED, *EVERY), (f"{PP}=4",)),
        ((DENSE, DEEPSTACK), (f"{TP}=2", f"{PP}=2")),
        ((DENSE, DEEPSTACK, RECURRENT), (f"{TP}=2", f"{PP}=2", FROZEN)),
        (EVERY, (f"{TP}=2", f"{CP}=2", SP, "recompute.mode=full", "recompute.vision=true")),
        (EVERY, (f"{PP}=2", f"{CP}=2")),
        ((MIXTURE,), (f"{PP}=2", f"{VPP}=2", f"{EP}=2")),
        ((MIXTURE,), (f"{TP}=2", f"{EP}=4", SP)),
    ],
    8: [
        ((DENSE, DEEPSTACK), (f"{TP}=2", f"{PP}=2")),  # and DP2
        ((MIXTURE,), (f"{TP}=2", f"{PP}=2", f"{EP}=2", SP)),
        ((DEEPSTACK,), (f"{TP}=2", f"{PP}=2", f"{VPP}=2", f"{CP}=2", SP)),
    ],
}


# of a mixture whose experts the generator has chosen
REPLAYED: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("recompute.mode=full",), ("recompute.mode=selective", "recompute.modules=[moe]")),
    2: (
        (f"{TP}=2", SP, "recompute.mode=selective", "recompute.modules=[moe]"),
        (f"{PP}=2", f"{VPP}=2"),
        (f"{CP}=2",),
        (f"{EP}=2", f"{TP}=2", SP),
    ),
    4: ((f"{TP}=2", f"{CP}=2", SP, "recompute.mode=full"),),
    8: ((f"{TP}=2", f"{PP}=2", f"{EP}=2", SP),),
}
# of a trainer's whole steps, on the smallest model
TRAINER_LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    2: ((), (f"{TP}=2", SP), (f"{PP}=2",), (f"{CP}=2",)),
    4: ((f"{TP}=2",), ()),  # and two replicas; four, which have half of a group each
}


def _gradients(policy: Any) -> dict[str, Tensor]:
    """Of the last step, under their Hugging Face names. Complete on every rank without a distributed optimizer."""
    from megatron_sr1.weights import export_hf_weights

    exported = export_hf_weights(
        policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad
    )
    return {name: tensor.clone() for name, tensor in exported}


def _one_step(
    model_dir: str, overrides: tuple[str, ...], budget: int, share: bool = False, *, given: bool = False
) -> dict[str, Any]:
    """Log-probs by sequence (of this replica), and loss, gradients and weights of a step.

    A mixture's routers follow in it what they chose before it, or are given in both.
    """
    processor = processor_of(model_dir)
    num_tokens = sum(len(sequence.response_ids) for sequence in make_sequences(processor))
    with built(model_dir, overrides) as (policy, config):
        batches, mine = packed_rows(policy, config, processor, budget, share, led if given else lambda one: one)
        batches = [replace(batch, routing=batch.routing or Routing()) for batch in batches]
        start = {name: tensor.clone() for name, tensor in policy.hf_weights()} if FROZEN in overrides else {}
        prefixes = torch.tensor(max(max(batch.parents) for batch in batches))
        torch.distributed.all_reduce(prefixes, op=torch.distributed.ReduceOp.MAX)
        assert (int(prefixes) >= 0) == share, "prefixes are shared on some replica"
        scores = policy.logprobs([replace(batch, marks_top=True) for batch in batches], Scoring())
        logprobs = gather_rows([score.logprobs for score in scores], batches, len(mine))
        entropies = gather_rows([score.entropy for score in scores], batches, len(mine))
        tops = gather_rows([score.is_top for score in scores], batches, len(mine))
        batches = [replace(batch, entropy_grad=True) for batch in batches]
        result = policy.train_step(batches, MeanLoss(num_tokens, bonus=0.2), Scoring())
        return {
            "logprobs": dict(zip(mine, logprobs, strict=True)),
            "entropies": dict(zip(mine, entropies, strict=True)),
            "tops": {index: row.tolist() for index, row in zip(mine, tops, strict=True)},
            "result": result,
            "gradients": {} if config.layout.distributed_optimizer else _gradients(policy),
            "weights": {name: tensor.clone() for name, tensor in policy.hf_weights()},
            "kept": {
                name for name, tensor in policy.hf_weights() if name in start and torch.equal(tensor, start[name])
            },
            "num_rows": len(batches),
            "agreed": sum(int(each) for batch in batches for each in batch.routing.agreed.values()),
        }


def _trainer_steps(model_dir: str, overrides: tuple[str, ...]) -> trainer_cases.Steps:
    options = (*trainer_cases.OVERRIDES, "train.micro_batch_tokens=512", PLAIN, *overrides)
    with built(model_dir, options, keep_reference=True) as (policy, config):
        return trainer_cases.two_updates(policy, config, processor_of(model_dir), Path(f"{model_dir}.tokens"))


def _check_trainer(folder: str, num_ranks: int) -> None:
    """A KL in the reward is gathered over replicas before advantages are made, and the bonus is of whole distributions:
    both steps report the same, by their loss terms and gradient norms, and leave the same weights."""
    if num_ranks == 1:
        torch.save(_trainer_steps(f"{folder}/{DENSE}", ()), f"{folder}/trainer.pt")
        return
    expected = torch.load(f"{folder}/trainer.pt", weights_only=False)
    assert abs(expected.second.metrics["loss/answer/kl_in_reward"]) > 1e-3
    assert (
        expected.second.metrics["loss/visual/entropy_bonus"] < 0 < expected.second.metrics["loss/answer/entropy_bonus"]
    )
    for overrides in TRAINER_LAYOUTS[num_ranks]:
        found = _trainer_steps(f"{folder}/{DENSE}", overrides)
        for name in ("first", "second"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert ours.metrics.keys() == theirs.metrics.keys()
            for key, value in theirs.metrics.items():
                assert ours.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (overrides, name, key)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=TOLERANCE), (overrides, name)
        trainer_cases.check_tokens(found, expected, overrides)
        for key, weight in found.between.items():
            gap = (weight - expected.between[key]).abs().max().item()
            assert gap < STEP_TOLERANCE * LEARNING_RATE, f"{overrides}: {key} differs by {gap} after a step"


def _check(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    for kind in ("logprobs", "entropies"):
        for index, values in found[kind].items():
            error = relative_error(values, expected[kind][index])
            assert error < TOLERANCE, f"{name}: {kind} of sequence {index} differ by {error}"
    assert all(values == expected["tops"][index] for index, values in found["tops"].items()), name
    assert found["result"].metrics["loss"] == pytest.approx(expected["result"].metrics["loss"], rel=TOLERANCE), name
    assert found["result"].grad_norm == pytest.approx(expected["result"].grad_norm, rel=TOLERANCE), name
    assert found["weights"].keys() == expected["weights"].keys(), name
    assert found["kept"] == expected["kept"], f"{name}: others are frozen"
    for key, gradient in found["gradients"].items():
        error = relative_error(gradient, expected["gradients"][key])
        assert error < TOLERANCE, f"{name}: the gradient of {key} differs by {error}"
    for key, weight in found["weights"].items():
        gap = (weight - expected["weights"][key]).abs().max().item()
        assert gap < STEP_TOLERANCE * LEARNING_RATE, f"{name}: {key} differs by {gap} after a step"


def _check_replayed(folder: str, num_ranks: int) -> None:
    """Experts that no router would choose: every rank finds those of its tokens and layers, in every pass."""
    if num_ranks == 1:
        torch.save(_one_step(f"{folder}/{MIXTURE}", (PLAIN,), BUDGET, given=True), f"{folder}/replayed.pt")
    expected = torch.load(f"{folder}/replayed.pt", weights_only=False)
    own = torch.load(f"{folder}/{MIXTURE}.pt", weights_only=False)
    assert relative_error(expected["logprobs"][4], own["logprobs"][4]) > 1e-2, "they are others than its own"
    for number, overrides in enumerate(REPLAYED[num_ranks]):
        name = f"{' '.join(overrides)} on {num_ranks} ranks, replayed"
        found = _one_step(f"{folder}/{MIXTURE}", (*overrides, PLAIN), BUDGET, number % 2 == 0, given=True)
        _check(found, expected, name)
        agreed = torch.tensor(found["agreed"])
        torch.distributed.all_reduce(agreed)
        assert int(agreed) == expected["agreed"], name


def _walk(rank: int, num_ranks: int, folder: str, every_way: bool) -> None:
    """All layouts of this number of ranks: each of a layout's families in all ways, or in one, by turns. One rank also
    writes what the others are compared with."""
    if num_ranks == 1:
        for family in (UNTIED, *EVERY, RECURRENT, RECURRENT_MIXTURE):
            torch.save(_one_step(f"{folder}/{family}", (PLAIN,), BUDGET), f"{folder}/{family}.pt")
            if family != UNTIED:
                torch.save(_one_step(f"{folder}/{family}", (PLAIN, FROZEN), BUDGET), f"{folder}/{family}.frozen.pt")
        _check_packing(folder)
    if num_ranks in (1, *TRAINER_LAYOUTS):
        _check_trainer(folder, num_ranks)
    _check_replayed(folder, num_ranks)
    for number, (families, overrides) in enumerate(LAYOUTS[num_ranks]):
        ways = _ways(overrides, num_ranks, number)
        for turn, family in enumerate(families, number):
            frozen = ".frozen" if FROZEN in overrides else ""
            expected = torch.load(f"{folder}/{family}{frozen}.pt", weights_only=False)
            for options, budget, share in ways if every_way else [ways[turn % len(ways)]]:
                name = f"{family} on {num_ranks} ranks, {' '.join(options)}, shared {share}"
                _check(_one_step(f"{folder}/{family}", options, budget, share), expected, name)
                assert psutil.Process().num_threads() < MAX_THREADS, f"{name}: earlier layouts left their groups"


def _ways(overrides: tuple[str, ...], num_ranks: int, number: int) -> list[tuple[tuple[str, ...], int, bool]]:
    """Options, budget of a row, and whether prefixes are shared, as they are in rows of BUDGET tokens.

    Without a distributed optimizer, where every rank has whole gradients to compare; on few ranks also with it."""
    plain = (*overrides, PLAIN) if PLAIN not in overrides else overrides
    budget = (BUDGET, SMALL_BUDGET)[number % 2]
    ways = [(plain, BUDGET, True), (plain, budget, False)]
    return ways if num_ranks > 2 or overrides == plain else [*ways, (overrides, BUDGET, number % 2 == 0)]


def _check_packing(folder: str) -> None:
    """Rows of one sequence each, and one row of all, are the same to the policy as the rows between."""
    expected = torch.load(f"{folder}/{DEEPSTACK}.pt", weights_only=False)
    counts = [expected["num_rows"]]
    for budget in (SMALL_BUDGET, 1024):
        found = _one_step(f"{folder}/{DEEPSTACK}", (PLAIN,), budget)
        counts.append(found["num_rows"])
        _check(found, expected, f"rows of {budget} tokens")
    assert len(set(counts)) == 3 and counts[2] == 1, counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("layouts")
    for family in (UNTIED, *EVERY, RECURRENT, RECURRENT_MIXTURE):
        create_family(folder / family, family)
    return str(folder)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_layout_changes_no_number(num_ranks: int, folder: str) -> None:
    run_ranks(num_ranks, _walk, folder, False)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_layout_changes_no_number_in_any_way(num_ranks: int, folder: str) -> None:
    run_ranks(num_ranks, _walk, folder, True)
