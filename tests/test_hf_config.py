"""The one reader of config.json against transformers' own reading, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.config import FAMILIES, ConfigError, HfConfig, load_config, read_hf_config
from megatron_sr1.config.checks import check_model
from megatron_sr1.config.model_files import how_to_get
from tests.hf_config_cases import DENSE, MIXTURE, QWEN3, SMALL, write_config
from tests.model_zoo import ZOO
from tests.ranks import run_ranks

MODELS = Path(__file__).parent.parent / "examples" / "models"
PUBLISHED = sorted(path.name for path in MODELS.iterdir())
SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "vocab_size": "vocab_size",
}
EXPERT_SIZES = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_ffn_size",
}


def published(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "config.json").read_text())


def same_as_transformers(folder: Path) -> HfConfig:
    """Reads a folder both ways; each number must be the one that transformers found, and that its modules build."""
    import torch
    import transformers

    ours, theirs = read_hf_config(str(folder)), transformers.AutoConfig.from_pretrained(folder)
    assert ours.class_name == theirs.architectures[0]
    text = theirs.text_config
    shared = {"intermediate_size": "shared_expert_intermediate_size"} if ours.family.has_shared_expert else {}
    for key, name in SIZES.items():
        assert vars(ours)[name] == getattr(text, shared.get(key, key)), key
    for key, name in EXPERT_SIZES.items():
        assert vars(ours)[name] == (getattr(text, key) if ours.family.has_experts else 0), key
    assert ours.shared_expert_size == (text.shared_expert_intermediate_size if shared else 0)
    assert ours.rope_theta == text.rope_parameters["rope_theta"]
    assert list(ours.mrope_section) == text.rope_parameters["mrope_section"]
    with torch.device("meta"):
        model = getattr(transformers, ours.class_name)(theirs)
    assert ours.tied == (model.lm_head.weight is model.model.language_model.embed_tokens.weight)
    layers = model.model.language_model.layers
    assert tuple("linear_attn.A_log" in layer.state_dict() for layer in layers) == ours.linear_layers
    attending = [layer for layer, is_linear in zip(layers, ours.linear_layers, strict=True) if not is_linear]
    assert {layer.self_attn.head_dim for layer in attending} == {ours.head_dim}
    assert {layer.self_attn.q_proj.bias is not None for layer in attending} == {ours.family.qkv_bias}
    assert {"self_attn.q_norm.weight" in layer.state_dict() for layer in attending} == {ours.family.qk_norm}
    assert tuple("mlp.experts.gate_up_proj" in layer.state_dict() for layer in layers) == ours.moe_layers
    indexes = model.model.visual.deepstack_visual_indexes if "Qwen3VL" in ours.class_name else ()
    assert tuple(indexes) == ours.deepstack_layers
    return ours


# ---------------------------------------------------------------- both readings
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    tree = published(name)
    text = tree.get("text_config", tree)
    text["num_hidden_layers"] = 4  # so that the modules are built in a moment; some layer of Qwen3.5 has attention
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:4]
    same_as_transformers(write_config(tmp_path, tree))
    model = read_hf_config(str(MODELS / name))
    assert model.repository is not None and model.repository.split("/")[1] == name
    assert model.num_layers == published(name).get("text_config", published(name))["num_hidden_layers"]


@pytest.mark.parametrize("family", ZOO)
def test_what_transformers_writes_is_read_as_it_reads_it(family: str, tmp_path: Path) -> None:
    """The spelling of version 5: text_config, rope_parameters, dtype, num_local_experts."""
    import transformers

    entry = ZOO[family]
    config = getattr(transformers, entry.config_name)(
        text_config=dict(entry.text), vision_config=dict(entry.vision), tie_word_embeddings=entry.tied
    )
    config.architectures = [entry.class_name]
    config.save_pretrained(tmp_path)
    model = same_as_transformers(tmp_path)
    assert (model.tied, model.num_experts, model.repository) == (entry.tied, entry.text.get("num_experts", 0), None)


def _at_the_top(text: dict[str, Any]) -> dict[str, Any]:
    return {"architectures": [DENSE], "model_type": "qwen2_5_vl"} | text


def _in_text_config(name: str, **top: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    kind = FAMILIES[name].name
    return lambda text: {"architectures": [name], "model_type": kind, "text_config": text} | top


SHORT = {
    key: SMALL[key] for key in SMALL if key not in ("architectures", "hidden_size", "rope_scaling", "vision_config")
}
SECTION = {"mrope_section": [2, 3, 3]}
THETA = {"rope_theta": 5.0}
SPELLINGS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]] = [
    ("old layout", _at_the_top, {"rope_scaling": {"type": "mrope"} | SECTION} | THETA),
    ("old layout, null", _in_text_config(DENSE, **SHORT, rope_scaling=SECTION, text_config=None), {}),
    ("old layout, head_dim ignored", _at_the_top, {"rope_scaling": SECTION, "head_dim": 7}),
    ("old layout, tied", _at_the_top, {"rope_scaling": SECTION, "tie_word_embeddings": True}),
    ("default, Qwen2.5-VL", _in_text_config(DENSE), {"rope_scaling": {"type": "mrope"} | SECTION}),
    ("default, Qwen3-VL", _in_text_config(QWEN3), {"rope_parameters": SECTION}),
    ("default, mixture", _in_text_config(MIXTURE), {"rope_parameters": SECTION}),
    ("theta beside", _in_text_config(QWEN3), {"rope_scaling": {"rope_type": "default"} | SECTION} | THETA),
    ("theta inside", _in_text_config(QWEN3), {"rope_parameters": SECTION | {"rope_theta": 7.0}} | THETA),
    ("both", _in_text_config(QWEN3), {"rope_scaling": {"mrope_section": [1, 2, 5]}, "rope_parameters": SECTION}),
    ("empty rope_scaling", _in_text_config(QWEN3), {"rope_scaling": {}, "rope_parameters": SECTION}),
    ("tied in text_config", _in_text_config(DENSE), {"rope_parameters": SECTION, "tie_word_embeddings": True}),
    ("not tied by text_config", _in_text_config(QWEN3), {"rope_parameters": SECTION, "tie_word_embeddings": True}),
    ("tied at the top", _in_text_config(MIXTURE, tie_word_embeddings=True), {"rope_parameters": SECTION}),
    ("head_dim", _in_text_config(QWEN3), {"rope_parameters": SECTION, "head_dim": 16}),
    ("head_dim null", _in_text_config(MIXTURE), {"rope_parameters": SECTION, "head_dim": None}),
    ("head_dim of a mixture", _in_text_config(MIXTURE), {"rope_parameters": SECTION, "head_dim": 16}),
    ("null heads", _in_text_config(DENSE), {"rope_parameters": SECTION, "num_key_value_heads": None}),
    ("published name", _in_text_config(MIXTURE), {"rope_parameters": SECTION, "num_experts": 6}),
    ("transformers' name", _in_text_config(MIXTURE), {"rope_parameters": SECTION, "num_local_experts": 6}),
    ("two names", _in_text_config(MIXTURE), {"rope_parameters": SECTION, "num_experts": 6, "num_local_experts": 8}),
    (
        "dense layers",
        _in_text_config(MIXTURE),
        {"rope_parameters": SECTION, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    ("no dense layers", _in_text_config(MIXTURE), {"rope_parameters": SECTION, "mlp_only_layers": None}),
    (
        "deepstack",
        _in_text_config(QWEN3, vision_config={"deepstack_visual_indexes": [1]}),
        {"rope_parameters": SECTION},
    ),
    ("no deepstack", _in_text_config(QWEN3, vision_config={"deepstack_visual_indexes": []}), {"rope_scaling": SECTION}),
]


@pytest.mark.parametrize(("layout", "text"), [case[1:] for case in SPELLINGS], ids=[case[0] for case in SPELLINGS])
def test_spellings_and_absent_keys_mean_what_transformers_takes_them_for(
    layout: Callable[[dict[str, Any]], dict[str, Any]], text: dict[str, Any], tmp_path: Path
) -> None:
    same_as_transformers(write_config(tmp_path, layout(SHORT | text)))


def test_what_transformers_does_not_read_is_kept_as_written(tmp_path: Path) -> None:
    text = SHORT | {"rope_scaling": SECTION}
    plain = read_hf_config(str(write_config(tmp_path, _in_text_config(MIXTURE)(text))))
    assert (plain.norm_topk_prob, plain.mrope_interleaved, plain.repository) == (None, None, None)
    text = text | {"norm_topk_prob": False, "rope_scaling": SECTION | {"mrope_interleaved": True}}
    tree = _in_text_config(MIXTURE, _name_or_path="owner/name")(text)
    written = read_hf_config(str(write_config(tmp_path, tree)))
    changed = {"norm_topk_prob": False, "mrope_interleaved": True, "repository": "owner/name"}
    assert written == replace(plain, **changed)
    assert how_to_get(str(tmp_path)) == f"Get the model with: hf download owner/name --local-dir {tmp_path}"
    for name in ("./model", "/data/model", "a/b/c", "model", "", None, 3):
        write_config(tmp_path, SMALL | {"_name_or_path": name})
        assert read_hf_config(str(tmp_path)).repository is None and "download REPOSITORY" in how_to_get(str(tmp_path))


def test_vllm_is_told_that_the_experts_weights_are_normalised_where_the_file_is_silent(tmp_path: Path) -> None:
    from megatron_sr1.rollout.vllm.arguments import _missing_keys

    text = SHORT | {"rope_scaling": SECTION}
    for layout, change, expected in (
        (_in_text_config(MIXTURE), {}, {"text_config": {"norm_topk_prob": True}}),
        (_in_text_config(MIXTURE), {"norm_topk_prob": True}, {}),
        (_in_text_config(QWEN3), {}, {}),
        (_at_the_top, {}, {}),
    ):
        assert _missing_keys(read_hf_config(str(write_config(tmp_path, layout(text | change))))) == expected


# ---------------------------------------------------------------- what is refused
NEEDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
POSITIVE = "a whole number from 1 to "
OPTIONAL = ("hidden_size", "vocab_size")
OF_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
WRONG: list[tuple[str, dict[str, Any], str, str]] = [  # class, changed keys, key=got, allowed
    *((DENSE, {key: 0}, f"{key}=0 ", POSITIVE) for key in (*NEEDED, *OPTIONAL)),
    *((DENSE, {key: -4}, f"{key}=-4 ", POSITIVE) for key in (*NEEDED, *OPTIONAL)),
    *((DENSE, {key: "4"}, f"{key}='4' ", POSITIVE) for key in (*NEEDED, *OPTIONAL)),
    *((MIXTURE, {key: 0}, f"text_config.{key}=0 ", POSITIVE) for key in (*NEEDED, "head_dim", *OF_EXPERTS)),
    (DENSE, {"num_attention_heads": True}, "num_attention_heads=True ", POSITIVE),
    (DENSE, {"num_attention_heads": 4.0}, "num_attention_heads=4.0 ", POSITIVE),
    (DENSE, {"hidden_size": None}, "hidden_size=None ", POSITIVE),
    (QWEN3, {"head_dim": None}, "text_config.head_dim=None ", POSITIVE),
    (DENSE, {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' ", "true or false"),
    (DENSE, {"rope_theta": "x"}, "rope_theta='x' ", "a number greater than 0"),
    (DENSE, {"rope_theta": 0}, "rope_theta=0 ", "a number greater than 0"),
    (DENSE, {"rope_theta": float("inf")}, "rope_theta=inf ", "a number greater than 0 and at most 1e30"),
    (DENSE, {"rope_theta": 10**31}, f"rope_theta={10**31} ", "a number greater than 0 and at most 1e30"),
    *((DENSE, {key: 10**12}, f"{key}=1000000000000 ", "a whole number from 1 to 1") for key in (*NEEDED, *OPTIONAL)),
    (
        DENSE,
        {"vision_config": {"depth": 10**12}},
        "vision_config.depth=1000000000000 ",
        "a whole number from 1 to 10000.",
    ),
    (DENSE, {"vision_config": {"num_heads": 0}}, "vision_config.num_heads=0 ", POSITIVE),
    (DENSE, {"vision_config": {"patch_size": "14"}}, "vision_config.patch_size='14' ", POSITIVE),
    (DENSE, {"vision_config": {"hidden_act": "x"}}, "vision_config.hidden_act='x' ", "one of silu"),
    (DENSE, {"dtype": "x"}, "dtype='x' ", "null or one of auto"),
    (DENSE, {"torch_dtype": 7}, "torch_dtype=7 ", "null or one of auto"),
    (DENSE, {"rope_scaling": [1]}, "rope_scaling=[1] ", "a JSON object"),
    (DENSE, {"rope_scaling": None}, "rope_parameters.mrope_section=[] ", "three numbers"),
    (DENSE, {"rope_scaling": {"mrope_section": [2, 3]}}, "rope_scaling.mrope_section=[2, 3] ", "three numbers"),
    (DENSE, {"rope_scaling": {"mrope_section": [2, 3, "3"]}}, "mrope_section=[2, 3, '3'] ", "a list of whole numbers"),
    (
        QWEN3,
        {"rope_scaling": SECTION | {"mrope_interleaved": 1}},
        "text_config.rope_scaling.mrope_interleaved=1 ",
        "true or false",
    ),
    (MIXTURE, {"norm_topk_prob": None}, "text_config.norm_topk_prob=None ", "true or false"),
    *(
        (
            MIXTURE,
            {"hidden_size": 64, "moe_intermediate_size": width},
            f"text_config.moe_intermediate_size={width} ",
            "another number than hidden_size",
        )
        for width in (32, 64)
    ),
    (MIXTURE, {"mlp_only_layers": 3}, "text_config.mlp_only_layers=3 ", "a list of whole numbers"),
]
WRONG_TREES: list[tuple[Any, list[str]]] = [
    ([SMALL], ["a JSON object"]),
    (None, ["None", "a JSON object"]),
    (SMALL | {"architectures": ["LlamaForCausalLM"]}, ["architecture LlamaForCausalLM is not supported", *FAMILIES]),
    (SMALL | {"architectures": []}, ["architecture unnamed is not supported", *FAMILIES]),
    ({}, ["architecture unnamed is not supported", *FAMILIES]),
    (SMALL | {"architectures": DENSE}, ["architectures='Qwen2_5", "a list that names a class"]),
    (SMALL | {"architectures": [3]}, ["architectures=[3]", "a list that names a class"]),
    (SMALL | {"text_config": 3}, ["text_config=3", "a JSON object"]),
    (SMALL | {"architectures": [QWEN3]}, ["text_config is missing", "a JSON object"]),  # never published so
    (SMALL | {"vision_config": []}, ["vision_config=[]", "a JSON object"]),
    (
        SMALL | {"vision_config": {"deepstack_visual_indexes": ["a"]}},
        ["vision_config.deepstack_visual_indexes=['a']", "a list of whole numbers from 0 to "],
    ),
]


DIFFERENT: dict[str, dict[str, Any]] = {
    "num_hidden_layers": {"num_layers": 47},
    "hidden_size": {"hidden_size": 1},
    "intermediate_size": {"ffn_size": 1},
    "num_attention_heads": {"num_heads": 1},
    "num_key_value_heads": {"num_kv_heads": 1},
    "head_dim": {"head_dim": 64},
    "vocab_size": {"vocab_size": 1},
    "tie_word_embeddings": {"tied": True},
    "rope_theta": {"rope_theta": 1e4},
    "mrope_section": {"mrope_section": (20, 24, 20)},
    "deepstack_visual_indexes": {"deepstack_layers": ()},
    "num_experts": {"num_experts": 64},
    "num_experts_per_tok": {"experts_per_token": 4},
    "moe_intermediate_size": {"expert_ffn_size": 1},
    "mlp_only_layers, decoder_sparse_step": {"moe_layers": (False,) * 48},
}


def refusal(folder: Path) -> str:
    """What a user reads: one line that names the file, from the check that every command makes first."""
    with pytest.raises(ConfigError) as caught:
        check_model(load_config(None, [f"model.hf_dir={folder}"]))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "got", "allowed"), WRONG, ids=[f"{name[:10]} {change}" for name, change, _, _ in WRONG]
)
def test_a_wrong_value_is_refused(name: str, change: dict[str, Any], got: str, allowed: str, tmp_path: Path) -> None:
    text = SHORT | {"rope_scaling": SECTION}
    layout = _at_the_top if name == DENSE else _in_text_config(name)
    read_hf_config(str(write_config(tmp_path, layout(text))))
    message = refusal(write_config(tmp_path, layout(text | change)))
    assert f"config.json: {got}" in message or f".{got}" in message
    assert f"it must be {allowed}" in message


@pytest.mark.parametrize("name", [DENSE, MIXTURE])
@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(name: str, key: str, tmp_path: Path) -> None:
    text = {other: value for other, value in (SHORT | {"rope_scaling": SECTION}).items() if other != key}
    layout = _at_the_top if name == DENSE else _in_text_config(name)
    prefix = "" if name == DENSE else "text_config."
    message = refusal(write_config(tmp_path, layout(text)))
    assert f"config.json: {prefix}{key} is missing: it must be {POSITIVE}" in message


@pytest.mark.parametrize(("tree", "words"), WRONG_TREES, ids=[case[1][0] for case in WRONG_TREES])
def test_a_file_that_is_no_supported_model_is_refused(tree: Any, words: list[str], tmp_path: Path) -> None:
    message = refusal(write_config(tmp_path, tree))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe"])
def test_a_file_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert "must be a JSON object" in refusal(tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    assert "model.hf_dir" in refusal(tmp_path) and "config.json" in refusal(tmp_path / "nowhere")


def _check_differing_readings(rank: int, num_ranks: int, folder: str) -> None:
    """As where another version of transformers takes another default."""
    from megatron_sr1.policy import read

    config = read_hf_config(folder)
    assert vars(read.read_architecture(folder)).items() >= vars(config).items()
    for key, change in DIFFERENT.items():
        other = replace(config, **change)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read, "read_hf_config", lambda _, other=other: other)
            with pytest.raises(ValueError, match=rf"config\.json: {key} is read as .* here and as .* by transformers"):
                read.read_architecture(folder)


def test_a_reading_that_differs_from_transformers_is_refused_by_key() -> None:
    run_ranks(1, _check_differing_readings, str(MODELS / "Qwen3-VL-30B-A3B-Instruct"))
