"""Operations of a forward pass against torch's own count of transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sr1.config import load_config, typical_tokens
from megatron_sr1.config.rollout import TYPICAL
from megatron_sr1.estimate.arithmetic import training_flops
from megatron_sr1.estimate.flops import Flops, image_flops, sequence_flops
from megatron_sr1.policy.read import read_architecture
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
    ids = torch.arange(90)[None] % 50 + 3
    with_head = _counted(lambda: model(input_ids=ids, logits_to_keep=17))
    assert with_head == pytest.approx(sequence_flops(architecture, 90, 17, causal=False).total, rel=0.02)
    grid = (1, 10, 14)  # neither side is a number of whole windows
    patches = torch.randn(
        140, architecture.hf.vision_config.temporal_patch_size * 3 * config.vision_config.patch_size**2
    )
    tower = _counted(lambda: model.model.visual(patches, grid_thw=torch.tensor([grid])))
    assert tower == pytest.approx(image_flops(architecture, grid).total, rel=0.02)


@pytest.mark.parametrize("path", MODELS, ids=[path.parent.name for path in MODELS])
def test_published_shapes(path: Path, tmp_path: Path) -> None:
    """The language model of a dense one, at its true widths with four layers."""
    tree = json.loads(path.read_text())
    text = tree.get("text_config", tree)
    text["num_hidden_layers"] = 4
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
