"""Weights that would be taken for others in silence: refused at every door, converter, policy and engine, by one set of
rules; names of either spelling are accepted at all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sr1.config import ConfigError, check_command, check_weights, load_config
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from tests.model_zoo import create_family, name_by_place
from tests.ranks import run_ranks
from tests.thread_ranks import Meeting

LAYER = "model.layers.1.self_attn"
Tensors = dict[str, Tensor]


def _float8(tensors: Tensors) -> Tensors:
    name = f"{LAYER}.q_proj.weight"
    return tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def _int8(tensors: Tensors) -> Tensors:
    name = "visual.blocks.0.attn.qkv.weight"
    return tensors | {name: (tensors[name] * 100).to(torch.int8)}


def _not_finite(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        changed = tensors[name].clone()
        changed[..., 1] = value
        return tensors | {name: changed}

    return change


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _plus(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(*shape)}


# what is wrong with the tensors, and words of the refusal
ODD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "float8": (_float8, f"{LAYER}.q_proj.weight is float8_e4m3fn"),
    "int8": (_int8, "visual.blocks.0.attn.qkv.weight is int8"),
    "scales": (_plus(f"{LAYER}.q_proj.weight_scale", 1), "q_proj.weight_scale, which the model's config.json has no"),
    "adapter": (_plus(f"{LAYER}.q_proj.lora_A.default.weight", 4, 64), "lora_A.default.weight, which"),
    "value_head": (_plus("v_head.summary.weight", 1, 64), "v_head.summary.weight, which"),
    "bias": (_plus(f"{LAYER}.o_proj.bias", 64), "o_proj.bias, which"),
    "own_head": (_plus("lm_head.weight", 300, 64), "tie_word_embeddings, but lm_head.weight differs"),
    "vision_bias": (_plus("visual.patch_embed.proj.bias", 32), "visual.patch_embed.proj.bias, which"),
    "layer_beyond": (_plus("model.layers.4.mlp.up_proj.weight", 96, 64), "model.layers.4.mlp.up_proj.weight, which"),
    "missing": (_without(f"{LAYER}.k_proj.bias"), f"no tensor {LAYER}.k_proj.bias"),
    "twice": (_plus("model.language_model.norm.weight", 64), "model.norm.weight under two names"),
}
NOT_FINITE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nan": (_not_finite("model.layers.2.mlp.down_proj.weight", float("nan")), "model.layers.2.mlp.down_proj.weight"),
    "inf": (_not_finite("visual.blocks.1.mlp.up_proj.weight", float("-inf")), "visual.blocks.1.mlp.up_proj.weight"),
    "nan_key": (_not_finite(f"{LAYER}.k_proj.weight", float("nan")), f"{LAYER}.k_proj.weight"),
}


# ------------------------------------------------------------ what the process does
def collect(rank: int, num_ranks: int, folder: str) -> None:
    """What each door says of each folder."""
    said: dict[str, Any] = {}
    for name in (*ODD, *NOT_FINITE):
        said[name] = {
            "policy": _refusal(lambda name=name: _hf_weights(f"{folder}/{name}")),
            "converter": _refusal(lambda name=name: _convert(f"{folder}/{name}", f"{folder}/{name}-megatron")),
        }
        said[name]["evaluation"] = _refusal(lambda name=name: _check_evaluated(f"{folder}/{name}"))
    said["by_place"] = _hf_weights(f"{folder}/by_place")
    _convert(f"{folder}/by_place", f"{folder}/by_place-megatron")
    torch.save(said, f"{folder}/said.pt")


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def _hf_weights(model_dir: str) -> Tensors:
    from megatron_sr1.platform import start_platform
    from megatron_sr1.policy.scorer import Scorer

    config = load_config(None, [f"model.hf_dir={model_dir}", "nproc=1"])
    return dict(Scorer(config, start_platform()).hf_weights())


def _convert(model_dir: str, out_dir: str) -> None:
    from megatron_sr1.convert.save import hf_to_megatron
    from megatron_sr1.platform import start_platform

    Path(out_dir).mkdir()
    hf_to_megatron(model_dir, Path(out_dir), start_platform(), lambda done, total: None)


def _check_evaluated(model_dir: str) -> None:
    """What is looked at where no policy has loaded the folder."""
    from megatron_sr1.policy.read import open_tensors, read_architecture
    from megatron_sr1.weights import check_values

    check_values(open_tensors(read_architecture(model_dir)), ALONE)


# ------------------------------------------------------------ one launch
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doors")
    # vLLM's CPU attention has no heads narrower than 32
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    create_family(folder / "good", "qwen2_5_vl_tied", num_attention_heads=2, rope_parameters=rope)
    tensors = load_file(folder / "good" / "model.safetensors")
    for name, (change, _) in (ODD | NOT_FINITE).items():
        shutil.copytree(folder / "good", folder / name)
        save_file(change(tensors), folder / name / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "good", folder / "by_place")
    name_by_place(folder / "by_place")
    run_ranks(1, collect, str(folder))
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> Mapping[str, Any]:
    return torch.load(folder / "said.pt")


@pytest.mark.parametrize("name", [*ODD, *NOT_FINITE])
def test_every_door_refuses_odd_weights_and_names_the_tensor(name: str, said: Mapping[str, Any]) -> None:
    words = (ODD | NOT_FINITE)[name][1]
    for door, text in said[name].items():
        assert words in text, door
        assert f"/{name}" in text, "the folder or the file is named"


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_ranks_share_the_reading_and_all_refuse(name: str, folder: Path) -> None:
    from megatron_sr1.weights import HfTensors, check_values

    meeting = Meeting(2)

    def look(rank: int) -> str:
        return _refusal(lambda: check_values(HfTensors(folder / name), meeting.of(rank)))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(look, range(2))
    assert first == second and NOT_FINITE[name][1] in first
    assert sorted(len(turns[0]) for turns in meeting.sent) == [0, 1], "one of the two has read it"


def test_names_by_place_are_the_same_weights(folder: Path, said: Mapping[str, Any]) -> None:
    wanted = load_file(folder / "good" / "model.safetensors")
    assert said["by_place"].keys() == wanted.keys()
    assert all(torch.equal(said["by_place"][name], tensor) for name, tensor in wanted.items())

    from megatron_sr1.convert.verify import compare, open_checkpoint

    sides = [open_checkpoint(str(folder / name), None) for name in ("good", "by_place", "by_place-megatron")]
    for other in sides[1:]:
        compared = list(compare(sides[0], other, lambda done, total: None))
        assert len(compared) == len(wanted) and all(one.equal for one in compared)


# ------------------------------------------------------------ before any process starts
def _check(folder: Path) -> None:
    config = load_config(None, [f"model.hf_dir={folder}", "data.train=[x.tar]", "rollout.kv_cache_gib=4"])
    check_command("sft", config)
    check_weights(config, weights=True)


def _edited(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method='fp8'"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config.quant_method='unnamed'"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size=16 is not allowed: .*patch_size=14"),
        ("preprocessor_config.json", {"merge_size": 4}, "merge_size=4 is not allowed: .*spatial_merge_size=2"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size=1 is not allowed"),
        ("processor_config.json", {"image_processor": {"patch_size": 16}}, r"image_processor\.patch_size=16"),
        ("adapter_config.json", {"r": 8}, "adapter_config.json, and adapters are not applied"),
        ("adapter_model.safetensors", {"r": 8}, "adapter_model.safetensors, and adapters are not applied"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "image_std=.* three numbers greater than 0"),
        ("preprocessor_config.json", {"rescale_factor": 1}, "rescale_factor=1 is not allowed: it must be 1/255"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize=False is not allowed"),
        (
            "preprocessor_config.json",
            {"min_pixels": 9000, "max_pixels": 800},
            "min_pixels=9000 .* at most max_pixels=800",
        ),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 9000, "longest_edge": 800}},
            r"size\.shortest_edge=9000 .* at most longest_edge=800",
        ),
        ("config.json", {"image_token_id": 5}, r"image_token_id=5 .*tokenizer\.json beside it has <\|image_pad\|> as"),
        ("config.json", {"vision_end_token_id": 5}, r"vision_end_token_id=5 .* has <\|vision_end\|> as"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3": {"content": "<|image_pad|>"}}},
            r"the token <\|image_pad\|> has the id 3, and \d+ in tokenizer\.json",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"999999": {"content": "<more>"}}},
            "vocab_size=.* has <more> as 999999, which has no row in the embedding",
        ),
    ],
)
def test_files_beside_the_weights_that_change_their_meaning(
    file: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = create_family(tmp_path / "model", "qwen2_5_vl_tied")
    _check(folder)
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    _edited(folder, file, **changes)
    with pytest.raises(ConfigError, match=words):
        _check(folder)


def test_a_folder_with_processor_config_alone(tmp_path: Path) -> None:
    """What transformers 5 writes; its values count, as they do for transformers."""
    folder = create_family(tmp_path / "model", "qwen2_5_vl_tied")
    plain = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    small = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    nested = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": plain | small}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    _check(folder)
    assert Processor.from_pretrained(str(folder)).grid((280, 280)) == (1, 4, 4)
