"""What two objectives credit of a saved step: against the loss' own gradient, and against numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.objective import stream_loss
from megatron_sr1.packing import gather_rows
from megatron_sr1.ranks import ALONE
from megatron_sr1.report.credit.numbers import Shift, Signs
from megatron_sr1.streams import preset_of
from megatron_sr1.training.batches import Batcher, optimizer_shares
from megatron_sr1.training.credit import Aligned, ResponseKey, settled, signs, step_credit
from megatron_sr1.training.ledger import slots_of
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.payload import share_responses
from megatron_sr1.training.saved_step import SavedStep
from megatron_sr1.types import LossInputs, Prompt, Reading, Rollout, RolloutGroup, RolloutPair
from tests.batch_cases import GOOD, their_rewards, two_groups
from tests.credit_cases import SavedRun, Saver, write

ROOT = 1 / math.sqrt(2)  # the z-score of the better of two samples
EXACT: dict[str, Any] = {"abs": 1e-7, "rel": 1e-4}  # eps is added to a spread
NO_FORMAT = "objective.format_weight=0"


@pytest.fixture
def saver(tmp_path: Path, tiny_model_dir: str) -> Saver:
    return Saver(tmp_path, tiny_model_dir)


def rewards(**changes: list[float]) -> dict[str, torch.Tensor]:
    return their_rewards() | {name: torch.tensor(values) for name, values in changes.items()}


def read_back(saver: Saver, run: SavedRun) -> Any:
    step = SavedStep.read(run.folder / "rollouts", 0, saver.processor.image_token_id)
    return step.recorded(run.preset, saver.processor, run.config.objective.cut_responses)


# ---------------------------------------------------------------- the credit itself
def by_gradient(saver: Saver, run: SavedRun) -> dict[ResponseKey, torch.Tensor]:
    """Minus the gradient of the loss with respect to each log-prob, as the trainer's rows make it."""
    batcher = Batcher(run.config, saver.processor, ALONE)
    ledger, places = run.rollouts.trained
    advantages = step_advantages(ledger, run.preset, run.config.objective)
    slots, found = slots_of(run.preset), {}
    for share in optimizer_shares(places, run.config):
        part, each = ledger.of(share), ledger.num_samples
        own = share_responses(part, slots, 1)[0]
        tracks = [run.rollouts.tracks[int(part.number[place.group])][place.sample, place.slot] for place in own]
        rows = batcher.rows(part, own, tracks, run.rollouts.prompts, run.preset, 0)
        batch = batcher.streams(rows, advantages[:, share.start * each : share.stop * each], run.preset)
        gradients = []
        for micro, tokens, advantage in zip(batch.micro_batches, batch.tokens, batch.advantages, strict=True):
            logprobs = tokens.generator_logprobs.clone().requires_grad_()
            inputs = LossInputs(
                logprobs, None, None, advantage, tokens.token_weights, run.preset.streams, micro.row_sequence
            )
            stream_loss(inputs)[0].backward()
            assert logprobs.grad is not None
            gradients.append(-logprobs.grad)
        for place, gradient in zip(own, gather_rows(gradients, batch.micro_batches, len(own)), strict=True):
            slot = slots[place.slot]
            number = int(part.number[place.group])
            later = slot.pass_name != "first"
            found[ResponseKey(number, place.sample, later, slot.pass_name, slot.number)] = gradient
    return found


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("name", ["vision_sr1", "perception_credit", "summed", "gdpo", "see_think"])
def test_credit_is_what_the_loss_gives_a_log_prob(saver: Saver, name: str, aggregation: str, batch_size: int) -> None:
    words = (f"objective.preset={name}", f"objective.aggregation={aggregation}", f"train.batch_size={batch_size}")
    run = saver.save(*words, rewards=their_rewards())
    ours = step_credit(read_back(saver, run), run.preset, run.config)
    theirs = by_gradient(saver, run)
    assert ours.keys() == theirs.keys() and any(bool(credit.any()) for credit in ours.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key].float(), gradient, rtol=1e-5, atol=1e-9)


def test_the_surrogates_agree_where_no_weight_has_moved(saver: Saver) -> None:
    words = "objective.surrogate=sapo", "objective.advantage=centred"
    sapo = saver.save(*words, rewards=their_rewards())
    for key, gradient in by_gradient(saver, sapo).items():
        ours = step_credit(sapo.rollouts, sapo.preset, sapo.config)[key].float()
        torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-9)


def test_several_samples_of_a_later_pass_have_their_own_credit(saver: Saver) -> None:
    groups = two_groups(saver.processor)
    second = groups[0].pairs[0].second
    assert second is not None

    def more(pair: RolloutPair) -> RolloutPair:
        if pair.second is None:
            return pair
        other = replace(second, rollout_id="other")
        return replace(pair, further=(Reading("second", 1, other, pair.description),))

    groups = [replace(group, pairs=tuple(map(more, group.pairs))) for group in groups]
    visual = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    words = ("objective.passes=[{name: second, samples: 2}]", NO_FORMAT)
    run = saver.save(*words, rewards={**their_rewards(), "acc_vis": visual, "fmt_vis": visual}, groups=groups)
    ours = step_credit(read_back(saver, run), run.preset, run.config)
    assert len(ours) == 4 + 6
    for key, gradient in by_gradient(saver, run).items():
        torch.testing.assert_close(ours[key].float(), gradient, rtol=1e-5, atol=1e-9)
    one, other = (ours[ResponseKey(0, 0, True, "second", number)] for number in (0, 1))
    assert (one > 0).all() and (other < 0).all()
    report = run.credit("see_think")
    assert {response.number for one in report.samples for response in one.responses} == {0, 1}


# ---------------------------------------------------------------- two objectives
def test_a_sum_cancels_what_two_streams_tell_apart(saver: Saver) -> None:
    """Group 0: answer 1, 0 and visual 0, 1. Group 1: 1, 0 for both; its last sample has no second pass."""
    run = saver.save(NO_FORMAT, rewards=their_rewards())
    report = run.credit("summed")
    n1, n2 = saver.lengths(run.rollouts.groups), saver.lengths(run.rollouts.groups, second=True)
    first, second = n1 / n1.sum(), n2 / n2.sum()  # shares of the tokens of each pass
    assert report.sides[0].pairs[0].names == ("answer", "visual")
    assert report.sides[0].pairs[0].advantages == Signs(2, 2, 0, 0, 0)
    assert report.sides[1].pairs == ()
    assert ([line.dead for line in report.sides[0].streams], report.sides[0].dead) == ([0, 0], 0)
    assert ([line.dead for line in report.sides[1].streams], report.sides[1].dead) == ([1], 1)
    same, gone, extra = (int(n1[2:].sum()), int(n1[:2].sum()), int(n2.sum()))
    found = report.comparison
    assert found.tokens.signs == Signs(same=same, opposite=0, only_first=gone + extra, only_second=0, neither=0)
    assert found.samples.signs == Signs(same=2, opposite=0, only_first=2, only_second=0, neither=0)
    assert report.num_tokens == int(n1.sum() + n2.sum())
    mass = ROOT * float(first[2:].sum())
    assert found.masses == (pytest.approx(ROOT, **EXACT), pytest.approx(mass, **EXACT))
    # of A half lies on the second pass; of the first, of which B has group 1 alone, it has half of each share
    stays = 0.5 * float(first[2:].sum())
    assert found.moved == pytest.approx(1 - stays, **EXACT)
    # group 1: from 1/2 A to A. group 0 and the second pass: to 0
    better = int(n1[1] + n1[2] + n2[0])
    worse = int(n1[0] + n1[3] + n2[1] + n2[2])
    assert (found.tokens.gained, found.tokens.lost) == (better, worse)
    changes = [ROOT / 2 * float(first[k] + second[k]) for k in range(4)]  # a token of group 1 gains what it had
    keys = [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    order = sorted(zip(changes, keys, strict=True), key=lambda pair: -pair[0])
    assert [one.change for one in report.samples] == pytest.approx([change for change, _ in order], **EXACT)
    by_key = {(one.key, one.sample): one for one in report.samples}
    assert by_key.keys() == set(keys)
    shown = by_key["p0", 0]
    wanted = ROOT / 2 * float(first[0] - second[0])
    assert shown.credits == (pytest.approx(wanted, **EXACT), 0.0)
    assert shown.advantages[0] == pytest.approx({"answer": ROOT, "visual": -ROOT}, **EXACT)
    assert shown.advantages[1] == {"answer": 0.0}
    assert (shown.rewards["acc"], shown.rewards["acc_vis"]) == (1.0, 0.0)


def test_tokens_that_lose_and_gain_are_told_by_their_segment(saver: Saver) -> None:
    """`perception_credit` gives the description of group 0 the visual reward, whose sign is the answer's opposite."""
    run = saver.save("objective.preset=see_think", NO_FORMAT, rewards=their_rewards())
    report = run.credit("perception_credit")
    words = {(region.pass_name, region.segment): region for region in report.regions}
    assert {name for name, _ in words} == {"first"}  # neither scores a second pass
    description, think = words["first", "description"], words["first", "think"]
    ids = saver.processor.response_ids(GOOD)
    block = (GOOD.index("<description>"), GOOD.index("</description>") + len("</description>"))
    each = sum(saver.processor.segment_mask(ids, block))
    assert description.num_tokens == 3 * each
    assert (description.gained, description.lost) == (2 * each, each)  # up: those whose visual advantage is positive
    assert report.comparison.tokens.signs.opposite == 2 * each
    assert think.gained + think.lost == think.num_tokens
    pieces = report.samples[0].responses[0].pieces
    text = "".join(piece.text for piece in pieces)
    assert text == saver.processor.decode(ids) and len({piece.credits for piece in pieces}) == 2


@pytest.mark.parametrize("name", ["vision_sr1", "gdpo", "perception_credit"])
def test_an_objective_agrees_with_itself(saver: Saver, name: str) -> None:
    run = saver.save(f"objective.preset={name}", rewards=their_rewards())
    report = run.credit(name)
    assert report.sides[0].streams == report.sides[1].streams
    for shift in (report.comparison.samples, report.comparison.tokens):
        assert (shift.gained, shift.lost) == (0, 0)
        assert (shift.signs.opposite, shift.signs.only_first, shift.signs.only_second) == (0, 0, 0)
        assert shift.signs.same > 0
    assert report.comparison.moved == 0 and report.samples == ()
    assert report.comparison.masses[0] == report.comparison.masses[1] > 0


# ---------------------------------------------------------------- switches
def switched(run: SavedRun, name: str, against: str = "see_think") -> Any:
    return {switch.name: switch for switch in run.credit(against).sides[0].switches}[name]


def test_the_leak_filter_takes_a_visual_reward_away(saver: Saver) -> None:
    """In group 1 the right sample leaks: nobody earns a visual reward any more. The other has no second pass."""
    run = saver.save(NO_FORMAT, rewards=rewards(leak=[0.0, 0.0, 1.0, 0.0]))
    switch = switched(run, "leak filter")
    n1, n2 = saver.lengths(run.rollouts.groups), saver.lengths(run.rollouts.groups, second=True)
    assert switch.here == "off"
    assert switch.effect.tokens.signs == Signs(int(n1.sum() + n2[:2].sum()), 0, int(n2[2]), 0, 0)
    assert switch.effect.samples.signs == Signs(4, 0, 0, 0, 0)
    after = ROOT * (0.5 + 0.5 * float(n2[:2].sum() / n2.sum()))
    assert switch.effect.masses == (pytest.approx(ROOT, **EXACT), pytest.approx(after, **EXACT))
    filtered = run.credit(run.objective("{leak_filter: true}"))
    assert [line.dead for line in filtered.sides[0].streams] == [0, 0]
    assert [line.dead for line in filtered.sides[1].streams] == [0, 1]
    assert filtered.comparison == switch.effect
    assert [one.here for one in filtered.sides[1].switches] == ["on", "z_score"]


def test_the_leak_filter_turns_a_sum(saver: Saver) -> None:
    """Group 0 of `summed`: 1.0 against 1.1; without the leaking visual reward 1.0 against 0.1."""
    run = saver.save("objective.preset=summed", rewards=rewards(leak=[0.0, 1.0, 0.0, 0.0]))
    effect = switched(run, "leak filter").effect
    n1 = saver.lengths(run.rollouts.groups)
    assert effect.samples == Shift(Signs(2, 2, 0, 0, 0), gained=1, lost=1)
    assert effect.tokens == Shift(Signs(int(n1[2:].sum()), int(n1[:2].sum()), 0, 0, 0), int(n1[0]), int(n1[1]))


STREAM = "[{name: answer, rewards: {acc: 1.0, fmt: 2.0}, normalize: per_component}]"


def test_without_the_std_a_narrow_reward_loses_its_weight(saver: Saver) -> None:
    """acc 1, 0 against fmt 0, 0.4 of weight 2: z-scores 1 against 2, centred 0.5 against 0.4. Group 1: fmt alone."""
    found = rewards(acc=[1.0, 0.0, 1.0, 1.0], fmt=[0.0, 0.4, 0.4, 0.0])
    run = saver.save("objective.preset=see_think", f"objective.streams={STREAM}", rewards=found)
    switch = switched(run, "no std")
    n1 = saver.lengths(run.rollouts.groups)
    share = n1 / n1.sum()
    assert switch.here == "z_score"
    assert switch.effect.samples.signs == Signs(same=2, opposite=2, only_first=0, only_second=0, neither=0)
    assert switch.effect.tokens.signs == Signs(int(n1[2:].sum()), int(n1[:2].sum()), 0, 0, 0)
    before = ROOT * float(share[:2].sum() + 2 * share[2:].sum())
    after = 0.1 * float(share[:2].sum()) + 0.4 * float(share[2:].sum())
    assert switch.effect.masses == (pytest.approx(before, **EXACT), pytest.approx(after, **EXACT))
    assert switch.effect.moved == pytest.approx(abs(float(share[:2].sum()) * (ROOT / before - 0.1 / after)), **EXACT)


def test_an_objective_without_a_std_is_compared_with_the_z_score(saver: Saver) -> None:
    run = saver.save("objective.advantage=centred", rewards=their_rewards())
    switch = switched(run, "no std")
    assert switch.here == "centred"
    z_score = run.credit("vision_sr1", run.objective("{advantage: z_score}"))
    assert switch.effect.masses == (z_score.comparison.masses[0], z_score.comparison.masses[1])
    assert switch.effect.masses[0] > switch.effect.masses[1]


# ---------------------------------------------------------------- odd steps
def test_a_masked_cut_response_has_no_credit(saver: Saver) -> None:
    groups = two_groups(saver.processor)
    cut = replace(groups[0].pairs[0], first=replace(groups[0].pairs[0].first, finish_reason="length"))
    groups[0] = replace(groups[0], pairs=(cut, *groups[0].pairs[1:]))
    run = saver.save("objective.preset=see_think", rewards=their_rewards(), groups=groups)
    report = run.credit(run.objective("{cut_responses: mask}"))
    n1 = saver.lengths(groups)
    assert report.comparison.tokens.signs == Signs(int(n1[1:].sum()), 0, int(n1[0]), 0, 0)
    assert report.comparison.masses == (pytest.approx(ROOT, **EXACT), pytest.approx(ROOT, **EXACT))
    assert [response.cut for one in report.samples for response in one.responses].count(True) == 1


def test_a_prompt_without_images_has_no_visual_credit(saver: Saver) -> None:
    groups = two_groups(saver.processor)
    plain = r"<think> 3 + 7 = 10 </think> \boxed{10}"
    prompt = Prompt("text", "What is 3 + 7?", "10")
    ids = saver.processor.prompt_ids(prompt.problem, 0)
    texts = (plain, r"\boxed{9}")
    pairs = []
    for number, text in enumerate(texts):
        own = saver.processor.response_ids(text)
        rollout = Rollout(f"2/{number}", ids, own, text, (-0.1,) * len(own), "stop", 0)
        pairs.append(RolloutPair(number, rollout, None, None))
    groups.append(RolloutGroup(2, prompt, tuple(pairs)))
    run = saver.save("train.batch_size=3", groups=groups)
    assert [read_back(saver, run).ledger.num_images.tolist()] == [[1, 1, 0]]
    ours, theirs = step_credit(read_back(saver, run), run.preset, run.config), by_gradient(saver, run)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key].float(), gradient, rtol=1e-5, atol=1e-9)
    report = run.credit("perception_credit")
    (pair,) = report.sides[0].pairs
    assert pair.advantages.total == 6 and pair.advantages.only_first >= 2  # both samples of it
    assert {one.key for one in report.samples} >= {"text"}


def test_two_images_are_two(saver: Saver) -> None:
    groups = two_groups(saver.processor)
    images = (Image.new("RGB", (56, 28)), Image.new("RGB", (28, 28)))
    ids = saver.processor.expand(
        saver.processor.prompt_ids("Both?", 2), [saver.processor.grid(image.size) for image in images]
    )
    pairs = tuple(replace(pair, first=replace(pair.first, prompt_ids=ids)) for pair in groups[0].pairs)
    groups[0] = replace(groups[0], prompt=replace(groups[0].prompt, images=images), pairs=pairs)
    run = saver.save(rewards=their_rewards(), groups=groups)
    assert read_back(saver, run).ledger.num_images.tolist() == [2, 1]


def test_a_group_that_was_dropped_is_credited_nothing_and_counts_among_the_dead(saver: Saver) -> None:
    """Dynamic sampling: three prompts drawn for two places, the first dropped, whose rewards are all the same."""
    two = two_groups(saver.processor)
    groups = [*two, replace(two[0], group_id=2, prompt=replace(two[0].prompt, key="p2"))]
    found = {name: torch.cat([torch.ones(2), value]) for name, value in their_rewards().items()}
    config = ("rollout.prompts_per_step=2", "train.batch_size=2", "rollout.dynamic_sampling=1")
    run = saver.save(*config, rewards=found, groups=groups, places=[None, 0, 1], rounds=1)
    report = run.credit("see_think")
    assert (report.num_drawn, report.num_graded, report.num_trained) == (3, 3, 2)
    assert ([line.dead for line in report.sides[0].streams], report.sides[0].dead) == ([1, 1], 1)
    assert {one.key for one in report.samples} == {"p1", "p2"}
    assert any("dynamic sampling" in note for note in report.notes)


def test_a_skipped_group_is_left_out_and_named(saver: Saver) -> None:
    groups = [
        replace(group, group_id=number) for group, number in zip(two_groups(saver.processor), (0, 2), strict=True)
    ]
    config = ("rollout.prompts_per_step=3", "train.batch_size=1")
    changes: dict[str, Any] = {"skipped": {1: "it is spoiled"}, "places": [0, 2]}
    run = saver.save(*config, rewards=their_rewards(), groups=groups, **changes)
    report = run.credit("summed")
    assert report.skipped == {1: "it is spoiled"} and (report.num_drawn, report.num_graded) == (3, 2)
    ours = step_credit(read_back(saver, run), run.preset, run.config)  # the second optimizer step is empty
    assert {key.group for key in ours} == {0, 2}
    alone = saver.lengths(groups[:1])
    assert float(ours[ResponseKey(0, 0, False, "first", 0)][0]) == pytest.approx(
        0.5 * ROOT / float(alone.sum()), **EXACT
    )
    assert any("several optimizer steps" in note for note in report.notes)


def test_a_step_of_several_ranks_is_one(saver: Saver) -> None:
    run = saver.save(rewards=their_rewards())
    whole = run.credit("summed")
    (run.folder / "rollouts" / "step_000000.0-of-1.jsonl.gz").unlink()
    ledger = replace(run.rollouts.ledger, holder=torch.tensor([1, 0]))
    for rank, group in ((0, 1), (1, 0)):
        held = replace(run.rollouts, ledger=ledger, groups=[run.rollouts.groups[group]])
        write(replace(run, rollouts=held), rank)
    parts = sorted((run.folder / "rollouts").iterdir())
    assert len(parts) == 2 and run.credit("summed") == whole
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"its parts are step_000000.0-of-2.jsonl.gz, which are not all"):
        run.credit("summed")


# ---------------------------------------------------------------- rewards that are not there
def test_a_layout_that_was_not_measured_is_graded_from_the_text(saver: Saver) -> None:
    groups = two_groups(saver.processor)
    second = groups[0].pairs[1].second
    assert second is not None
    text = r"no layout \boxed{10}"
    ids = saver.processor.response_ids(text)
    broken = replace(second, response_text=text, response_ids=ids, generator_logprobs=(-0.1,) * len(ids))
    groups[0] = replace(groups[0], pairs=(groups[0].pairs[0], replace(groups[0].pairs[1], second=broken)))
    lacking = saver.save("objective.preset=see_think", groups=groups)
    assert "fmt_vis" not in lacking.rollouts.ledger.rewards
    report = lacking.credit("see_think", "vision_sr1")
    assert report.sides[0].recomputed == ("fmt_vis",) and report.sides[1].recomputed == ()
    assert any("fmt_vis" in note and "graded again" in note for note in report.notes)
    having = saver.save("objective.preset=vision_sr1", groups=groups)
    assert having.rollouts.ledger.rewards["fmt_vis"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert having.credit("see_think").comparison == report.comparison


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("external_reasoner", r"external_reasoner: .*step_000000.jsonl has no reward 'acc_judge'.*asks a judge.*Leave"),
        ("vision_r1", r"vision_r1: .*asked by other templates"),
        ("no_preset", r"--against no_preset: neither a preset nor a file. Presets are vision_r1, "),
        ("{kl_in: reward, kl_estimator: k1, kl_coef: 0.1}", r"stream 'answer' has kl_in=reward.*kl_in: loss"),
        ("{passes: [{name: blind, context: nothing}]}", r"the pass 'blind' was another one, or none"),
        ("vppo", r"vppo: .*stream 'answer' weighs or earns by its contrast 'masked', which takes the weights"),
        ("{loss: 'my.py:loss'}", r"objective.loss='my.py:loss' takes the place of our loss"),
        ("{streams: [{name: answer, tokens: nothing}]}", r"tokens='nothing' is no segment"),
        ("{leak_filtre: true}", r"objective-0.yaml: .*leak_filtre"),
        ("", r"objective-0.yaml has no section objective"),
    ],
)
def test_what_cannot_be_credited_is_refused(saver: Saver, objective: str, message: str) -> None:
    run = saver.save(rewards=their_rewards())
    named = objective if objective.isidentifier() else run.objective(objective)
    with pytest.raises(ValueError, match=message):
        run.credit(named)


def test_a_schedule_counts_as_at_the_step(saver: Saver) -> None:
    """Step 0 is where it begins: a weight that rises from 0 credits nothing, whatever it ends at."""
    run = saver.save(rewards=their_rewards())
    begins = "{streams: [{name: answer, loss_weight: {from: %s, to: 1.0, steps: 9}}, {name: visual, enabled: false}]}"
    report = run.credit(run.objective(begins % 0.0), run.objective(begins % 1.0))
    assert [stream.loss_weight for side in report.sides for stream in side.streams] == [1.0, 0.0]


def test_functions_that_look_at_images_are_refused(saver: Saver) -> None:
    run = saver.save(rewards=their_rewards())
    mine = run.folder / "mine.py"
    mine.write_text("def short(pair, prompt):\n    return 1.0\ndef spans(text, prompt):\n    return []\n")
    with pytest.raises(ValueError, match=r"mine.py:short'.*neither images nor metadata.*--rollouts-only"):
        run.credit(run.objective(f"{{streams: [{{name: brevity, rewards: {{'{mine}:short': 1.0}}}}]}}"))
    with pytest.raises(ValueError, match=r"stream 'answer' credits tokens='.*mine.py:spans'.*segments by name"):
        run.credit(run.objective(f"{{streams: [{{name: answer, tokens: '{mine}:spans'}}]}}"))


def test_steps_and_folders_that_do_not_fit_are_refused(saver: Saver, tiny_model_dir: str) -> None:
    run = saver.save(rewards=their_rewards())
    with pytest.raises(ValueError, match=r"rollouts has no rollouts of step 7. It has 0: name one"):
        run.credit("summed", step=7)
    with pytest.raises(ValueError, match=r"nowhere is not the folder of a GRPO run"):
        replace(run, folder=run.folder / "nowhere").credit("summed")
    config = run.folder / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("samples_per_prompt: 2", "samples_per_prompt: 4"))
    with pytest.raises(ValueError, match=r"has 2 prompts x 2 samples, and .*samples_per_prompt=4.*config.0.yaml"):
        run.credit("summed")
    config.write_text(text.replace(tiny_model_dir, "/no/model"))
    with pytest.raises(ValueError, match=r"model.hf_dir='/no/model' of .*config.yaml is no folder"):
        run.credit("summed")
    config.write_text(text)
    empty = run.folder / "rollouts" / "step_000003.jsonl"
    empty.write_text('{"group_id": 0, "skipped": "it is spoiled"}\n')
    with pytest.raises(ValueError, match=r"none of its 1 groups could be graded: it is spoiled. Choose another"):
        run.credit("summed", step=3)
    for damaged, why in (
        ("[1]", "line 1: it is no sample"),
        ('{"sam', "line 1: "),
        ('{"sample": 1}', "lacks 'answer'"),
    ):
        empty.write_text(f"{damaged}\n")
        with pytest.raises(ValueError, match=rf"step_000003.jsonl.*{why}.*damaged"):
            run.credit("summed", step=3)
    for path in (run.folder / "rollouts").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="It has none"):
        run.credit("summed")


def test_a_step_with_a_reward_that_is_not_finite_credits_nothing(saver: Saver) -> None:
    with pytest.raises(ValueError, match=r"000000.jsonl: the reward 'acc' gave nan for response 0.*is skipped"):
        saver.save(rewards=rewards(acc=[math.nan, 1.0, 0.0, 1.0])).credit("summed")


def test_another_tokenizer_is_refused(saver: Saver) -> None:
    run = saver.save(rewards=their_rewards())
    groups = two_groups(saver.processor)
    pair = groups[0].pairs[0]
    other = replace(pair, first=replace(pair.first, response_text="another text"))
    saver.save(rewards=their_rewards(), groups=[replace(groups[0], pairs=(other, groups[0].pairs[1])), groups[1]])
    with pytest.raises(ValueError, match=r"tokenizer of model.hf_dir reads its ids as another text"):
        run.credit("summed")


# ---------------------------------------------------------------- objectives
def test_a_preset_is_without_the_runs_streams_and_a_file_changes_the_runs(saver: Saver) -> None:
    changed = "objective.streams=[{name: visual, loss_weight: 2.0}]"
    run = saver.save(changed, "objective.aggregation=sequence_mean", rewards=their_rewards())
    base = run.folder / "base.yaml"
    base.write_text("objective: {advantage: centred}\ntrain: {batch_size: 7}\n")
    file = run.folder / "over.yaml"
    file.write_text("base: [base.yaml]\nobjective: {streams: [{name: answer, loss_weight: 3.0}]}\n")
    report = run.credit("vision_sr1")
    assert [line.loss_weight for line in report.sides[0].streams] == [0.5, 2.0]
    assert [line.loss_weight for line in report.sides[1].streams] == [0.5, 0.5]
    assert report.sides[1].streams[0].how == "z_score, group, sum, sequence_mean"
    layered = run.credit(str(file)).sides[1]
    assert [line.loss_weight for line in layered.streams] == [3.0, 0.5]
    assert layered.streams[0].how == "centred, group, sum, sequence_mean"
    config = load_config(run.folder / "config.yaml", [], objective=file)
    assert config.train.batch_size == 2 and preset_of(config).streams[0].loss_weight == 3.0
    file.write_text("train: {batch_size: 1}\n")
    with pytest.raises(ConfigError, match="has no section objective"):
        load_config(run.folder / "config.yaml", [], objective=file)


# ---------------------------------------------------------------- arithmetic
def test_signs_and_what_cancels() -> None:
    first = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 0.0, -2.0], dtype=torch.float64)
    second = torch.tensor([3.0, -1.0, -1.0, 0.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    assert signs(first, second) == Signs(same=2, opposite=1, only_first=2, only_second=1, neither=1)
    sums = torch.tensor([1e-9, 1e-9, -0.5], dtype=torch.float64)
    assert settled(sums, torch.tensor([1.0, 1e-9, 0.5], dtype=torch.float64)).tolist() == [0.0, 1e-9, -0.5]


def test_a_sample_whose_tokens_cancel_has_no_credit() -> None:
    key = ResponseKey(0, 0, False, "first", 0)
    other = ResponseKey(0, 0, True, "second", 0)
    credit = {key: torch.tensor([0.1, 0.2], dtype=torch.float64), other: torch.tensor([-0.3], dtype=torch.float64)}
    nothing = {key: torch.zeros(2, dtype=torch.float64)}
    aligned = Aligned.of(credit, nothing)
    assert aligned.of_samples().tolist() == [[0.0], [0.0]] and aligned.changes().tolist() == [pytest.approx(0.6)]
    found = aligned.compared()
    assert found.samples.signs == Signs(0, 0, 0, 0, 1) and found.tokens.signs == Signs(0, 0, 3, 0, 0)
    assert found.masses == (pytest.approx(0.6), 0.0) and found.moved == 1.0
    assert Aligned.of(nothing, nothing).compared().moved == 0.0
