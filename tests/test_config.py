"""A wrong configuration fails before anything heavy starts, and the message names the key."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megatron_sr1.config import (
    PRESET_NAMES,
    Config,
    ConfigError,
    LayoutConfig,
    RolloutConfig,
    check_model,
    dump_config,
    load_config,
    read_mapping,
)
from megatron_sr1.config.checks import check_train_batch
from tests.hf_config_cases import DENSE, MIXTURE, SMALL, write_config

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "examples" / "recipes"
EXAMPLES = sorted(  # of single runs, less what recipes share; sweeps and launches have tests of their own
    path
    for name in ("sft.yaml", "grpo.yaml")
    for path in (REPOSITORY / "examples").rglob(name)
    if path.parent != RECIPES / "base"
)


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_load_without_a_file() -> None:
    assert load_config(None, []) == Config()


def test_override_beats_file_beats_default(yaml) -> None:
    path = yaml("seed: 5\ntrain: {steps: 7}\ndata: {train: [a.tar]}\n")
    config = load_config(path, ["train.steps=9", "data.train=[b.tar,c.tar]"])
    assert (config.seed, config.train.steps, config.train.batch_size) == (5, 9, 128)
    assert tuple(config.data.train) == ("b.tar", "c.tar")


def test_last_override_wins_and_null_is_a_value() -> None:
    config = load_config(None, ["objective.dual_clip=3.0", "seed=2", "objective.dual_clip=null", "seed=3"])
    assert (config.objective.dual_clip, config.seed) == (None, 3)


@pytest.mark.parametrize("braces", ["[a-{00..07}.tar]", "a-{00..07}.tar", "[{a,b}.tar]"])
def test_braces_that_a_shell_has_expanded_are_refused(braces) -> None:
    command = ["bash", "-c", f"printf '%s\n' seed=3 data.train={braces} train.steps=2"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(words) > 3
    with pytest.raises(ConfigError, match=r"data.train is given \d times in a row.*quote the word: 'data.train=\["):
        load_config(None, words)
    load_config(None, [words[0], words[1], words[1], words[-1], words[2]])  # once, or one after other words


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("trian: {steps: 3}", [], ["trian", "train", "rollout"]),  # the known keys are listed
        ("train: {stepz: 3}", [], ["train.stepz", "save_every"]),
        ("", ["rollout.samples=3"], ["rollout.samples", "samples_per_prompt"]),
        ("train: {steps: many}", [], ["train.steps", "many"]),
        ("model: {fused: 7.5}", [], ["model.fused", "7.5"]),
        ("train: 3", [], ["train=3", "keys with values"]),
        ("", ["train.steps"], ["train.steps", "key=value"]),
    ],
)
def test_unknown_key_and_wrong_type_name_the_key(yaml, text, overrides, words) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(yaml(text + "\n"), overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        *("${oc.env:HOME}", "a/${ oc.env : HOME }/b", "${oc.decode:${oc.env:HOME}}", "${oc.create:{a: 1}}", "${own:1}"),
        *("${${track.wandb.group}:HOME}", "${oc.${track.wandb.group}:HOME}"),  # built of references
        r"\${oc.env:HOME}",  # config.yaml would hold it without its backslash, and whoever reads that would resolve it
    ],
)
def test_a_resolver_is_refused_wherever_it_stands(value: str, yaml, tmp_path) -> None:
    """What it gives, a token of the environment for one, would be written to config.yaml."""
    (tmp_path / "base.yaml").write_text(f"run_dir: '{value}'\n")
    files = [yaml(f"data: {{train: ['{value}']}}\n"), yaml("base: [base.yaml]\n")]
    for path, overrides in [(files[0], []), (files[1], []), (None, [f"run_dir='{value}'"])]:
        with pytest.raises(ConfigError, match=r"resolvers are not allowed.*config\.yaml"):
            load_config(path, overrides)


def test_a_reference_to_another_key_is_no_resolver() -> None:
    assert load_config(None, ["run_dir=${track.wandb.project}/a"]).run_dir == "megatron-sr1/a"


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml.*is not a file"):
        load_config(tmp_path / "no.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["nproc=0"], "nproc"),
        (["nproc=3", "layout.tensor=2"], "nproc"),
        (["nproc=4", "layout.tensor=2", "layout.pipeline=4"], "nproc"),
        (["layout.tensor=0"], "layout.tensor"),
        (["layout.virtual=2"], "layout.virtual"),
        (["nproc=2", "layout.pipeline=2", "layout.stage_layers=[4]"], "layout.stage_layers"),
        (["nproc=4", "layout.pipeline=2", "layout.expert=4"], "layout.expert"),
        (["precision.dtype=fp16"], "precision.dtype"),
        (["precision.logits=fp8"], "precision.logits"),
        (["precision.fp8_recipe=rowwise"], "precision.fp8_recipe"),
        (["precision.bf16_last_layers=-1"], "precision.bf16_last_layers"),
        (["recompute.mode=some"], "recompute.mode"),
        (["recompute.modules=[attention]"], "recompute.modules"),
        (["optimizer.vision_lr=0"], "optimizer.vision_lr"),
        (["layout.sequence_parallel=true"], "layout.sequence_parallel"),
        (["optimizer.lr=0"], "optimizer.lr"),
        (["optimizer.schedule=linear"], "optimizer.schedule"),
        (["rollout.temperature=0"], "rollout.temperature"),
        (["rollout.max_model_tokens=3072"], "rollout.max_model_tokens"),
        (["objective.preset=sr2"], "objective.preset"),
        (["objective.kl_coef=-0.1"], "objective.kl_coef"),
        (["objective.kl_estimator=k4"], "objective.kl_estimator"),
        (["objective.kl_in=advantage"], "objective.kl_in"),
        (["objective.entropy_coef=1"], "objective.entropy_coef"),
        (["objective.entropy_coef=-1"], "objective.entropy_coef"),
        (["objective.constant_tokens=0"], "objective.constant_tokens"),
        (["objective.advantage_scope=world"], "objective.advantage_scope"),
        (["objective.aggregation=sum"], "objective.aggregation"),
        (["objective.dual_clip=1.0"], "objective.dual_clip"),
        (["train.steps=0"], "train.steps"),
        (["train.micro_batch_tokens=-1"], "train.micro_batch_tokens"),
    ],
)
def test_value_out_of_range_names_key_and_value(overrides, key) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert key in message and "must be" in message
    value = next(o.split("=")[1] for o in overrides if o.startswith(key + "="))
    assert value.strip("[]").lower() in message.lower()


def test_dataclasses_check_themselves_without_a_file() -> None:
    with pytest.raises(ConfigError, match="nproc=4"):
        Config(nproc=4, layout=LayoutConfig(tensor=3))
    with pytest.raises(ConfigError, match=r"rollout\.max_model_tokens"):
        RolloutConfig(max_response_tokens=100, max_description_tokens=100, max_model_tokens=200)


def test_layout_gives_the_data_ranks() -> None:
    config = load_config(None, ["nproc=12", "layout.tensor=2", "layout.pipeline=3"])
    assert (config.layout.model_ranks, config.data_ranks) == (6, 2)


def test_prompts_must_split_into_batches() -> None:
    check_train_batch(load_config(None, ["rollout.prompts_per_step=512", "train.batch_size=128"]))
    with pytest.raises(ConfigError, match=r"train\.keep_every=15.*multiple of train\.save_every=10"):
        load_config(None, ["train.keep_every=15"])
    with pytest.raises(ConfigError, match=r"train\.keep_best='accuracy'.*empty with train\.evaluate_every=0"):
        load_config(None, ["train.keep_best=accuracy"])
    with pytest.raises(ConfigError, match=r"Set train\.evaluate_every to a multiple of train\.save_every=10"):
        load_config(None, ["train.keep_best=accuracy", "train.evaluate_every=15"])
    with pytest.raises(ConfigError, match=r"train\.batch_size=100.*prompts_per_step=512"):
        check_train_batch(load_config(None, ["rollout.prompts_per_step=512", "train.batch_size=100"]))


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_dump_and_load_is_the_identity(yaml, preset) -> None:
    overrides = [
        f"objective.preset={preset}",
        "data.train=[a-*.tar,b.tar]",
        "objective.dual_clip=3.0",
        "optimizer.lr=1e-4",
    ]
    config = load_config(None, [*overrides, "nproc=4", "layout.tensor=2", "run_dir='runs/with space'"])
    text = dump_config(config)
    again = load_config(yaml(text), [])
    assert dump_config(again) == text
    assert (again.objective, again.optimizer, again.layout) == (config.objective, config.optimizer, config.layout)
    assert again == config


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"sft.yaml", "grpo.yaml"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_example_loads_and_fits_together(path) -> None:
    config = load_config(path, [])
    assert config.model.hf_dir and config.run_dir != Config().run_dir
    assert config.rollout.max_model_tokens <= config.model.max_position <= config.train.micro_batch_tokens
    if path.name == "grpo.yaml":
        check_train_batch(config)
        sft = load_config(path.with_name("sft.yaml"), [])
        is_recipe = path.is_relative_to(RECIPES)  # both start from the published model, see there
        assert config.model.hf_dir == (sft.model.hf_dir if is_recipe else f"{sft.run_dir}/hf")
        assert config.data.train and config.data.heldout
    else:
        assert config.data.cold_start


_VISION = {"out_hidden_size": 192, "deepstack_visual_indexes": []}
_MODEL = SMALL | {
    "hidden_size": 192,  # 12 heads of 16 channels
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 48,
    "num_experts": 8,
}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["nproc=5", "layout.tensor=5"], "layout.tensor"),  # heads
        (["nproc=6", "layout.tensor=6"], "layout.tensor"),  # key/value heads: 6 and 4 do not share evenly
        (["nproc=4", "layout.pipeline=2", "layout.virtual=2"], "layout.pipeline * layout.virtual"),
        (["nproc=2", "layout.pipeline=2", "layout.stage_layers=[2,3]"], "layout.stage_layers"),
        (["nproc=3", "train.batch_size=3", "layout.expert=3"], "layout.expert"),
        (["nproc=2", "layout.tensor=2"], "layout.sequence_parallel"),  # a mixture under tensor parallelism
    ],
)
def test_a_layout_that_the_model_does_not_divide_is_refused(overrides: list[str], key: str, tmp_path: Path) -> None:
    write_config(tmp_path, {"architectures": [MIXTURE], "text_config": _MODEL, "vision_config": _VISION})
    with pytest.raises(ConfigError, match=re.escape(key)):
        check_model(load_config(None, [f"model.hf_dir={tmp_path}", *overrides]))


@pytest.mark.parametrize("name", ["moe_intermediate_size", "intermediate_size"])
def test_a_width_that_an_engines_ranks_do_not_divide_is_refused(name: str, tmp_path: Path) -> None:
    tree = {"architectures": [MIXTURE], "text_config": _MODEL | {name: 50}, "vision_config": _VISION}
    write_config(tmp_path, tree)
    words = [f"model.hf_dir={tmp_path}", "nproc=4"]
    check_model(load_config(None, [*words, "rollout.engine_tensor=2"]))
    with pytest.raises(ConfigError, match=rf"rollout\.engine_tensor=4.*a divisor of the model's {name}=50"):
        check_model(load_config(None, [*words, "rollout.engine_tensor=4"]))


def test_layouts_that_the_model_divides_pass(tmp_path: Path) -> None:
    write_config(tmp_path, {"architectures": [MIXTURE], "text_config": _MODEL, "vision_config": _VISION})
    for overrides in (
        ["nproc=2", "layout.pipeline=2", "layout.stage_layers=[1,5]"],
        ["nproc=8", "layout.expert=4", "layout.tensor=2", "layout.sequence_parallel=true"],
        ["nproc=12", "layout.tensor=12", "layout.sequence_parallel=true"],  # three ranks share a key/value head
    ):
        check_model(load_config(None, [f"model.hf_dir={tmp_path}", *overrides]))
    write_config(tmp_path, _MODEL | {"architectures": [DENSE], "vision_config": _VISION})
    with pytest.raises(ConfigError, match="the model has no experts"):
        check_model(load_config(None, [f"model.hf_dir={tmp_path}", "nproc=2", "layout.expert=2"]))
    check_model(load_config(None, [f"model.hf_dir={tmp_path}", "nproc=2", "layout.tensor=2"]))


def test_rows_are_padded_to_what_context_sequence_parallelism_and_fp8_ask_for() -> None:
    config = load_config(None, ["nproc=4", "layout.context=2", "layout.tensor=2", "layout.sequence_parallel=true"])
    assert (config.sequence_multiple, config.row_multiple) == (4, 4)
    fp8 = load_config(None, ["nproc=2", "layout.context=2", "precision.dtype=fp8", "precision.fp8_recipe=mxfp8"])
    assert (fp8.sequence_multiple, fp8.row_multiple) == (4, 64)
    assert load_config(None, []).row_multiple == 1


# ---------------------------------------------------------------- YAML at the keyboard
QUOTES = "in quotes"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n\tsteps: 3\n", ["line 2", "\\t", "Indent with spaces"]),
        ("seed: 1\nseed: 2\n", ["line 2", "duplicate key seed"]),
        ("data:\n  train: [a-{00..07}.tar]\n", ["line 2", "'{'", QUOTES]),
        ("[a, b]\n", ["holds a list", "`key: value`"]),
        ("a.tar\n", ["holds a single value"]),
        ("5\n", ["holds a single value"]),
        ("x: !!python/object/apply:os.system [ls]\n", ["line 1", "python/object/apply:os.system"]),
        ("a: &a [*a]\n", ["line 1", "recursive"]),
        ("a: 1\n---\na: 2\n", ["line 2", "another document"]),
        ("[" * 3000, ["nest"]),
        ("run_dir: ${\n", ["run_dir"]),
        ("train: {steps: 1:30}\n", ["line 1", "1:30 without quotes is a number", QUOTES]),
        ("seed: ???\n", ["seed='???'", "leave the key out"]),
        ("train: [3]\n", ["train=[3]", "keys with values"]),
        ("run_dir: [a]\n", ["run_dir=['a']", "must not be a list"]),
        ("data: {train: {a: 1}}\n", ["data.train={'a': 1}", "a list of texts"]),
        ("data: {train: [[a]]}\n", ["data.train=[['a']]"]),
        ("data: {train_weights: [true]}\n", ["data.train_weights=[True]"]),
        ("data: {train: ''}\n", ["data.train=''"]),
    ],
)
def test_a_slip_in_a_file_is_one_line_with_its_place(yaml, text: str, words: list[str]) -> None:
    path = yaml(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message


def test_files_that_cannot_be_read_are_named(yaml, tmp_path: Path) -> None:
    path = yaml("")
    path.write_bytes("seed: 3\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"config\.yaml is no UTF-8 text.*Save it as UTF-8"):
        load_config(path, [])
    path.write_bytes(b"\xef\xbb\xbfseed: 3\r\n")  # as Windows' editors write
    assert load_config(path, []).seed == 3
    with pytest.raises(ConfigError, match="Is a directory"):
        read_mapping(tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=[a-{00..07}.tar]", ["'data.train=[a-{00..07}.tar]'", QUOTES, "the shell takes quotes"]),
        ("run_dir=[", ["'run_dir=['"]),
        ("=3", ["'=3'", "key=value"]),
        ("train=3", ["train=3", "keys with values"]),
        ("data.train[0]=a", ["data.train", "a list of texts"]),
        ("train.steps=1" + "0" * 5000, ["train.steps=1000", "..."]),
    ],
)
def test_a_slip_in_an_override_is_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and all(word in message for word in words), message


def test_a_text_is_a_list_of_one(yaml) -> None:
    path = yaml("data: {train: a.tar, heldout: '${data.train}'}\nlayout: {stage_layers: 4}\n")
    config = load_config(path, ["recompute.modules=mlp"])
    assert tuple(config.data.train) == tuple(config.data.heldout) == ("a.tar",)
    assert (tuple(config.layout.stage_layers), tuple(config.recompute.modules)) == ((4,), ("mlp",))
    assert tuple(load_config(path, ["data.train=b.tar"]).data.train) == ("b.tar",)


def test_a_tilde_is_the_user_s_folder(yaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    path = yaml("base: [~/base.yaml]\nrun_dir: ~/runs/a\nmodel: {hf_dir: ~/models/b}\n")
    config = load_config(path, ["model.megatron_dir=~/m"])
    assert (config.seed, config.run_dir) == (7, f"{tmp_path}/runs/a")
    assert (config.model.hf_dir, config.model.megatron_dir) == (f"{tmp_path}/models/b", f"{tmp_path}/m")
    assert load_config(yaml(dump_config(config)), []) == config
    assert load_config(None, ["run_dir=a/~/b"]).run_dir == "a/~/b"
    with pytest.raises(ConfigError, match=r"run_dir='~nobody-here/x'.*no user is named 'nobody-here'.*\./~nobody"):
        load_config(None, ["run_dir=~nobody-here/x"])


# ---------------------------------------------------------------- numbers
def numeric_keys(section: Any = Config, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            yield from numeric_keys(kind, f"{prefix}{name}.")
        elif {int, float} & {kind, *get_args(kind)}:
            yield f"{prefix}{name}"


def test_numeric_keys_are_found() -> None:
    found = list(numeric_keys())
    assert len(found) > 50 and {"seed", "optimizer.vision_lr", "layout.stage_layers", "data.train_weights"} <= set(
        found
    )


@pytest.mark.parametrize("key", list(numeric_keys()))
def test_every_number_is_finite_and_of_a_sensible_size(key: str) -> None:
    for value in (".inf", "-.inf", ".nan", "1e300", "1" + "0" * 23, "-1"):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"{key}={value}"])
        assert key in str(caught.value) and "\n" not in str(caught.value), (value, caught.value)


def test_the_schedule_may_not_end_above_its_start() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.min_lr=0\.01.*at most 0\.001"):
        load_config(None, ["optimizer.lr=0.1", "optimizer.vision_lr=0.001", "optimizer.min_lr=0.01"])


def test_numbers_of_a_request_are_json() -> None:
    judge = ["evaluate.judge_url=http://127.0.0.1:8000/v1", "evaluate.judge_model=m"]
    with pytest.raises(ConfigError, match=r"evaluate\.judge_parameters=.*JSON"):
        load_config(None, [*judge, "evaluate.judge_parameters.top_p=.nan"])


def test_a_run_has_a_folder() -> None:
    with pytest.raises(ConfigError, match="run_dir=''"):
        load_config(None, ["run_dir=''"])
