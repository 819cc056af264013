"""What is Qwen3.5's alone: settings that are refused, heads for further tokens that stay as they are, and its number of
parameters. Its mathematics is in test_families.py, test_layouts.py and test_delta_rule.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sr1.config import ConfigError, check_model, load_config, read_hf_config
from tests.model_zoo import create_family
from tests.ranks import run_ranks
from tests.test_convert import assert_same_bits, silent

FAMILY = "qwen3_5"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads that predict further tokens, as published checkpoints have them; their types and shapes are free."""
    folder = create_family(tmp_path_factory.mktemp(FAMILY) / "model", FAMILY)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.randn(64, 128).bfloat16()
    tensors["mtp.layers.0.self_attn.q_norm.weight"] = torch.randn(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---------------------------------------------------------------- config.json, and what the layout refuses
def _changed(model: Path, folder: Path, change: dict[str, Any], dropped: tuple[str, ...] = ()) -> str:
    tree = json.loads((model / "config.json").read_text())
    text = {key: value for key, value in tree["text_config"].items() if key not in dropped}
    tree["text_config"] = text | change
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    return str(folder)


LAYERS = ["linear_attention", "full_attention"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": LAYERS}, "layer_types"),
    ({"layer_types": [*LAYERS, "sliding_attention", "full_attention"]}, "layer_types"),
    ({"layer_types": ["linear_attention"] * 4}, "some layer is full_attention"),
    ({"linear_num_value_heads": 6}, "linear_num_value_heads=6"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim"),
    ({"attn_output_gate": False}, "attn_output_gate=False"),
    ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid'"),
    ({"layer_scale": True}, "layer_scale=True"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"rope_parameters": {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25}}, r"mrope_section=\[3, 3, 2\]"),
    ({"rope_parameters": {"mrope_section": [8, 8, 8], "partial_rotary_factor": 1.5}}, "partial_rotary_factor=48"),
]


def test_what_the_policy_would_compute_otherwise_is_refused(model: Path, tmp_path: Path) -> None:
    for change, message in REFUSED:
        with pytest.raises(ConfigError, match=message):
            read_hf_config(_changed(model, tmp_path / "config", change)).check_supported()


LAYOUTS = [
    (("layout.context=2",), "layout.context=2"),
    (("precision.dtype=fp8",), "precision.dtype='fp8'"),
    (("layout.tensor=4",), "linear_num_key_heads=2"),
    (("rollout.engine_tensor=4",), "linear_num_key_heads=2"),
]


def test_a_layout_that_the_recurrent_layers_do_not_take_is_refused(model: Path, tmp_path: Path) -> None:
    few = _changed(model, tmp_path / "few", {"linear_num_key_heads": 2})
    for words, message in LAYOUTS:
        with pytest.raises(ConfigError, match=message) as caught:
            check_model(load_config(None, [f"model.hf_dir={few}", "nproc=4", *words]))
        assert "must be" in str(caught.value)


def test_absent_keys_are_what_transformers_takes_them_for(model: Path, tmp_path: Path) -> None:
    """Nothing said of kinds of layers, the part that is turned, sizes of recurrent layers: `read_architecture` holds
    each against transformers' reading."""
    from megatron_sr1.policy.read import read_architecture

    sizes = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    dropped = ("layer_types", "head_dim", *(f"linear_{name}" for name in sizes))
    rope = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    for change, layers in (({}, (True, True, True, False)), ({"full_attention_interval": 2}, (True, False) * 2)):
        found = read_architecture(_changed(model, tmp_path / "bare", {"rope_parameters": rope, **change}, dropped))
        assert found.linear_layers == layers and (found.head_dim, found.rotary_dim) == (256, 64)
        assert found.linear is not None and (found.linear.num_value_heads, found.linear.key_dim) == (32, 128)


# ---------------------------------------------------------------- kept tensors, and the number of parameters
def _check_rank(rank: int, num_ranks: int, hf_dir: str, path: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.export import megatron_to_hf
    from megatron_sr1.convert.save import hf_to_megatron
    from megatron_sr1.convert.verify import compare, open_checkpoint
    from tests.policy_cases import built

    folder, source = Path(path), Path(hf_dir)
    (folder / "megatron").mkdir()
    hf_to_megatron(hf_dir, folder / "megatron", platform, silent)
    megatron_to_hf(str(folder / "megatron"), None, folder / "back", platform, silent)
    assert_same_bits(source, folder / "back")
    pair = (open_checkpoint(hf_dir, None), open_checkpoint(str(folder / "megatron"), None))
    assert all(found.equal for found in compare(*pair, silent))
    shutil.rmtree(folder / "megatron" / "hf_kept")  # as a checkpoint that a run has saved: its model has them
    megatron_to_hf(str(folder / "megatron"), hf_dir, folder / "of_the_model", platform, silent)
    assert_same_bits(source, folder / "of_the_model")
    expected = load_file(source / "model.safetensors")
    with built(hf_dir, ()) as (policy, _):
        exported = dict(policy.folder_weights())
        synced = dict(policy.hf_weights())
    assert exported.keys() == expected.keys() and all(torch.equal(exported[name], expected[name]) for name in expected)
    assert exported.keys() - synced.keys() == {name for name in expected if name.startswith("mtp.")}
    _check_counts(hf_dir)


def _check_counts(hf_dir: str) -> None:
    """Of the model and of the ranks of a layout, whose tensors are cut evenly but for those that all ranks have."""
    import transformers

    from megatron_sr1.config import LayoutConfig
    from megatron_sr1.policy.parameter_counts import count_model, count_stages
    from megatron_sr1.policy.read import read_architecture

    model = read_architecture(hf_dir)
    with torch.device("meta"):
        theirs = transformers.Qwen3_5ForConditionalGeneration(model.hf)
    ours = count_model(hf_dir)
    assert ours.total == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.vision == sum(parameter.numel() for parameter in theirs.model.visual.parameters())
    everywhere = sum(p.numel() for name, p in theirs.named_parameters() if "norm" in name and ".visual." not in name)
    (stage,) = count_stages(hf_dir, LayoutConfig(tensor=2), 2)
    assert stage.language - everywhere == (ours.language - everywhere) / 2


def test_heads_for_further_tokens_come_back_and_parameters_are_transformers(model: Path, tmp_path: Path) -> None:
    run_ranks(1, _check_rank, str(model), str(tmp_path))
