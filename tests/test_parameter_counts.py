"""Every real size is built, without memory for its weights, and counted: against the published totals, against
transformers' own model, and, rank by rank, against arithmetic on config.json.

examples/models holds the published configurations, less the keys that no parameter depends on.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.config import LayoutConfig
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = {path.parent.name: path for path in sorted((REPOSITORY / "examples" / "models").glob("*/config.json"))}
# metadata.total_size / 2 of model.safetensors.index.json: all weights are bf16. For Qwen3.5 the number of parameters of
# its safetensors files: those of 9B hold A_log and the rule's norms in fp32
PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "MiMo-VL-7B-RL": 8_306_217_216,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-32B-Instruct": 33_357_390_064,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen3-VL-235B-A22B-Instruct": 235_670_022_896,
    "Qwen3.5-9B": 9_653_104_368,
    "Qwen3.5-35B-A3B": 35_951_822_704,
}
LAYOUTS = {
    "72b_tp8_pp4": ("Qwen2.5-VL-72B-Instruct", LayoutConfig(tensor=8, pipeline=4, sequence_parallel=True), 64),
    "72b_uneven": ("Qwen2.5-VL-72B-Instruct", LayoutConfig(tensor=4, pipeline=4, stage_layers=(14, 22, 22, 22)), 16),
    "3b_tp4": ("Qwen2.5-VL-3B-Instruct", LayoutConfig(tensor=4), 4),  # more ranks than key/value heads
    "3b_tied_pp2": ("Qwen2.5-VL-3B-Instruct", LayoutConfig(tensor=2, pipeline=2, context=2), 8),
    "7b_pp4": ("Qwen2.5-VL-7B-Instruct", LayoutConfig(pipeline=4), 4),
    "mimo_tp8": ("MiMo-VL-7B-RL", LayoutConfig(tensor=8), 8),
    "32b_vpp2": ("Qwen3-VL-32B-Instruct", LayoutConfig(tensor=4, pipeline=4, virtual=2), 16),
    "32b_vpp2_uneven": (
        "Qwen3-VL-32B-Instruct",
        LayoutConfig(tensor=8, pipeline=2, virtual=2, stage_layers=(12, 17, 17, 18)),
        16,
    ),
    "32b_vpp2_middle": (
        "Qwen3-VL-32B-Instruct",
        LayoutConfig(tensor=8, pipeline=4, virtual=2, stage_layers=(8, 9, 7, 8, 8, 7, 9, 8)),
        32,
    ),
    "30b_ep8": ("Qwen3-VL-30B-A3B-Instruct", LayoutConfig(expert=8), 8),
    "30b_tp2_ep4_pp2": (
        "Qwen3-VL-30B-A3B-Instruct",
        LayoutConfig(tensor=2, sequence_parallel=True, expert=4, pipeline=2),
        16,
    ),
    "35b_pp4": ("Qwen3.5-35B-A3B", LayoutConfig(pipeline=4), 4),  # of its 10 layers a stage has 2 or 3 of attention
    "9b_tp4_uneven": ("Qwen3.5-9B", LayoutConfig(tensor=4, pipeline=2, stage_layers=(15, 17)), 8),
    "35b_tp2_ep8_pp2": (
        "Qwen3.5-35B-A3B",
        LayoutConfig(tensor=2, sequence_parallel=True, expert=8, pipeline=2),
        16,
    ),
}


def _count_all(rank: int, num_ranks: int, folder: str) -> None:
    """Counts every model and layout, and transformers' models, into `folder`/counts.json."""
    from megatron_sr1.platform import start_platform

    start_platform()
    import torch
    import transformers

    from megatron_sr1.policy.parameter_counts import count_model, count_stages

    found: dict[str, Any] = {"models": {}, "transformers": {}, "layouts": {}}
    for name, path in CONFIGS.items():
        model_dir = Path(folder) / name
        model_dir.mkdir()
        shutil.copyfile(path, model_dir / "config.json")
        count = count_model(str(model_dir))
        found["models"][name] = {"language": count.language, "vision": count.vision, "total": count.total}
        model_class = getattr(transformers, json.loads(path.read_text())["architectures"][0])
        with torch.device("meta"):
            theirs = model_class(model_class.config_class.from_pretrained(model_dir))
        found["transformers"][name] = {
            "total": sum(parameter.numel() for parameter in theirs.parameters()),
            "vision": sum(parameter.numel() for parameter in theirs.model.visual.parameters()),
        }
    for case, (name, layout, ranks) in LAYOUTS.items():
        stages = count_stages(str(Path(folder) / name), layout, ranks)
        found["layouts"][case] = [[stage.layers, stage.language, stage.vision] for stage in stages]
    (Path(folder) / "counts.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("counts")
    run_ranks(1, _count_all, str(folder))
    return json.loads((folder / "counts.json").read_text())


def test_every_real_size_has_its_configuration() -> None:
    assert set(CONFIGS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_model_has_the_published_number_of_parameters(name: str, counts: dict[str, Any]) -> None:
    ours, theirs = counts["models"][name], counts["transformers"][name]
    tree = json.loads(CONFIGS[name].read_text())
    assert ours["total"] == theirs["total"] == PUBLISHED[name] - _kept_by_hand(tree.get("text_config", tree))
    assert ours["vision"] == theirs["vision"]


def _kept_by_hand(text: Mapping[str, Any]) -> int:
    """Parameters of `mtp.*`, which no class has: a layer with attention, a product of two states, norms."""
    if not text.get("mtp_num_hidden_layers"):
        return 0
    hidden = text["hidden_size"]
    return _layer_by_hand(text, 1, 1, is_linear=False) + 2 * hidden * hidden + 3 * hidden


def _layer_by_hand(text: Mapping[str, Any], tensor: int, expert: int, *, is_linear: bool) -> int:
    """Parameters of one language layer on one rank."""
    hidden, norms = text["hidden_size"], 2 * text["hidden_size"]
    mixer = (_delta_net_by_hand if is_linear else _attention_by_hand)(text, tensor)
    if "num_experts" in text:
        router, experts = text["num_experts"] * hidden, text["moe_intermediate_size"] * text["num_experts"]
        shared = text.get("shared_expert_intermediate_size", 0)
        gate = hidden if shared else 0
        return mixer + norms + router + 3 * hidden * experts // expert + 3 * hidden * shared // tensor + gate
    return mixer + norms + 3 * hidden * text["intermediate_size"] // tensor


def _attention_by_hand(text: Mapping[str, Any], tensor: int) -> int:
    hidden, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    has_qk_norm = "head_dim" in text  # Qwen3
    head = text["head_dim"] if has_qk_norm else hidden // heads
    gate = heads * head if text.get("attn_output_gate") else 0
    qkv = (heads + 2 * kv_heads) * head
    return hidden * (qkv + gate + heads * head) // tensor + (2 * head if has_qk_norm else qkv // tensor)


def _delta_net_by_hand(text: Mapping[str, Any], tensor: int) -> int:
    """Query, key, value and output gate, a learning rate and a decay of each head; convolution; norm; output."""
    heads, channels = text["linear_num_value_heads"], text["linear_value_head_dim"]
    keys, values = text["linear_num_key_heads"] * text["linear_key_head_dim"], heads * channels
    products = text["hidden_size"] * (2 * keys + 3 * values + 2 * heads)
    convolution, of_heads = (2 * keys + values) * text["linear_conv_kernel_dim"], 2 * heads
    return (products + convolution + of_heads) // tensor + channels


@pytest.mark.parametrize("case", LAYOUTS)
def test_each_stage_holds_what_arithmetic_says(case: str, counts: dict[str, Any]) -> None:
    name, layout, _ = LAYOUTS[case]
    tree = json.loads(CONFIGS[name].read_text())
    text = tree.get("text_config", tree)
    vocabulary = math.ceil(text["vocab_size"] / layout.tensor) * text["hidden_size"]
    chunks = layout.stage_layers or (text["num_hidden_layers"] // layout.num_chunks,) * layout.num_chunks
    types = text.get("layer_types", ["full_attention"] * text["num_hidden_layers"])
    for stage, (layers, language, vision) in enumerate(counts["layouts"][case]):
        assert layers == list(chunks[stage :: layout.pipeline])  # chunk c is on stage c mod pipeline
        held = [
            types[layer]
            for chunk in range(stage, len(chunks), layout.pipeline)
            for layer in range(sum(chunks[:chunk]), sum(chunks[: chunk + 1]))
        ]
        expected = sum(
            _layer_by_hand(text, layout.tensor, layout.expert, is_linear=each == "linear_attention") for each in held
        )
        is_first, is_last = stage == 0, stage == layout.pipeline - 1
        expected += vocabulary * is_first
        if is_last:
            shares_embedding = tree["tie_word_embeddings"] and is_first
            expected += text["hidden_size"] + vocabulary * (not shares_embedding)
        assert language == expected, f"stage {stage}"
        assert vision == (counts["models"][name]["vision"] if is_first else 0)


def _run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/count_parameters.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_tool_prints_every_stage_and_the_model() -> None:
    result = _run_tool("--hf", str(CONFIGS["Qwen3-VL-4B-Instruct"]), "--tp", "2", "--pp", "2")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[0:2] for row in rows[:2]] == [["stage", "0"], ["stage", "1"]]
    assert rows[2] == ["model", "36", "4,022,468,096", "415,347,712", "4,437,815,808"]


def test_the_tool_names_a_layout_that_is_none() -> None:
    result = _run_tool("--hf", str(CONFIGS["Qwen3-VL-4B-Instruct"]), "--vpp", "2")
    assert result.returncode == 2
    assert "layout.virtual=2" in result.stderr and "layout.pipeline" in result.stderr
