"""Each family of models against transformers, from its config.json to every parameter's gradient, on one rank.

Everything that imports Megatron-Core runs in ranks of its own, so that the CPU shim never reaches the test process.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.config import Config, load_config
from megatron_sr1.packing import gather_rows, pack
from megatron_sr1.processor import Processor
from megatron_sr1.types import LogProbs, MicroBatch, Prompt, Rollout, RolloutGroup, RolloutPair, Scoring, TokenSequence
from tests.freeze_cases import check_frozen, gradient_tolerance, published_tensors
from tests.model_zoo import ZOO, create_family, publish_experts
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # relative, fp32
BUDGET = 96  # tokens of a row: several rows, some of them without an image
MODELS = Path(__file__).parent.parent / "examples" / "models"


# ---------------------------------------------------------------- the whole model
def _picture(processor: Processor, generator: torch.Generator, width: int, height: int) -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return processor.encode_image(Image.fromarray(pixels.numpy()))


def _sequences(processor: Processor) -> list[TokenSequence]:
    """Odd sizes, several images, a shared one, none; the text `<image>`; at last an image id that was generated."""
    generator = torch.Generator().manual_seed(0)

    def sequence(text: str, num_words: int, *images: Any) -> TokenSequence:
        ids = processor.prompt_ids(text, len(images))
        response = torch.randint(0, 256, (num_words,), generator=generator).tolist()
        return TokenSequence(processor.expand(ids, [image.grid_thw for image in images]), response, images)

    wide, tall, odd = (_picture(processor, generator, *size) for size in ((131, 47), (33, 150), (97, 101)))
    samples = [
        sequence("What is the sum of all digits?", 9, wide),
        sequence("Which <image> is larger, <|image_pad|>?", 13, tall, odd),
        sequence("No picture here, only the word <image>.", 21),
        sequence("And now?", 5, odd),
        sequence("Describe the picture.", 8, wide, odd, tall),
    ]
    sampled = replace(samples[0], response_ids=(7, processor.image_token_id, 5, processor.image_token_id, 11))
    return [*samples, sampled]


def _vision_inputs(sequence: TokenSequence, image_token_id: int) -> dict[str, Tensor]:
    ids = torch.tensor([*sequence.prompt_ids, *sequence.response_ids])[None]
    marks = torch.zeros_like(ids)
    marks[0, : len(sequence.prompt_ids)] = (ids[0, : len(sequence.prompt_ids)] == image_token_id).long()
    return {
        "pixel_values": torch.cat([image.pixel_values for image in sequence.images]),
        "image_grid_thw": torch.tensor([image.grid_thw for image in sequence.images]),
        "mm_token_type_ids": marks.int(),
    }


def _hf_hidden(model: Any, sequence: TokenSequence, image_token_id: int) -> Tensor:
    """transformers' final hidden states [n, H]. Its own forward takes every image id for an image; where the response
    holds one, its parts are put together here, with visual tokens in the prompt only."""
    ids = torch.tensor([*sequence.prompt_ids, *sequence.response_ids])[None]
    vision = _vision_inputs(sequence, image_token_id) if sequence.images else {}
    if image_token_id not in sequence.response_ids:
        return model.model(input_ids=ids, **vision).last_hidden_state[0]
    marks = vision["mm_token_type_ids"]
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=marks, image_grid_thw=vision["image_grid_thw"])
    features = model.model.get_image_features(vision["pixel_values"], vision["image_grid_thw"])
    mask = marks[..., None].bool()
    embedded = model.get_input_embeddings()(ids).masked_scatter(mask, torch.cat(features.pooler_output))
    deepstack = {}
    if "Qwen3VL" in type(model).__name__:
        levels = [torch.cat(level) for level in features.deepstack_features]
        deepstack = {"visual_pos_masks": marks.bool(), "deepstack_visual_embeds": levels}
    states = model.model.language_model(inputs_embeds=embedded, position_ids=positions, **deepstack)
    return states.last_hidden_state[0]


def _hf_scores(model: Any, sequence: TokenSequence, image_token_id: int) -> Tensor:
    """Log-probs and entropies [2, n] of the response. Equal entropies of the whole vocabulary mean equal logits."""
    first, response = len(sequence.prompt_ids), torch.tensor(sequence.response_ids)
    logits = model.lm_head(_hf_hidden(model, sequence, image_token_id)[first - 1 : -1])
    scores = logits.log_softmax(-1)
    entropy = -(scores.exp() * scores).sum(-1)
    return torch.stack([scores.gather(1, response[:, None])[:, 0], entropy])


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


BONUS = 0.2  # of entropy, in the loss


class _MeanLoss:
    """-mean of all response log-probs, and of their entropies."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, dict[str, Tensor]]:
        assert logprobs.entropy is not None
        loss = -(logprobs.logprobs + BONUS * logprobs.entropy).sum() / self.num_tokens
        return loss, {"loss": loss}


def _policy(model_dir: str, *overrides: str) -> tuple[Any, Config]:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.policy import Policy

    # no clipping: gradients are compared after the step
    options = [f"model.hf_dir={model_dir}", "optimizer.lr=1e-3", "optimizer.clip_grad=1e9", *overrides]
    config = load_config(None, options)
    return Policy(config, platform, num_optimizer_steps=2, keep_reference=False), config


def _pack(sequences: list[TokenSequence], processor: Processor, config: Config) -> list[MicroBatch]:
    return pack(
        sequences,
        max_tokens=BUDGET,
        row_multiple=config.row_multiple,
        sequence_multiple=config.sequence_multiple,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
    )


def _check_family(model_dir: str, family: str) -> None:
    """Log-probs, entropies, loss and every gradient."""
    import transformers

    from megatron_sr1.weights import export_hf_weights

    policy, config = _policy(model_dir)
    processor = Processor.from_pretrained(model_dir)
    sequences = _sequences(processor)
    batches = _pack(sequences, processor, config)
    assert len(batches) > 1
    assert any(batch.images for batch in batches) and not all(batch.images for batch in batches)
    model = getattr(transformers, ZOO[family].class_name).from_pretrained(model_dir, dtype=torch.float32)
    theirs = [_hf_scores(model, sequence, processor.image_token_id) for sequence in sequences]
    scores = policy.logprobs(batches, Scoring())
    found = gather_rows([score.logprobs for score in scores], batches, len(sequences))
    entropies = gather_rows([score.entropy for score in scores], batches, len(sequences))
    for index, expected in enumerate(theirs):
        assert _relative_error(found[index], expected[0]) < TOLERANCE, (family, index)
        assert _relative_error(entropies[index], expected[1]) < TOLERANCE, (family, index)

    num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
    loss = -torch.cat([expected[0] + BONUS * expected[1] for expected in theirs]).sum() / num_tokens
    loss.backward()
    batches = [replace(batch, entropy_grad=True) for batch in batches]
    result = policy.train_step(batches, _MeanLoss(num_tokens), Scoring())
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    expected_gradients = published_tensors(model, policy.architecture, lambda parameter: parameter.grad)
    assert None not in expected_gradients.values()
    gradients = dict(
        export_hf_weights(policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad)
    )
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert _relative_error(gradients[name], expected) < gradient_tolerance(name), (family, name)


def _check_greedy(model_dir: str, family: str) -> None:
    """The comparison accepts what an argmax over transformers' logits answers, and names an answer that differs."""
    import transformers
    from PIL import Image

    from megatron_sr1.convert.greedy import compare_greedy

    processor = Processor.from_pretrained(model_dir)
    model = getattr(transformers, ZOO[family].class_name).from_pretrained(model_dir, dtype=torch.float32)
    image = Image.new("RGB", (90, 61), (200, 30, 90))
    encoded = processor.encode_image(image)
    ids = processor.expand(processor.prompt_ids("What is it?", 1), [encoded.grid_thw])
    answer: tuple[int, ...] = ()
    with torch.no_grad():
        for _ in range(4):
            hidden = _hf_hidden(model, TokenSequence(ids, answer, (encoded,)), processor.image_token_id)[-1]
            logits = model.lm_head(hidden)
            logits[[*processor.media_ids, processor.end_of_turn_id]] = -torch.inf
            answer = (*answer, int(logits.argmax()))
    for response, fits in ((answer, True), ((*answer[:3], (answer[3] + 1) % 256), False)):
        first = Rollout("0/p/0/first", ids, response, processor.decode(response), (0.0,) * 4, "length", 0)
        group = RolloutGroup(0, Prompt("p", "What is it?", "", (image,)), (RolloutPair(0, first, None, None),))
        if fits:
            compare_greedy(model_dir, [group])
        else:
            with pytest.raises(ValueError, match="answers sample 'p'"):
                compare_greedy(model_dir, [group])


# (a family of the zoo, what is changed, experts as in published checkpoints)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{family: (family, {}, True) for family in ZOO},
    "some layers dense": ("qwen3_vl_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1, "tied": True}, False),
}


def _create(folder: Path, case: str) -> Path:
    family, overrides, published = CASES[case]
    model_dir = create_family(folder / case, family, seed=1, **overrides)
    if family == "qwen3_vl_moe" and published:
        publish_experts(model_dir)
    return model_dir


def _check_families(rank: int, num_ranks: int, folder: str) -> None:
    for case in CASES:
        model_dir = _create(Path(folder), case)
        _check_parts(model_dir, CASES[case][0])
        _check_family(str(model_dir), CASES[case][0])
        _check_greedy(str(model_dir), CASES[case][0])
        if case in ZOO:
            check_frozen(str(model_dir), CASES[case][0], _policy, _sequences, _hf_scores)
    _check_published_configs(Path(folder))
    _check_refusals(Path(folder))
    _check_deepstack_layer()


def test_families_equal_transformers(tmp_path: Path) -> None:
    run_ranks(1, _check_families, str(tmp_path))


def _check_stages(rank: int, num_ranks: int, model_dir: str) -> None:
    """Two stages with the dense layers in the first, then two ranks that share the experts, against transformers."""
    import transformers

    processor = Processor.from_pretrained(model_dir)
    sequences = _sequences(processor)
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        theirs = [_hf_scores(model, sequence, processor.image_token_id) for sequence in sequences]
    for layout in ("layout.pipeline=2", "layout.expert=2"):
        policy, config = _policy(model_dir, f"nproc={num_ranks}", layout)
        mine = range(policy.groups.data.rank(), len(sequences), policy.groups.data.size())
        batches = _pack([sequences[index] for index in mine], processor, config)
        scores = policy.logprobs(batches, Scoring())
        found = gather_rows([score.logprobs for score in scores], batches, len(mine))
        for index, logprobs in zip(mine, found, strict=True):
            assert _relative_error(logprobs, theirs[index][0]) < TOLERANCE, (layout, index)


def test_a_mixture_with_dense_layers_is_cut_into_stages_and_experts(tmp_path: Path) -> None:
    run_ranks(2, _check_stages, str(_create(tmp_path, "some layers dense")))


# ---------------------------------------------------------------- parts
def _check_parts(model_dir: Path, family: str) -> None:
    """Rotary angles equal transformers' to the bit, also in a bf16 model; checkpoint names are the common ones."""
    import transformers

    from megatron_sr1.policy import read_architecture
    from megatron_sr1.policy.layers.rotary import MultimodalRotary

    architecture = read_architecture(str(model_dir))
    assert architecture.family.name == family.removesuffix("_tied").removesuffix("_untied")
    rotary = MultimodalRotary(
        architecture.rotary_dim,
        architecture.rope_theta,
        architecture.mrope_section,
        interleaved=architecture.family.interleaved_rotary,
    )
    rotary.to(torch.bfloat16)
    assert not rotary.state_dict(), "frequencies are no weights"
    model = getattr(transformers, ZOO[family].class_name)(architecture.hf)
    positions = torch.randint(0, 2000, (3, 50), generator=torch.Generator().manual_seed(0))
    angles = rotary(positions)
    assert angles.shape == (50, 1, 1, architecture.rotary_dim) and angles.dtype == torch.float32
    cosines, sines = model.model.language_model.rotary_emb(torch.zeros(1), positions[:, None])
    assert torch.equal(angles[:, 0, 0].cos(), cosines[0]) and torch.equal(angles[:, 0, 0].sin(), sines[0])
    _check_checkpoint_names(str(model_dir))


def _check_checkpoint_names(model_dir: str) -> None:
    """What Transformer Engine's layers write: a norm belongs to the linear layer behind it, except before experts."""
    from megatron_sr1.policy.build import meta_model

    chunks, architecture = meta_model(model_dir)
    keys = {tensor.key for tensor in chunks[0].sharded_state_dict().values()}
    keys = {key for key in keys if not key.endswith("_extra_state")}
    kinds = list(zip(architecture.moe_layers, architecture.linear_layers, strict=True))
    layers = {f"decoder.layers.{number}": kind for number, kind in enumerate(kinds)}
    layers = layers if len(set(kinds)) > 1 else {"decoder.layers": kinds[0]}  # layers that are alike are stacked
    expected = set()
    for layer, (is_moe, is_linear) in layers.items():
        names = ["linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight"]
        names += ["linear_qkv.bias"] if architecture.family.qkv_bias else ["q_layernorm.weight", "k_layernorm.weight"]
        if is_linear:
            names = ["in_proj.layer_norm_weight", "in_proj.weight", "out_proj.weight"]
            names += ["conv_weight", "A_log", "dt_bias", "norm_weight"]
        expected |= {f"{layer}.self_attention.{name}" for name in names}
        dense = ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        experts = [f"mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2)]
        mixture = ["pre_mlp_layernorm.weight", "mlp.router.weight", *experts]
        shared = ("linear_fc1.weight", "linear_fc2.weight", "gate_weight")
        mixture += [f"mlp.shared_experts.{name}" for name in shared if architecture.shared_expert_size]
        expected |= {f"{layer}.{name}" for name in (mixture if is_moe else dense)}
    expected |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    expected |= set() if architecture.tied else {"output_layer.weight"}
    assert {key for key in keys if not key.startswith("vision.")} == expected


def _check_deepstack_layer() -> None:
    """Two features ride along; the layer, which doubles here, adds the first and passes the second on."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_sr1.policy.layers.deepstack import DeepstackLayer, PackedRow, with_deepstack

    layer = DeepstackLayer.__new__(DeepstackLayer)
    torch.nn.Module.__init__(layer)
    seen = []

    def double(self: Any, hidden: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen.append(options)
        return 2 * hidden, None

    hidden, first, second = (torch.full((3, 1, 2), value) for value in (1.0, 10.0, 100.0))
    row = PackedRow(num_local_tokens=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerLayer, "forward", double)
        states = with_deepstack(hidden, [first, second])
        for expected in ((12.0, 100.0), (124.0,), (248.0,)):
            states, context = DeepstackLayer.forward(layer, states, packed_seq_params=row, rotary_pos_emb=None)
            assert context is None and states[::3, 0, 0].tolist() == list(expected)
            assert torch.equal(states, torch.cat([torch.full((3, 1, 2), value) for value in expected]))
    assert all(options["packed_seq_params"] is row for options in seen)


# ---------------------------------------------------------------- config.json
# as published; head_dim, kv heads, theta, sections, tied, deepstack layers, experts
PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": (128, 2, 1e6, (16, 24, 24), True, (), 0),
    "Qwen2.5-VL-7B-Instruct": (128, 4, 1e6, (16, 24, 24), False, (), 0),
    "Qwen2.5-VL-32B-Instruct": (128, 8, 1e6, (16, 24, 24), False, (), 0),
    "Qwen2.5-VL-72B-Instruct": (128, 8, 1e6, (16, 24, 24), False, (), 0),
    "MiMo-VL-7B-RL": (128, 8, 640000, (16, 24, 24), False, (), 0),
    "Qwen3-VL-2B-Instruct": (128, 8, 5e6, (24, 20, 20), True, (5, 11, 17), 0),
    "Qwen3-VL-4B-Instruct": (128, 8, 5e6, (24, 20, 20), True, (5, 11, 17), 0),
    "Qwen3-VL-8B-Instruct": (128, 8, 5e6, (24, 20, 20), False, (8, 16, 24), 0),
    "Qwen3-VL-32B-Instruct": (128, 8, 5e6, (24, 20, 20), False, (8, 16, 24), 0),
    "Qwen3-VL-30B-A3B-Instruct": (128, 4, 5e6, (24, 20, 20), False, (8, 16, 24), 128),
    "Qwen3-VL-235B-A22B-Instruct": (128, 4, 5e6, (24, 20, 20), False, (8, 16, 24), 128),
    "Qwen3.5-9B": (256, 4, 1e7, (11, 11, 10), False, (), 0),
    "Qwen3.5-35B-A3B": (256, 2, 1e7, (11, 11, 10), False, (), 256),
}


def _read(folder: Path, tree: dict[str, Any]) -> Any:
    from megatron_sr1.policy import read_architecture

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    return read_architecture(str(folder))


def _check_published_configs(folder: Path) -> None:
    """Keys at the top level or in text_config, rope_scaling in three spellings."""
    from megatron_sr1.policy.transformer_config import architecture_fields

    for name, expected in PUBLISHED.items():
        model = _read(folder / "config", json.loads((MODELS / name / "config.json").read_text()))
        rope = (model.rope_theta, model.mrope_section)
        found = (model.head_dim, model.num_kv_heads, *rope, model.tied, model.deepstack_layers, model.num_experts)
        assert found == expected, name
        fields = architecture_fields(model)
        assert fields["add_qkv_bias"] == (not fields["qk_layernorm"]) == ("Qwen3" not in name)
        if model.num_experts:
            assert fields["moe_layer_freq"] == 1 and fields["moe_router_topk"] == 8
            widths = {"Qwen3-VL-30B": 768, "Qwen3-VL-235": 1536, "Qwen3.5-35B-": 512}
            assert fields["moe_ffn_hidden_size"] == widths[name[:12]]
    mixed = json.loads((MODELS / "Qwen3-VL-30B-A3B-Instruct" / "config.json").read_text())
    mixed["text_config"] |= {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert architecture_fields(_read(folder / "config", mixed))["moe_layer_freq"] == [0, 1, 0, 0, 0, 1]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen2.5-VL-7B-Instruct", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("Qwen2.5-VL-7B-Instruct", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
    ("Qwen2.5-VL-7B-Instruct", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    (
        "Qwen2.5-VL-7B-Instruct",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}},
        "rope_type='yarn'",
    ),
    ("Qwen2.5-VL-7B-Instruct", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 8]}}, "mrope_section="),
    ("Qwen2.5-VL-7B-Instruct", {"rope_scaling": None}, "mrope_section="),
    ("Qwen3-VL-8B-Instruct", {"attention_bias": True}, "attention_bias=True"),
    (
        "Qwen3-VL-8B-Instruct",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": False}},
        "mrope_interleaved=False",
    ),
    ("Qwen3-VL-30B-A3B-Instruct", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("Qwen3-VL-30B-A3B-Instruct", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("Qwen3-VL-30B-A3B-Instruct", {"decoder_sparse_step": 100}, "mlp_only_layers="),
]


def _check_refusals(folder: Path) -> None:
    for name, change, message in REFUSED:
        tree = json.loads((MODELS / name / "config.json").read_text())
        tree.get("text_config", tree).update(change)
        with pytest.raises(ValueError, match=message) as caught:
            _read(folder / "config", tree)
        assert "config.json" in str(caught.value) and "it must be" in str(caught.value), message
    for other in (["LlamaForCausalLM"], ["Qwen2VLForConditionalGeneration"], []):
        with pytest.raises(ValueError, match=r"is not supported\. Supported: Qwen2_5_VL.*, Qwen3VL.*, Qwen3VLMoe"):
            _read(folder / "config", {"architectures": other})
