"""Every recipe passes --dry-run from a clean clone, fits its GPUs and raises no warning; wrong variants say what is
wrong, and risky ones what to change."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.cli import main
from megatron_sr1.config import Config, ConfigError, load_config
from tests.hf_config_cases import SMALL, write_config
from tests.ranks import run_ranks
from tests.workspace import PHASES

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "examples" / "recipes"
FILES = {
    str(path.relative_to(RECIPES)): path for path in sorted(RECIPES.glob("*/*.yaml")) if path.parent.name != "base"
}
MODELS = {"qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_32b", "qwen2_5_vl_72b"}
MODELS |= {"mimo_vl_7b", "qwen3_vl_2b", "qwen3_vl_8b", "qwen3_vl_30b_a3b", "qwen3_vl_235b_a22b"}
MODELS |= {"qwen3_5_9b", "qwen3_5_35b_a3b"}
# of 8 GPUs; the others need one
NODES = {"qwen2_5_vl_32b": 4, "qwen2_5_vl_72b": 8, "qwen3_vl_30b_a3b": 2, "qwen3_vl_235b_a22b": 16}
NODES |= {"qwen3_5_35b_a3b": 2}

# changes to a recipe that cannot run: recipe, changes, words of the error
REFUSED: list[tuple[str, list[str], list[str]]] = [
    ("qwen2_5_vl_7b/grpo.yaml", ["layout.tensor=3", "nproc=6"], ["layout.tensor=3", "num_attention_heads=28"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["layout.pipeline=3", "nproc=12"], ["layout.pipeline * layout.virtual=3", "=28"]),
    ("qwen2_5_vl_72b/grpo.yaml", ["layout.stage_layers=[20,20,20,19]"], ["layout.stage_layers", "=80"]),
    ("qwen2_5_vl_72b/grpo.yaml", ["layout.stage_layers=[40,40]"], ["layout.stage_layers", "4 numbers"]),
    (
        "qwen2_5_vl_7b/grpo.yaml",
        ["layout.tensor=1", "layout.sequence_parallel=false", "recompute.mode=full"],
        [
            "the training phase takes about",
            "on a rank of stage 0, more than the 80 GiB",
            "gradients",
            "layout.pipeline",
        ],
    ),
    (
        "qwen2_5_vl_72b/grpo.yaml",
        ["rollout.sleep=false", "--gpu-gib", "95"],
        ["the training phase takes about", "on a rank of stage 0, more than the 95 GiB"],
    ),
    ("qwen2_5_vl_7b/grpo.yaml", ["--gpu-gib", "40"], ["phase takes about", "more than the 40 GiB"]),
    (
        "qwen2_5_vl_72b/sft.yaml",
        ["train.micro_batch_tokens=65536"],
        ["the training phase", "Most of it: layers", "recompute.mode to full"],
    ),
    ("qwen2_5_vl_3b/grpo.yaml", ["recompute.vision=false"], ["Most of it: vision", "recompute.vision to true"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["rollout.kv_cache_gib=64"], ["Most of it: KV cache", "Lower rollout.kv_cache_gib"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["rollout.kv_cache_gib=0.2"], ["rollout.kv_cache_gib=0.2", "max_model_tokens=8192"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["--gpus-per-node", "3"], ["nproc=8", "a multiple of the 3 GPUs"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["--gpu-gib", "0"], ["--gpu-gib=0.0"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["--host-gib", "nan"], ["--host-gib=nan"]),
    (
        "qwen2_5_vl_7b/grpo.yaml",
        ["--host-gib", "300"],
        ["more than its 300 GiB", "offload.optimizer"],
    ),
    (
        "qwen2_5_vl_7b/grpo.yaml",
        ["rollout.dynamic_sampling=100", "--host-gib", "700"],
        ["more than its 700 GiB", "rollout.dynamic_sampling"],
    ),
    ("qwen2_5_vl_3b/grpo.yaml", ["rollout.dynamic_sampling=-1"], ["rollout.dynamic_sampling=-1", "at least 0"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["rollout.samples_per_prompt=1"], ["samples_per_prompt=1", "advantage_scope is group"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["train.batch_size=100"], ["train.batch_size=100", "prompts_per_step=512"]),
    ("qwen2_5_vl_72b/grpo_fp8.yaml", ["train.micro_batch_tokens=512"], ["train.micro_batch_tokens=512", "1024"]),
    ("qwen2_5_vl_72b/grpo_fp8.yaml", ["precision.bf16_first_layers=21"], ["precision.bf16_first_layers=21", "20"]),
    ("qwen3_vl_30b_a3b/grpo.yaml", ["layout.expert=3", "nproc=48"], ["layout.expert=3"]),
    ("qwen3_vl_30b_a3b/grpo.yaml", ["layout.sequence_parallel=false"], ["layout.sequence_parallel", "experts"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["model.hf_dir=/nowhere"], ["model.hf_dir", "/nowhere", "config.json"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["data.train=[]"], ["data.train is empty"]),
]
# changes that can run: recipe, changes, words of the warning
WARNED: list[tuple[str, list[str], list[str]]] = [
    (
        "qwen2_5_vl_7b/grpo.yaml",
        ["layout.sequence_parallel=false"],
        ["layout.sequence_parallel=false", "Set it to true"],
    ),
    ("qwen2_5_vl_7b/grpo.yaml", ["--gpus-per-node", "2"], ["layout.tensor=4 crosses nodes of 2", "layout.pipeline"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["recompute.mode=full"], ["recompute.mode='full'", "not needed"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["recompute.mode=selective"], ["recompute.modules=['core_attn']", "next to nothing"]),
    (
        "qwen2_5_vl_7b/grpo.yaml",
        ["rollout.kv_cache_gib=51"],
        ["phase leaves", "Lower rollout.kv_cache_gib"],
    ),
    ("qwen2_5_vl_7b/grpo.yaml", ["rollout.max_running_requests=400"], ["holds", "tokens", "requests are put back"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["rollout.engine_tensor=4"], ["keeps each of 2 key/value heads 2 times"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["train.micro_batch_tokens=4096"], ["a sequence", "would stop the run"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["rollout.max_model_tokens=16384"], ["model.max_position=8192 is less than"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["data.max_prompt_tokens=6145"], ["left out and counted", "Set it to 6144 or less"]),
    ("qwen2_5_vl_7b/grpo.yaml", ["layout.context=2", "layout.tensor=2", "--gpu-gib", "110"], []),
    (
        "qwen2_5_vl_7b/grpo.yaml",
        ["layout.context=4", "layout.tensor=2", "--gpu-gib", "110"],
        ["layout.context=4 cuts", "Set it to 1"],
    ),
    ("qwen2_5_vl_7b/sft.yaml", ["train.batch_size=129"], ["train.batch_size=129 does not divide among 2"]),
    (
        "qwen2_5_vl_32b/grpo.yaml",
        ["layout.stage_layers=[46,18]", "--gpu-gib", "99"],
        ["stage 0 holds", "more parameters than the mean", "layout.stage_layers"],
    ),
    (
        "qwen2_5_vl_72b/sft.yaml",
        ["train.micro_batch_tokens=16384", "--gpu-gib", "141"],
        ["stages idle for", "layout.virtual"],
    ),
    (
        "qwen2_5_vl_3b/sft.yaml",
        ["layout.distributed_optimizer=false", "--gpu-gib", "141"],
        ["layout.distributed_optimizer=false keeps the optimizer state 8 times"],
    ),
    ("qwen3_vl_30b_a3b/grpo.yaml", ["--gpus-per-node", "4"], ["layout.expert=8 spreads experts over nodes of 4"]),
    ("qwen2_5_vl_72b/grpo.yaml", ["--gpus-per-node", "4"], ["rollout.engine_tensor=8 crosses nodes of 4"]),
    (
        "qwen2_5_vl_3b/grpo.yaml",
        ["rollout.dynamic_sampling=2", "objective.advantage_scope=batch"],
        ["rollout.dynamic_sampling=2 replaces nothing", "objective.advantage_scope to group"],
    ),
    ("qwen2_5_vl_3b/grpo.yaml", ["rollout.sleep=false", "--gpu-gib", "141"], ["rollout.sleep=false", "Set it to true"]),
    ("qwen2_5_vl_3b/grpo.yaml", ["precision.dtype=fp32", "--gpu-gib", "200"], ["precision.dtype='fp32'", "bf16"]),
    (
        "mimo_vl_7b/sft.yaml",
        ["precision.dtype=fp8", "layout.tensor=32", "nproc=32"],
        ["fp8 products take multiples of 16"],
    ),
    (
        "qwen2_5_vl_3b/sft.yaml",
        ["recompute.vision=false", "--gpu-gib", "200"],
        ["vision activations", "Set recompute.vision to true"],
    ),
    (
        "qwen2_5_vl_3b/grpo.yaml",
        [
            "rollout.prompts_per_step=4",
            "train.batch_size=4",
            "nproc=4",
            "rollout.samples_per_prompt=2",
            "--gpu-gib",
            "99",
        ],
        [],
    ),
]


def _run(file: str, options: Sequence[str]) -> dict[str, Any]:
    """One command in this process: what it printed, and its exit status."""
    out, err = StringIO(), StringIO()
    status: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["sft" if Path(file).name.startswith("sft") else "grpo", str(FILES[file]), *options])
        except SystemExit as stopped:
            status = stopped.code
    return {"out": out.getvalue(), "err": err.getvalue(), "status": status}


def _dry_runs(rank: int, num_ranks: int, folder: str) -> None:
    """All dry runs, in one process: the first starts the platform."""
    found = {
        "recipes": [_run(file, ["--dry-run"]) for file in FILES],
        "refused": [_run(file, ["--dry-run", *options]) for file, options, _ in REFUSED],
        "warned": [_run(file, ["--dry-run", *options]) for file, options, _ in WARNED],
    }
    (Path(folder) / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("dry_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)  # the recipes' paths start there
        run_ranks(1, _dry_runs, str(folder))
    return json.loads((folder / "found.json").read_text())


def test_every_phase_of_every_recipe_leaves_four_gib(found: dict[str, Any]) -> None:
    for file, result in zip(FILES, found["recipes"], strict=True):
        phases = re.findall(r"^# ([\w -]+), GiB of a rank", result["out"], re.MULTILINE)
        trains_only = Path(file).name.startswith("sft")
        assert set(phases) == ({"training", "checkpoint"} if trains_only else {*PHASES.values(), "start-up"}), file
        free = re.findall(r"^#   free +(.*)$", result["out"], re.MULTILINE)
        assert len(free) == len(phases)
        for phase, line in zip(phases, free, strict=True):
            assert min(map(float, line.split())) >= 4.0, f"{file}: {phase} leaves {line}"


def _warnings(out: str) -> list[str]:
    """Those that are not about data and weights, which no clone has."""
    lines = [line.removeprefix("# warning: ") for line in out.splitlines() if line.startswith("# warning: ")]
    return [line for line in lines if "matches no file" not in line and "hf download" not in line]


def test_every_model_has_a_pair_of_recipes() -> None:
    assert {f"{model}/{name}.yaml" for model in MODELS for name in ("sft", "grpo")} <= set(FILES)
    assert all(len(path.read_text().splitlines()) <= 15 for path in FILES.values()), "what recipes share is in base/"


@pytest.mark.parametrize("file", FILES)
def test_recipe_names_its_model_and_the_papers_numbers(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(FILES[file], [])
    model = REPOSITORY / config.model.hf_dir
    repository = json.loads((model / "config.json").read_text())["_name_or_path"]
    assert repository.split("/")[1] == model.name
    text = FILES[file].with_name(Path(file).name.replace("_fp8", "")).read_text()
    if Path(file).name == "sft.yaml":
        assert f"hf download {repository} --local-dir {config.model.hf_dir}" in text
        assert config.data.cold_start
        return
    cold_start = load_config(FILES[file].with_name("sft.yaml"), [])
    assert f"model.hf_dir={cold_start.run_dir}/hf" in text and cold_start.model.hf_dir == config.model.hf_dir
    rollout, objective = config.rollout, config.objective
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, config.train.batch_size) == (512, 8, 128)
    assert (config.train.steps, config.optimizer.lr, config.optimizer.weight_decay) == (200, 1e-6, 0.01)
    assert (objective.preset, objective.kl_coef, objective.kl_estimator) == ("vision_sr1", 0.01, "k3")
    assert (rollout.temperature, rollout.max_response_tokens, config.optimizer.clip_grad) == (1.0, 2048, 1.0)
    assert not config.model.freeze and rollout.max_model_tokens == 8192


OF_THE_DRY_RUN = ("phase", "--gpu", "--host", "Most of it")  # how much fits, and on what machine


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [case for case in REFUSED if not any(word in " ".join(case[1] + case[2]) for word in OF_THE_DRY_RUN)],
)
def test_what_a_dry_run_refuses_the_command_refuses(
    file: str, options: list[str], words: list[str], found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same words, before any process starts."""
    started: list[object] = []
    monkeypatch.setattr("megatron_sr1.platform.run_on_ranks", lambda *arguments: started.append(arguments))
    monkeypatch.chdir(REPOSITORY)
    dry = found["refused"][REFUSED.index((file, options, words))]
    assert _run(file, options) == dry | {"out": ""} and dry["status"] == 2 and not started


def test_an_engine_that_cannot_hold_a_sequence_is_refused_without_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    result = _run("qwen2_5_vl_32b/grpo.yaml", ["rollout.kv_cache_gib=0.5", "rollout.engine_tensor=1"])
    assert result["status"] == 2 and "rollout.kv_cache_gib=0.5" in result["err"] and "Raise it" in result["err"]


@pytest.mark.parametrize("file", FILES)
def test_recipe_passes_a_dry_run_without_a_warning(file: str, found: dict[str, Any], tmp_path: Path) -> None:
    result = found["recipes"][list(FILES).index(file)]
    assert result["status"] == 0, result["err"]
    assert _warnings(result["out"]) == []
    assert result["out"].count("hf download") == 1 or (REPOSITORY / _model(file) / "tokenizer.json").is_file()
    totals = [float(x) for line in re.findall(r"^#   total +(.*)$", result["out"], re.M) for x in line.split()]
    stages = load_config(FILES[file], []).layout.pipeline
    assert len(totals) == stages * (2 if "sft" in file else 5) and 20 < max(totals) < 80 * 0.95
    nodes = NODES.get(file.split("/")[0], 1)
    assert f", {'1 node' if nodes == 1 else f'{nodes} nodes'}\n" in result["out"]
    printed = tmp_path / "printed.yaml"
    printed.write_text(result["out"])
    assert load_config(printed, []) == load_config(FILES[file], []), "what is printed is the configuration"


def _model(file: str) -> str:
    return load_config(FILES[file], []).model.hf_dir


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda i: f"{REFUSED[i][0]} {' '.join(REFUSED[i][1])}")
def test_what_cannot_run_is_refused_with_the_reason(index: int, found: dict[str, Any]) -> None:
    result = found["refused"][index]
    assert result["status"] == 2, result["out"][-2000:]
    assert result["err"].count("\n") == 1 and result["err"].startswith("megatron-sr1 ")
    for word in REFUSED[index][2]:
        assert word in result["err"]


@pytest.mark.parametrize("index", range(len(WARNED)), ids=lambda i: f"{WARNED[i][0]} {' '.join(WARNED[i][1])}")
def test_what_is_risky_is_named_with_a_remedy(index: int, found: dict[str, Any]) -> None:
    result, words = found["warned"][index], WARNED[index][2]
    assert result["status"] == 0, result["err"]
    warnings = _warnings(result["out"])
    if not words:
        assert warnings == []
    else:
        assert any(all(word in warning for word in words) for warning in warnings), warnings


# ---------------------------------------------------------------- real runs, which stop before they start
def _shards(folder: Path) -> list[str]:
    (folder / "any-0.tar").write_bytes(b"")
    return [f"data.{name}=[{folder}/any-*.tar]" for name in ("train", "heldout", "cold_start")]


@pytest.mark.parametrize("file", ["qwen2_5_vl_7b/grpo.yaml", "mimo_vl_7b/sft.yaml"])
def test_a_run_without_weights_says_how_to_get_them(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    if (REPOSITORY / _model(file) / "tokenizer.json").is_file():
        pytest.skip("this clone has the model")
    command = "sft" if "sft" in file else "grpo"
    with pytest.raises(SystemExit) as stopped:
        main([command, str(FILES[file]), *_shards(tmp_path), f"run_dir={tmp_path}/run"])
    repository = {"mimo_vl_7b": "XiaomiMiMo/MiMo-VL-7B-RL"}.get(file.split("/")[0], "Qwen/Qwen2.5-VL-7B-Instruct")
    message = str(stopped.value)
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "model.safetensors" in message and "tokenizer.json" in message and "preprocessor_config.json" in message
    assert message.endswith(f"hf download {repository} --local-dir {_model(file)}")


def test_a_run_without_data_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit, match=r"data\.cold_start: .* matches no file"):
        main(["sft", str(FILES["qwen2_5_vl_7b/sft.yaml"]), "data.cold_start=[nowhere/*.tar]"])


def test_missing_files_are_named_one_by_one(tmp_path: Path) -> None:
    from megatron_sr1.config import check_weights, missing_files

    config = load_config(None, [f"model.hf_dir={tmp_path}"])
    write_config(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors .*hf download REPOSITORY --local-dir"):
        check_weights(config, weights=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert missing_files(str(tmp_path), weights=False) == ["preprocessor_config.json"]
    (tmp_path / "preprocessor_config.json").write_text("{}")
    check_weights(config, weights=False)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    assert missing_files(str(tmp_path)) == ["model-2.safetensors"]
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    check_weights(config, weights=True)


# ---------------------------------------------------------------- base files
def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "top.yaml"


def test_later_bases_and_the_file_itself_win(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        top="base: [deep/one.yaml, two.yaml]\ntrain: {steps: 5}\n",
        deep__one="base: [../root.yaml]\nseed: 11\ntrain: {steps: 1, batch_size: 16}\nrun_dir: one\n",
        root="seed: 10\nnproc: 2\n",
        two="run_dir: two\ndata: {train: [b.tar]}\n",
    )
    config = load_config(path, ["train.batch_size=32"])
    assert (config.seed, config.nproc, config.run_dir) == (11, 2, "two")
    assert (config.train.steps, config.train.batch_size, list(config.data.train)) == (5, 32, ["b.tar"])
    assert load_config(_write(tmp_path, top="base: []\n"), []) == Config()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"top": "base: [gone.yaml]\n"}, ["base='gone.yaml'", "top.yaml", "is not a file"]),
        ({"top": "base: [top.yaml]\n"}, ["top.yaml -> ", "is a circle"]),
        ({"top": "base: [a.yaml]\n", "a": "base: [b.yaml]\n", "b": "base: [a.yaml]\n"}, ["a.yaml -> ", "b.yaml -> "]),
        ({"top": "base: other.yaml\n"}, ["base='other.yaml'", "a list of YAML files", "[other.yaml]"]),
        ({"top": "base: [3]\n"}, ["base=[3]", "a list of YAML files"]),
        ({"top": "base: [a.yaml]\n", "a": "train: {stepz: 3}\n"}, ["train.stepz", "save_every"]),
    ],
)
def test_a_wrong_base_is_named(files: dict[str, str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, **files), [])
    for word in words:
        assert word in str(caught.value)


def test_a_base_that_two_files_share_is_no_circle(tmp_path: Path) -> None:
    path = _write(tmp_path, top="base: [a.yaml, b.yaml]\n", a="base: [c.yaml]\n", b="base: [c.yaml]\n", c="seed: 4\n")
    assert load_config(path, []).seed == 4


@pytest.mark.parametrize("name", [name for name in FILES if Path(name).name.startswith("grpo")])
def test_grpo_recipes_have_the_values_of_the_paper_and_of_its_public_code(name: str) -> None:
    config = load_config(FILES[name], [])
    optimizer, objective, rollout, train = config.optimizer, config.objective, config.rollout, config.train
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (1e-6, 1e-2, 1.0)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.3, 3.0)
    assert (objective.kl_estimator, objective.kl_coef) == ("k3", 0.01)
    assert (rollout.samples_per_prompt, rollout.temperature, rollout.max_response_tokens) == (8, 1.0, 2048)
    assert (rollout.prompts_per_step, train.batch_size, train.steps) == (512, 128, 200)
