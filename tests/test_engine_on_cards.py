"""What rollouts rely on, of vLLM's engine on a card: its second model runner, decoding from graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sr1.rollout.request import Draw
from megatron_sr1.types import BANNED_LOGIT_BIAS
from tests.rollout_cases import MAX_MODEL_TOKENS, changed_weight, describing_processor, make_model, prompts

NUM_TOKENS = 24
MAX_GAP = 0.05  # nats, mean: a bf16 engine and a fp32 transformers
BANNED = tuple(range(40, 200))  # most of what the model would say


def _answers(engine: Any, processor: Any, *, seed: int, temperature: float, banned: tuple[int, ...] = ()) -> list[Any]:
    for number, prompt in enumerate(prompts(6)):
        images = [processor.encode_image(image) for image in prompt.images]
        ids = processor.prompt_ids(prompt.problem, len(images))
        prepared = engine.prepare(processor.expand(ids, [image.grid_thw for image in images]), images)
        never = (*processor.media_ids, *banned)
        draw = Draw(temperature, NUM_TOKENS, seed + number, processor.end_of_turn_id, never)
        engine.add(str(number), prepared, draw)
    found = []
    while engine.has_unfinished():
        found += engine.step()
    return sorted(found, key=lambda generation: generation.request_id)


def _transformers_logprobs(folder: Path, processor: Any, answers: list[Any]) -> list[torch.Tensor]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, answer in zip(prompts(6), answers, strict=True):
        ids = torch.tensor([answer.prompt_ids + answer.response_ids])
        vision: dict[str, Any] = {}
        if images := [processor.encode_image(image) for image in prompt.images]:
            vision["pixel_values"] = torch.cat([image.pixel_values for image in images])
            vision["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
            vision["mm_token_type_ids"] = (ids == processor.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, **vision).logits[0, len(answer.prompt_ids) - 1 : -1]
        logits[:, list(processor.media_ids)] += BANNED_LOGIT_BIAS
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer.response_ids)[:, None])[:, 0])
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seeds_bans_log_probs_and_reloads_hold_on_a_card(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM")
    from megatron_sr1.rollout import Engine, EngineLimits

    make_model(tmp_path)
    processor = describing_processor(str(tmp_path))
    engine = Engine(str(tmp_path), EngineLimits(MAX_MODEL_TOKENS, 16, kv_cache_gib=0.5, max_images=2, seed=0))
    assert engine._engine.vllm_config.use_v2_model_runner
    greedy = _answers(engine, processor, seed=0, temperature=0.0)
    gaps = [
        (torch.tensor(answer.logprobs) - expected).abs()
        for answer, expected in zip(greedy, _transformers_logprobs(tmp_path, processor, greedy), strict=True)
    ]
    assert torch.cat(gaps).mean() < MAX_GAP
    drawn = [_answers(engine, processor, seed=seed, temperature=1.0) for seed in (1, 1, 2)]
    tokens = [[answer.response_ids for answer in answers] for answers in drawn]
    assert tokens[0] == tokens[1] != tokens[2], "a seed is a draw, whatever runs beside it"
    banned = _answers(engine, processor, seed=1, temperature=2.0, banned=BANNED)
    assert not {token for answer in banned for token in answer.response_ids} & set(BANNED)
    cold = _answers(engine, processor, seed=1, temperature=0.5)
    at_one = _transformers_logprobs(tmp_path, processor, cold)
    assert torch.cat([torch.tensor(answer.logprobs) for answer in cold]).mean() > torch.cat(at_one).mean(), (
        "log-probs are of the distribution that was drawn from"
    )
    weights = load_file(tmp_path / "model.safetensors")
    engine.update_weights(((name, changed_weight(name, tensor)) for name, tensor in weights.items()), 1)
    assert _answers(engine, processor, seed=0, temperature=0.0) != greedy
    engine.update_weights(weights.items(), 2)
    assert _answers(engine, processor, seed=0, temperature=0.0) == greedy
