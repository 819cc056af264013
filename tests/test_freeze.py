"""model.freeze by names: what each entry stands for, and what it may not say. tests/test_families.py trains with it
against transformers, tests/test_layouts.py in layouts, tests/test_memory_estimate.py counts its bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.config import ConfigError, HfConfig, changes_of, check_command, dump_config, load_config
from megatron_sr1.policy.frozen import check_shares
from megatron_sr1.weights.frozen import frozen_tensors
from megatron_sr1.weights.name_table import language_rules
from tests.hf_config_cases import DENSE, MIXTURE, QWEN3, SMALL, hf_config, write_config

TOWER = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias")
MERGER = ("merger.mlp.0.weight", "merger.mlp.0.bias")
DEEPSTACK = ("deepstack_merger_list.0.linear_fc1.weight",)
EXPERTS = {"num_experts": 3, "experts_per_token": 1, "expert_ffn_size": 3, "moe_layers": (True, True)}
MODELS: dict[str, tuple[HfConfig, tuple[str, ...]]] = {
    "dense": (hf_config(DENSE, tied=False), (*TOWER, *MERGER)),
    "tied": (hf_config(DENSE, tied=True), (*TOWER, *MERGER)),
    "qwen3": (hf_config(QWEN3, tied=False), (*TOWER, *MERGER, *DEEPSTACK)),
    "mixture": (hf_config(MIXTURE, tied=False, **EXPERTS), (*TOWER, *MERGER, *DEEPSTACK)),
}


def _frozen(model: str, *freeze: str) -> frozenset[str]:
    sizes, vision = MODELS[model]
    return frozen_tensors(freeze, sizes, vision)


def _all(model: str) -> set[str]:
    sizes, vision = MODELS[model]
    return {name for rule in language_rules(sizes) for name in rule.hf} | {
        sizes.family.vision_prefix + name for name in vision
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_parts_are_the_whole_model_and_share_nothing(model: str) -> None:
    sizes, vision = MODELS[model]
    prefix, text = sizes.family.vision_prefix, sizes.family.language_prefix
    parts = {
        "vision": {prefix + name for name in TOWER},
        "merger": {prefix + name for name in vision if name not in TOWER},
        "embeddings": {f"{text}embed_tokens.weight"},
    }
    parts["language"] = _all(model) - set().union(*parts.values())
    assert ("lm_head.weight" in parts["language"]) == (not sizes.tied) and f"{text}norm.weight" in parts["language"]
    for name in ("vision", "merger", "embeddings"):
        assert _frozen(model, name) == parts[name], name
    assert _frozen(model, "language", "embeddings") == parts["language"] | parts["embeddings"]
    assert _frozen(model, "vision", "merger") == parts["vision"] | parts["merger"]
    with pytest.raises(ConfigError, match="it freezes every parameter"):
        _frozen(model, *parts)
    with pytest.raises(ConfigError, match="it freezes every parameter"):
        _frozen(model, ".*")


def test_expressions_are_for_whole_names() -> None:
    text = r"model\.layers\.0\..*"
    assert _frozen("dense", text) == {name for name in _all("dense") if name.startswith("model.layers.0.")}
    assert _frozen("dense", text, "merger") == _frozen("dense", text) | _frozen("dense", "merger")
    assert _frozen("dense", r".*[qkv]_proj\.(weight|bias)") == {x for x in _all("dense") if re.search("[qkv]_proj", x)}
    experts = _frozen("mixture", r".*mlp\.experts\..*")
    assert len(experts) == 4 and all("experts" in name for name in experts)


@pytest.mark.parametrize(
    ("model", "freeze", "message"),
    [
        ("dense", ["visoin"], "'visoin', which matches no tensor .* near ones are vision"),
        ("dense", ["Language"], "near ones are language"),
        (
            "dense",
            [r"model\.layer\.0\.mlp\.down_proj\.weight"],
            r"near ones are model\.layers\.0\.mlp\.down_proj\.weig",
        ),
        ("dense", ["layers"], r"It matches inside of model\.layers\.0\..*: an entry must match the whole name"),
        ("qwen3", [r"model\.layers\.0\..*"], "matches no tensor of the model"),
        ("tied", ["lm_head.weight"], "'lm_head.weight', which matches no tensor"),
        (
            "dense",
            [r".*q_proj.*"],
            r"matches model\.layers\.0\.self_attn\.q_proj\.weight but not .*k_proj\.weight, .*v_pr",
        ),
        ("dense", [r".*gate_proj.*"], r"but not model\.layers\.0\.mlp\.up_proj\.weight: they are one parameter here"),
        ("dense", [r".*[qkv]_proj\.weight"], r"but not their biases, .*q_proj\.bias, .*: a bias is trained only"),
    ],
)
def test_what_an_expression_may_not_match(model: str, freeze: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _frozen(model, *freeze)


def test_a_weight_may_be_trained_beside_a_bias_that_is_not() -> None:
    assert len(_frozen("dense", r".*[qkv]_proj\.bias")) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.freeze=[vision,vision]"], "'vision' stands there twice"),
        (["model.freeze=['a(']"], r"'a\(' is no regular expression \("),
        (["model.freeze=['']"], "a list of texts"),
        (["model.freeze=[true]"], "a list of texts"),
        (["model.freeze={vision: true}"], "model.freeze"),
        (["model.train_vision=false"], "Known keys here: .*freeze"),
        (["model.freeze=[vision,merger,language,embeddings]"], "it freezes every parameter"),
        (
            ["model.freeze=[vision,merger]", "optimizer.vision_lr=1e-5"],
            r"optimizer\.vision_lr=1e-05 .* null with model",
        ),
        (["model.freeze=[language]"], "must be language with embeddings: .* tie_word_embeddings.* Add embeddings"),
    ],
)
def test_what_is_refused_before_anything_starts(words: list[str], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, SMALL | {"tie_word_embeddings": True})
    with pytest.raises(ConfigError, match=message):
        check_command("sft", load_config(None, [f"model.hf_dir={tmp_path}", *words]))


def test_a_text_stands_for_a_list_and_a_head_of_its_own_is_language(tmp_path: Path) -> None:
    write_config(tmp_path, SMALL | {"tie_word_embeddings": False})
    config = load_config(None, [f"model.hf_dir={tmp_path}", "model.freeze=language"])
    assert config.model.freeze == ("language",)
    check_command("sft", config)


def test_everybody_trains_something_of_every_kind() -> None:
    check_shares(["vision"], [[3, 0], [2, 0]], "rank")
    with pytest.raises(ConfigError, match=r"pipeline stage 1 of 2 has nothing to train .* Lower layout\.pipeline"):
        check_shares(["language"], [[0, 3], [0, 0]], "pipeline stage")


@pytest.mark.parametrize(("then", "changed"), [("false", []), ("true", ["model.freeze"])])
def test_a_run_that_began_with_train_vision_goes_on_with_its_words(
    then: str, changed: list[str], tmp_path: Path
) -> None:
    config = load_config(None, [f"run_dir={tmp_path}", "model.freeze=[vision,merger]"])
    kept: Any = dump_config(config).replace("  freeze:\n  - vision\n  - merger\n", f"  train_vision: {then}\n")
    assert "train_vision" in kept
    (tmp_path / "config.yaml").write_text(kept)
    assert [change.key for change in changes_of(config)] == changed
