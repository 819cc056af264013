"""Operations of a forward pass against torch's own count of transformers' models."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sr1.ahead import Later
from megatron_sr1.config import load_config, typical_tokens
from megatron_sr1.config.rollout import TYPICAL
from megatron_sr1.encoded_image import EncodedImage, Normalisation
from megatron_sr1.estimate.arithmetic import training_flops
from megatron_sr1.estimate.flops import Flops, image_flops, sequence_flops
from megatron_sr1.estimate.step_flops import pass_flops, step_flops
from megatron_sr1.packing import pack
from megatron_sr1.platform.usage import peak_flops
from megatron_sr1.policy.read import read_architecture
from megatron_sr1.policy.work import PassWork, StepWork, Work
from megatron_sr1.types import TokenSequence
from tests.model_zoo import ZOO, create_family

MODELS = sorted((Path(__file__).parent.parent / "examples" / "models").glob("*/config.json"))


def _meta_model(folder: Path) -> Any:
    """As published, without memory; eager attention, whose products are all counted."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])._from_config(config, attn_implementation="eager")


def _counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ZOO)
def test_small_models_of_every_family_on_real_tensors(family: str, tmp_path: Path) -> None:
    """Mixtures route their tokens, windows are cut at the edges of an image, and some tokens alone are scored."""
    import transformers

    folder = create_family(tmp_path / family, family)
    architecture = read_architecture(str(folder))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.arange(128)[None] % 50 + 3  # a whole number of a recurrent layer's chunks
    with_head = _counted(lambda: model(input_ids=ids, logits_to_keep=17))
    assert with_head == pytest.approx(sequence_flops(architecture, 128, 17, causal=False).total, rel=0.02)
    grid = (1, 10, 14)  # neither side is a number of whole windows
    patches = torch.randn(
        140, architecture.hf.vision_config.temporal_patch_size * 3 * config.vision_config.patch_size**2
    )
    tower = _counted(lambda: model.model.visual(patches, grid_thw=torch.tensor([grid])))
    assert tower == pytest.approx(image_flops(architecture, grid).total, rel=0.02)


@pytest.mark.parametrize("family", ["qwen2_5_vl_tied", "qwen3_vl_moe"])
def test_a_step_forward_and_backward_of_texts_and_images(family: str, tmp_path: Path) -> None:
    """What a run reports as `flops`, of rows as they are trained: packed, padded, text and image, and some tokens that
    the loss does not look at."""
    import transformers

    folder = create_family(tmp_path / family, family)
    architecture, hf = read_architecture(str(folder)), transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, hf.architectures[0]).from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    grid, merged = (1, 10, 14), hf.vision_config.spatial_merge_size**2
    image = EncodedImage(grid, Later(lambda: torch.zeros(0)), Normalisation(1.0, (0.0,) * 3, (1.0,) * 3))
    visual = 140 // merged
    seen = TokenSequence([5, *[hf.image_token_id] * visual, 6, 7], list(range(10, 40)), (image,))
    plain = TokenSequence(list(range(8, 61)), list(range(9, 26)), ())
    where = {"image_token_id": hf.image_token_id, "merge_size": hf.vision_config.spatial_merge_size}
    rows = pack([seen, plain], max_tokens=256, row_multiple=64, **where)
    work = Work(trains_vision=True)
    work.add(rows, trains=True)
    work.add(rows, trains=False)
    forward, trained = work.take()
    values = hf.vision_config.temporal_patch_size * 3 * hf.vision_config.patch_size**2
    pixels = {"pixel_values": torch.randn(140, values), "image_grid_thw": torch.tensor([grid])}

    def scored(sequence: TokenSequence, **images: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        kinds = {"mm_token_type_ids": (ids == hf.image_token_id).int()} if images else {}
        return model(input_ids=ids, logits_to_keep=len(sequence.response_ids), **images, **kinds).logits

    counted = _counted(lambda: (scored(seen, **pixels), scored(plain)))
    with FlopCounterMode(display=False) as counter:
        (scored(seen, **pixels).sum() + scored(plain).sum()).backward()
    whole = counter.get_total_flops()
    assert step_flops(architecture, forward, PassWork(), causal=False) == pytest.approx(counted, rel=0.02)
    assert step_flops(architecture, PassWork(), trained, causal=False) == pytest.approx(whole, rel=0.02)
    assert step_flops(architecture, forward, trained, causal=False) == pytest.approx(counted + whole, rel=0.02)
    both = sum(len(one.prompt_ids) + len(one.response_ids) for one in (seen, plain))
    assert trained.tokens == both < sum(len(row.input_ids) for row in rows), "padding is nobody's work"


def test_a_prompt_that_is_shared_is_counted_once_and_what_is_frozen_has_no_gradient() -> None:
    model = read_architecture(str(MODELS[0].parent))
    prompt, responses = list(range(3, 43)), [list(range(50, 60)), list(range(70, 95))]
    where = {"max_tokens": 256, "row_multiple": 8, "image_token_id": 1, "merge_size": 2}
    one, apart = PassWork(), PassWork()
    for work, shares in ((one, True), (apart, False)):
        for row in pack([TokenSequence(prompt, own, ()) for own in responses], share_prefix=shares, **where):
            work.add(row, encodes=True)
    assert (one.tokens, apart.tokens) == (40 + 10 + 25, 2 * 40 + 10 + 25)
    assert (one.squares, one.seen) == (40**2 + 10**2 + 25**2, 40 * 35) and apart.seen == 0
    saved = sequence_flops(model, 40, 0).total
    assert pass_flops(model, apart).total - pass_flops(model, one).total == pytest.approx(saved, rel=1e-12)
    whole, forward = step_flops(model, PassWork(), one), pass_flops(model, one).total
    assert whole == pytest.approx(3 * forward) and step_flops(model, PassWork(), one, ["language"]) == 2 * forward
    one.graded = 0
    head = sequence_flops(model, 0, 35).head
    assert whole - step_flops(model, PassWork(), one) == pytest.approx(2 * head)
    one.grids[1, 16, 16] = 2
    tower, text = 2 * image_flops(model, (1, 16, 16)).total, step_flops(model, PassWork(), one, ["vision"])
    assert text - step_flops(model, PassWork(), replace(one, grids=Counter())) == pytest.approx(tower)


@pytest.mark.parametrize(
    ("card", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA B200", "fp8", 4500e12),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA L4", "bf16", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name_or_not_at_all(card: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(card, dtype) == peak
    found = StepWork(1e15, 4000, None if peak is None else 2 * peak, {"memory/host_gib": 2.0}).metrics(4.0)
    expected = {"flops": 1e15, "trained_tokens_per_second": 1000.0, "memory/host_gib": 2.0}
    assert found == (expected if peak is None else {**expected, "mfu": 1e15 / (8 * peak)})


@pytest.mark.parametrize("path", MODELS, ids=[path.parent.name for path in MODELS])
def test_published_shapes(path: Path, tmp_path: Path) -> None:
    """The language model of a dense one, at its true widths with four layers."""
    tree = json.loads(path.read_text())
    text = tree.get("text_config", tree)
    text["num_hidden_layers"] = 4
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:4]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    architecture = read_architecture(str(tmp_path))
    if architecture.num_experts:
        pytest.skip("which experts a token is sent to cannot be known without numbers")
    ids = torch.zeros(1, 512, dtype=torch.long, device="meta")
    positions = torch.zeros(3, 1, 512, dtype=torch.long, device="meta")
    model = _meta_model(tmp_path)
    found = _counted(lambda: model.lm_head(model.model.language_model(input_ids=ids, position_ids=positions)[0]))
    assert found == pytest.approx(sequence_flops(architecture, 512, 512, causal=False).total, rel=0.02)


def test_parts_add_up_and_the_causal_half_is_half() -> None:
    assert Flops(1.0, 2.0, 3.0) + Flops(10.0, 20.0, 30.0) == Flops(11.0, 22.0, 33.0)
    model = read_architecture(str(MODELS[0].parent))
    scores = 4 * 4096**2 * model.num_heads * model.head_dim * model.num_layers
    whole, half = (sequence_flops(model, 4096, 0, causal=causal).total for causal in (False, True))
    assert whole - half == scores / 2 and sequence_flops(model, 0, 0).total == 0.0


RECIPE = Path(__file__).parent.parent / "examples" / "recipes" / "qwen2_5_vl_7b" / "grpo.yaml"


def _parts(*words: str, command: Any = "grpo") -> dict[str, float]:
    config = load_config(RECIPE, list(words))
    return dict(training_flops(command, config, read_architecture(config.model.hf_dir)))


def test_a_step_has_the_passes_that_its_objective_asks_for() -> None:
    """Per unit of a forward pass; the engine's share of it is none of training's."""
    parts = _parts("recompute.mode=none", "recompute.vision=false")
    one = parts["forward and backward"] / 3
    assert parts == {"forward and backward": 3 * one, "old log-probs": one, "reference": one}
    plain = ("recompute.mode=none", "recompute.vision=false", "objective.old=generator", "objective.kl_coef=0")
    assert _parts(*plain) == {"forward and backward": 3 * one}
    whole = ("train.batch_size=512", "rollout.prompts_per_step=512")
    assert "old log-probs" not in _parts(*whole) and _parts(command="evaluate") == {}
    again = _parts(*plain[2:], "recompute.mode=full", "recompute.vision=true")["recomputed"]
    assert 0.8 * one < again < one, "the head is not computed again"
    double = _parts(*plain, "rollout.prompts_per_step=1024")
    assert double["forward and backward"] == pytest.approx(6 * one, rel=1e-12)


def test_a_mixture_that_replays_its_own_choice_makes_it_in_a_pass() -> None:
    """That for old log-probs, where there is one; or one for it, where a later pass would follow."""
    recipe = RECIPE.parents[1] / "qwen3_vl_30b_a3b" / "grpo.yaml"
    model = read_architecture(load_config(recipe, []).model.hf_dir)
    one_update, no_reference = ("rollout.prompts_per_step=128", "train.batch_size=128"), ("objective.kl_coef=0",)
    for words, passes in (
        ((), {"old log-probs", "reference"}),
        (("objective.old=generator",), {"choice of experts", "reference"}),
        (("objective.old=generator", *no_reference), {"choice of experts"}),
        (("objective.old=generator", "objective.router_replay=generator"), {"reference"}),
        (("objective.old=generator", "objective.router_replay=none"), {"reference"}),
        (one_update, {"choice of experts", "reference"}),
        ((*one_update, *no_reference), set()),
    ):
        parts = training_flops("grpo", load_config(recipe, ["recompute.mode=none", *words]), model)
        forward = parts["forward and backward"] / 3
        assert {name: parts[name] for name in parts if name != "forward and backward" and name != "recomputed"} == (
            dict.fromkeys(passes, forward)
        ), words


def test_contrasts_are_counted() -> None:
    """Scored once, and three times more where they are trained; weights need the log-probs in their own context."""
    plain = ("recompute.mode=none", "objective.kl_coef=0", "objective.preset=see_think", "objective.old=generator")
    blind = "objective.contrast=[{name: blind, context: no_image}]"
    masked = "objective.contrast=[{name: masked, context: masked}]"
    used = "objective.streams=[{name: answer, contrast: %s, %s}]"
    forward = _parts(*plain)["forward and backward"] / 3
    assert 0 < _parts(*plain, blind)["contrasts"] < forward, "no image is seen"
    once = _parts(*plain, masked)["contrasts"]
    assert once >= forward, "a prompt that is shared is there once, but each has its own"
    assert _parts(*plain, masked, used % ("masked", "contrast_coef: 0.1"))["contrasts"] == 4 * once
    whole = _parts(*plain, masked, used % ("masked", "contrast_coef: 0.1, contrast_divergence: full"))["contrasts"]
    assert whole == 5 * once, "scored in their own context, too"
    weighed = _parts(*plain, blind, used % ("blind", "token_weighting: top"))
    assert weighed["old log-probs"] == forward and "old log-probs" not in _parts(*plain, blind)


def test_a_step_s_operations_are_those_of_its_sequences() -> None:
    """512 prompts x 8 samples x 2 passes at the supposed lengths, and 512 square images."""
    config = load_config(RECIPE, ["rollout.prompts_per_step=512", "rollout.samples_per_prompt=8"])
    model, rollout = read_architecture(config.model.hf_dir), config.rollout
    first, second = typical_tokens(rollout)
    response = TYPICAL * rollout.max_response_tokens
    sequences = sequence_flops(model, first, response).total + sequence_flops(model, second, response).total
    sizes = ("rollout.prompts_per_step=512", "rollout.samples_per_prompt=8")
    step = _parts(*sizes, "train.shared_prefix=false")["forward and backward"]
    image = (step / 3 - 4096 * sequences) / 512
    side = (first - response) ** 0.5 * 2
    assert image == pytest.approx(image_flops(model, (1, round(side), round(side))).total, rel=0.1)
    prompt = sequence_flops(model, first - response, 0).total
    once = _parts(*sizes)["forward and backward"]
    assert step - once == pytest.approx(3 * 512 * 7 * prompt), "a prompt is there once for its samples"
    assert _parts(*sizes, "precision.dtype=fp32")["forward and backward"] == pytest.approx(step), "not in fp32"
    family = first - response + 8 * response
    rows = f"train.micro_batch_tokens={round(family / 1.5) // 64 * 64}"
    twice = _parts(*sizes, rows)["forward and backward"]
    assert twice - once == pytest.approx(3 * 512 * prompt), "a family of two rows has its prompt twice"
