"""Precision and layer specs: what is refused, what Megatron-Core makes of what is not, that both layer specs are the
same model, and what bf16, FP8 and aligned rows do to numbers. What only a card can show is marked gpu."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.config import Config, ConfigError, LayoutConfig, ModelConfig, PrecisionConfig, check_bf16_layers
from megatron_sr1.packing import gather_rows, pack
from megatron_sr1.platform.accelerator import Accelerator
from megatron_sr1.platform.precision import check_precision, compute_dtype, megatron_precision
from megatron_sr1.platform.runtime import Platform
from megatron_sr1.processor import Processor
from megatron_sr1.types import MicroBatch, Scoring
from tests.model_zoo import ZOO, create_family
from tests.policy_cases import MeanLoss, built, make_sequences
from tests.ranks import run_ranks

TESTS = Path(__file__).resolve().parent
ADA, HOPPER = ("NVIDIA L40S", (8, 9)), ("NVIDIA H100", (9, 0))
BLACKWELL, CONSUMER_BLACKWELL = ("NVIDIA B200", (10, 0)), ("NVIDIA RTX 5090", (12, 0))
AMPERE = ("NVIDIA A100", (8, 0))
CPU = Platform(torch.device("cpu"), 0, 1)


def _gpu(card: tuple[str, tuple[int, int]], *, te: str | None = "2.8.0", toolkit: str = "12.9") -> Platform:
    return Platform(torch.device("cuda"), 0, 1, Accelerator(card[0], card[1], toolkit, te))


def _fp8(recipe: str, first: int = 0, last: int = 0) -> PrecisionConfig:
    return PrecisionConfig(dtype="fp8", fp8_recipe=recipe, bf16_first_layers=first, bf16_last_layers=last)


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fp32_and_bf16_run_everywhere(dtype: str) -> None:
    for platform in (CPU, _gpu(AMPERE, te=None)):
        check_precision(PrecisionConfig(dtype=dtype), "torch", platform)


@pytest.mark.parametrize(
    ("recipe", "card"),
    [
        *[(recipe, card) for recipe in ("delayed", "current") for card in (ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL)],
        ("blockwise", HOPPER),
        ("mxfp8", BLACKWELL),
    ],
)
def test_a_recipe_runs_on_its_cards(recipe: str, card: tuple[str, tuple[int, int]]) -> None:
    for spec in ("auto", "te"):
        check_precision(_fp8(recipe), spec, _gpu(card))


@pytest.mark.parametrize(
    ("recipe", "card", "remedy"),
    [
        ("delayed", AMPERE, "Set precision.dtype to bf16."),
        ("current", AMPERE, "Set precision.dtype to bf16."),
        ("blockwise", AMPERE, "Set precision.dtype to bf16."),
        ("blockwise", ADA, "Set it to delayed or current."),
        ("blockwise", BLACKWELL, "Set it to delayed or current or mxfp8."),
        ("mxfp8", HOPPER, "Set it to delayed or current or blockwise."),
        ("mxfp8", CONSUMER_BLACKWELL, "Set it to delayed or current."),
    ],
)
def test_a_card_that_cannot_is_named_with_what_it_can(
    recipe: str, card: tuple[str, tuple[int, int]], remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_precision(_fp8(recipe), "te", _gpu(card))
    message = str(caught.value)
    assert f"precision.fp8_recipe={recipe!r}" in message and card[0] in message and message.endswith(remedy)


@pytest.mark.parametrize(
    ("platform", "spec", "message"),
    [
        (CPU, "auto", "no GPU"),
        (CPU, "torch", "no GPU"),
        (_gpu(HOPPER, te=None), "auto", "needs Transformer Engine, which is not installed"),
        (_gpu(HOPPER), "torch", "model.layer_spec='torch' is not allowed with precision.dtype='fp8'"),
        (_gpu(HOPPER, te="2.2.0"), "te", "with Transformer Engine 2.2.0: it needs 2.3 or newer"),
        (_gpu(HOPPER, toolkit="12.8"), "te", "built for CUDA 12.8: it needs 12.9 or newer"),
    ],
)
def test_fp8_is_refused_where_something_lacks(platform: Platform, spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_precision(_fp8("blockwise"), spec, platform)
    assert message in str(caught.value)


def test_versions_are_compared_as_numbers() -> None:
    check_precision(_fp8("blockwise"), "te", _gpu(HOPPER, te="2.10.0+cu13", toolkit="13.0"))


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 1)])
def test_delayed_scaling_cannot_leave_layers_in_bf16(first: int, last: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_precision(_fp8("delayed", first, last), "te", _gpu(HOPPER))
    assert f"bf16_first_layers={first}" in str(caught.value) and "Set both to 0" in str(caught.value)


def test_more_bf16_layers_than_the_model_has() -> None:
    check_bf16_layers(_fp8("blockwise", 9, 9), num_layers=36, pipeline=4)
    check_bf16_layers(PrecisionConfig(dtype="bf16", bf16_first_layers=99), num_layers=36, pipeline=4)
    for first, last, named in ((10, 0, "bf16_first_layers=10"), (0, 10, "bf16_last_layers=10")):
        with pytest.raises(ConfigError, match=named):
            check_bf16_layers(_fp8("blockwise", first, last), num_layers=36, pipeline=4)
    with pytest.raises(ConfigError, match="none would be FP8"):
        check_bf16_layers(_fp8("blockwise", 18, 18), num_layers=36, pipeline=1)


# ---------------------------------------------------------------- dtype and alignment
def test_only_fp32_computes_in_fp32() -> None:
    dtypes = {name: compute_dtype(PrecisionConfig(dtype=name)) for name in ("fp32", "bf16", "fp8")}
    assert dtypes == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@pytest.mark.parametrize(("recipe", "alignment"), [("delayed", 16), ("current", 16), ("blockwise", 128), ("mxfp8", 32)])
@pytest.mark.parametrize("parallel", [(1, 1, False), (4, 1, True), (4, 1, False), (1, 2, False), (2, 4, True)])
def test_the_tokens_of_each_rank_are_aligned(recipe: str, alignment: int, parallel: tuple[int, int, bool]) -> None:
    tensor, context, sequence = parallel
    layout = LayoutConfig(tensor=tensor, context=context, sequence_parallel=sequence)
    config = Config(layout=layout, precision=_fp8(recipe), nproc=tensor * context)
    row = 3 * config.row_multiple
    assert row / (context * (tensor if sequence else 1)) % alignment == 0
    assert row % config.sequence_multiple == 0


# ---------------------------------------------------------------- without Transformer Engine
def _plain_checks(rank: int, num_ranks: int) -> None:
    """What Megatron-Core's own configuration says; which layers are chosen."""
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_sr1.policy.layers.specs import layer_spec_name

    sizes = {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 4}
    for precision in (PrecisionConfig(), PrecisionConfig(dtype="bf16"), _fp8("current", 1, 2), _fp8("delayed")):
        config = TransformerConfig(**sizes, **megatron_precision(precision))
        dtype = compute_dtype(precision)
        assert (config.params_dtype, config.pipeline_dtype, config.autocast_dtype) == (dtype, dtype, dtype)
        assert config.bf16 == (precision.dtype != "fp32") and not config.fp16
        assert (config.fp8 is not None) == (precision.dtype == "fp8") and not config.fp8_param
    with pytest.raises(ValueError, match="Delayed scaling does not support"):  # what check_precision spares its user
        TransformerConfig(**sizes, **megatron_precision(_fp8("delayed", 1, 1)))
    with pytest.raises(ValueError, match="num_layers_at_end_in_bf16"):  # and check_bf16_layers
        TransformerConfig(**sizes, pipeline_model_parallel_size=3, **megatron_precision(_fp8("current", 1, 3)))

    with_te, without = _gpu(AMPERE), _gpu(HOPPER, te=None)
    names = {
        (choice, p): layer_spec_name(choice, p, "bf16") for choice in ("auto", "torch") for p in (CPU, with_te, without)
    }
    assert [key for key, name in names.items() if name == "te"] == [("auto", with_te)]
    assert layer_spec_name("te", with_te, "fp32") == "te" and layer_spec_name("auto", with_te, "fp32") == "torch"
    for platform, lack in ((CPU, "no GPU"), (without, "not installed")):
        with pytest.raises(ConfigError, match=lack):
            layer_spec_name("te", platform, "bf16")


def test_without_transformer_engine() -> None:
    run_ranks(1, _plain_checks)


# ---------------------------------------------------------------- with a stand-in for Transformer Engine
def _small_config(name: str, folder: str) -> str:
    """A published configuration with fewer and smaller layers, as a model directory."""
    tree = json.loads((TESTS.parent / "examples" / "models" / name / "config.json").read_text())
    text = tree.get("text_config", tree)
    text.update(num_hidden_layers=4, hidden_size=256, intermediate_size=96, num_attention_heads=4, vocab_size=1002)
    text["num_key_value_heads"] = 2
    text["max_window_layers"] = 4
    if "head_dim" in text:
        text["head_dim"] = 128
    else:
        text["rope_scaling"]["mrope_section"] = [8, 12, 12]
    if "num_experts" in text:
        text.update(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[1])
    tree["vision_config"].update(depth=1, out_hidden_size=256)
    if "deepstack_visual_indexes" in tree["vision_config"]:
        tree["vision_config"]["deepstack_visual_indexes"] = [0]
    path = Path(folder) / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(tree))
    return str(path)


CASES = [  # model, layout, ranks
    ("Qwen2.5-VL-3B-Instruct", LayoutConfig(), 1),
    ("Qwen2.5-VL-7B-Instruct", LayoutConfig(tensor=2, pipeline=2, sequence_parallel=True), 4),
    ("Qwen3-VL-4B-Instruct", LayoutConfig(tensor=2), 2),
    ("Qwen3-VL-30B-A3B-Instruct", LayoutConfig(expert=4), 4),
    ("Qwen3-VL-30B-A3B-Instruct", LayoutConfig(pipeline=2, virtual=2, expert=2), 4),
]


@contextmanager
def _chunks(
    model_dir: str, layout: LayoutConfig, rank: int, num_ranks: int, spec: str, *, fused: bool = True
) -> Iterator[list[Any]]:
    from megatron_sr1.platform.fake_ranks import fake_ranks
    from megatron_sr1.policy.build import build_chunks
    from megatron_sr1.policy.groups import build_groups
    from megatron_sr1.policy.read import read_architecture

    model = ModelConfig(hf_dir=model_dir, layer_spec=spec, fused=fused)
    config = Config(model=model, layout=layout, nproc=num_ranks, precision=PrecisionConfig(dtype="bf16"))
    with fake_ranks(rank, num_ranks):
        groups = build_groups(layout)
        yield build_chunks(read_architecture(model_dir), config, _gpu(HOPPER), groups, torch.device("meta"))


def _checkpoint_entries(chunk: Any) -> dict[tuple[Any, ...], int]:
    """What a distributed checkpoint of the chunk would hold: name, shapes and place of each tensor, name and place of
    each other thing."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = chunk.sharded_state_dict()
    apply_factories(state)
    entries: dict[tuple[Any, ...], int] = {}
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            entry = (value.key, value.global_shape, value.global_offset, value.local_shape, value.dtype)
        else:
            entry = (value.key, value.global_shape, value.global_offset)
        entries[entry] = entries.get(entry, 0) + 1
    return entries


def _parameters(chunk: Any, first_expert: int) -> dict[str, tuple[int, ...]]:
    from megatron_sr1.weights.name_table import canonical_name

    named = chunk.named_parameters()
    return {canonical_name(name, first_expert=first_expert): tuple(parameter.shape) for name, parameter in named}


def _compare_specs(model_dir: str, layout: LayoutConfig, num_ranks: int) -> None:
    """Both specs give the same parameters and the same checkpoint on every rank."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    from megatron_sr1.policy.layers.deepstack import DeepstackLayer
    from megatron_sr1.policy.layers.self_attention import PackedSelfAttention

    for rank in range(num_ranks):
        found: dict[str, list[Any]] = {}
        for spec in ("torch", "te"):
            with _chunks(model_dir, layout, rank, num_ranks, spec) as chunks:
                found[spec] = [(_parameters(chunk, first_expert=0), _checkpoint_entries(chunk)) for chunk in chunks]
                for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
                    assert type(layer) is DeepstackLayer and type(layer.self_attention) is PackedSelfAttention
                    linear = layer.self_attention.linear_qkv
                    assert isinstance(linear, TELayerNormColumnParallelLinear) == (spec == "te")
                _check_fusion(chunks, fused=spec == "te")
        for (plain, plain_entries), (fused, fused_entries) in zip(found["torch"], found["te"], strict=True):
            assert plain == fused
            differing = set(plain_entries.items()) ^ set(fused_entries.items())
            # Transformer Engine's modules also keep what delayed scaling remembers
            assert all(entry[0].endswith("_extra_state") for entry, _ in differing), differing


def _check_fusion(chunks: list[Any], *, fused: bool) -> None:
    """All layers fuse, and the head does not, which would need apex."""
    for chunk in chunks:
        assert (chunk.config.bias_activation_fusion, chunk.config.gradient_accumulation_fusion) == (fused, False)
        for layer in chunk.decoder.layers:
            assert layer.mlp.config.bias_activation_fusion == fused
            assert layer.config.gradient_accumulation_fusion == fused
            assert layer.self_attention.linear_qkv.config.gradient_accumulation_fusion == fused


def _check_fusion_can_be_left_out(model_dir: str) -> None:
    with _chunks(model_dir, LayoutConfig(), 0, 1, "te", fused=False) as chunks:
        _check_fusion(chunks, fused=False)


def _check_recipes() -> None:
    """The recipe that Megatron-Core asks Transformer Engine for, layer by layer."""
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_engine.common import recipe as te_recipes
    from transformer_engine.pytorch import fp8_autocast

    sizes = {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_moe_experts": 4}
    expected = {
        "delayed": (te_recipes.DelayedScaling, te_recipes.Format.HYBRID),
        "current": (te_recipes.Float8CurrentScaling, te_recipes.Format.HYBRID),
        "blockwise": (te_recipes.Float8BlockScaling, te_recipes.Format.E4M3),
        "mxfp8": (te_recipes.MXFP8BlockScaling, te_recipes.Format.E4M3),
    }
    for name, (kind, number_format) in expected.items():
        bf16 = (0, 0) if name == "delayed" else (1, 2)
        config = TransformerConfig(**sizes, add_bias_linear=False, **megatron_precision(_fp8(name, *bf16)))
        recipe = get_fp8_recipe(config)
        assert isinstance(recipe, kind) and recipe.arguments["fp8_format"] is number_format
        in_fp8 = [isinstance(get_fp8_context(config, layer), fp8_autocast) for layer in range(6)]
        assert in_fp8 == [bf16[0] <= layer < 6 - bf16[1] for layer in range(6)]
        if name == "delayed":
            assert (recipe.arguments["amax_history_len"], recipe.arguments["amax_compute_algo"]) == (1024, "max")


def _stand_in_checks(rank: int, num_ranks: int, folder: str) -> None:
    sys.path.insert(0, str(TESTS / "te_stand_in"))
    from megatron_sr1.platform import start_platform

    start_platform()
    _check_recipes()
    _check_fusion_can_be_left_out(_small_config(CASES[0][0], folder))
    for name, layout, ranks in CASES:
        _compare_specs(_small_config(name, folder), layout, ranks)


def test_with_transformer_engine(tmp_path: Path) -> None:
    """Up to its kernels: the recipe, and that both layer specs are one model with one checkpoint."""
    run_ranks(1, _stand_in_checks, str(tmp_path), forked=False)  # Megatron-Core looks for it when it is imported


# ---------------------------------------------------------------- numbers
_WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "initializer_range": 0.04}
_OWN = {
    "qwen2_5_vl_tied": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}},
    "qwen3_vl": {},
    "qwen3_vl_moe": {"moe_intermediate_size": 384},  # neither hidden_size nor its half
    "qwen3_5": {},
    "qwen3_5_moe": {"moe_intermediate_size": 128, "initializer_range": 0.03},  # more roundings a layer
}
BF16 = "precision.dtype=bf16"
BF16_ERROR = 0.03  # mean difference of a log-prob, nats: 8 bits of mantissa through 6 layers
FP8_ERROR = 0.15  # 4 bits of mantissa
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def _create_wide(folder: Path, family: str) -> str:
    """A random model of the family, wide enough for every FP8 recipe: widths are multiples of 128."""
    ZOO["wide"] = replace(
        ZOO[family],
        text=dict(ZOO[family].text) | _WIDTHS | _OWN[family],
        vision=dict(ZOO[family].vision) | {"out_hidden_size": 256},
    )
    try:
        return str(create_family(folder / family, "wide"))
    finally:
        del ZOO["wide"]


@dataclass(frozen=True)
class _Numbers:
    logprobs: torch.Tensor  # of all sequences, one after the other
    loss: float
    grad_norm: float
    exported: set[torch.dtype]


def _numbers(model_dir: str, *overrides: str, row_multiple: int | None = None, max_tokens: int = 256) -> _Numbers:
    """Log-probs, one training step and the dtypes of the weights that are exported after it."""
    processor = Processor.from_pretrained(model_dir)
    sequences = make_sequences(processor)
    num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
    with built(model_dir, overrides) as (policy, config):
        batches = pack(
            sequences,
            max_tokens=max_tokens,
            row_multiple=row_multiple or config.row_multiple,
            sequence_multiple=config.sequence_multiple,
            image_token_id=processor.image_token_id,
            merge_size=processor.merge_size,
        )
        batches = [_on(batch, policy.platform.device) for batch in batches]
        scores = [score.logprobs for score in policy.logprobs(batches, Scoring())]
        result = policy.train_step(batches, MeanLoss(num_tokens), Scoring())
        return _Numbers(
            logprobs=torch.cat(gather_rows(scores, batches, len(sequences))).float().cpu(),
            loss=result.metrics["loss"],
            grad_norm=result.grad_norm,
            exported={tensor.dtype for _, tensor in policy.hf_weights()},
        )


def _on(batch: MicroBatch, device: torch.device) -> MicroBatch:
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)


def _assert_close(found: _Numbers, expected: _Numbers, error: float) -> None:
    assert (found.logprobs - expected.logprobs).abs().mean() < error
    assert found.loss == pytest.approx(expected.loss, rel=error)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=3 * error)


def _cpu_numbers(rank: int, num_ranks: int, folder: str) -> None:
    for family in _OWN:
        model_dir = f"{folder}/{family}"
        exact, rounded = _numbers(model_dir), _numbers(model_dir, BF16)
        assert exact.exported == {torch.float32} and rounded.exported == {torch.bfloat16}
        _assert_close(rounded, exact, BF16_ERROR)
        assert not torch.equal(rounded.logprobs, exact.logprobs)
        aligned = _numbers(model_dir, row_multiple=128)
        _assert_close(aligned, exact, 1e-5)


def test_bf16_and_aligned_rows_on_the_cpu(tmp_path: Path) -> None:
    """bf16 is near fp32 and exports bf16; the padding that aligns a row changes nothing."""
    for family in _OWN:
        _create_wide(tmp_path, family)
    run_ranks(1, _cpu_numbers, str(tmp_path))


# ---------------------------------------------------------------- on a card
@pytest.fixture(scope="module", params=_OWN)
def wide_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _create_wide(tmp_path_factory.mktemp("wide"), request.param)


def _te_or_skip(precision: PrecisionConfig) -> None:
    from megatron_sr1.platform import start_platform
    from megatron_sr1.policy.layers.specs import layer_spec_name

    platform = start_platform()
    try:
        layer_spec_name("te", platform, "bf16")
        check_precision(precision, "te", platform)
    except ConfigError as lack:
        pytest.skip(str(lack))


@gpu
@needs_gpu
def test_both_layer_specs_give_the_same_numbers(wide_model: str) -> None:
    _te_or_skip(PrecisionConfig(dtype="bf16"))
    _assert_close(
        _numbers(wide_model, BF16, "model.layer_spec=te"),
        _numbers(wide_model, BF16, "model.layer_spec=torch"),
        BF16_ERROR,
    )


@gpu
@needs_gpu
def test_fused_layers_give_the_same_numbers(wide_model: str) -> None:
    """Rows of one sequence or two: gradients are added over several micro-batches."""
    _te_or_skip(PrecisionConfig(dtype="bf16"))
    te = (BF16, "model.layer_spec=te")
    fused, plain = (_numbers(wide_model, *te, f"model.fused={word}", max_tokens=96) for word in ("true", "false"))
    _assert_close(fused, plain, BF16_ERROR)


@gpu
@needs_gpu
def test_padding_that_aligns_a_row_changes_no_number_of_transformer_engine(wide_model: str) -> None:
    _te_or_skip(PrecisionConfig(dtype="bf16"))
    te = (BF16, "model.layer_spec=te")
    _assert_close(
        _numbers(wide_model, *te, row_multiple=128), _numbers(wide_model, *te, row_multiple=1), BF16_ERROR / 3
    )


@gpu
@needs_gpu
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
def test_fp8_is_near_bf16_and_exports_bf16(recipe: str, wide_model: str) -> None:
    if "qwen3_5" in Path(wide_model).name:
        with pytest.raises(ConfigError, match=r"precision\.dtype"):
            _numbers(wide_model, "precision.dtype=fp8", f"precision.fp8_recipe={recipe}")
        return
    layers = 0 if recipe == "delayed" else 1
    _te_or_skip(_fp8(recipe, layers, layers))
    rounded = _numbers(
        wide_model,
        "precision.dtype=fp8",
        f"precision.fp8_recipe={recipe}",
        f"precision.bf16_first_layers={layers}",
        f"precision.bf16_last_layers={layers}",
    )
    _assert_close(rounded, _numbers(wide_model, BF16), FP8_ERROR)
    assert rounded.exported == {torch.bfloat16}
