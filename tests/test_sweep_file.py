"""Sweep files: which runs they make, and what is wrong with them said before anything starts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.cli import main
from megatron_sr1.config import PRESET_NAMES, ConfigError, dump_config, load_config
from megatron_sr1.launch.sweep import choose_runs, command_of, read_sweep, state_of
from tests.hf_config_cases import SMALL, write_config

REPOSITORY = Path(__file__).parent.parent
QUICKSTART = str(REPOSITORY / "examples" / "quickstart" / "grpo.yaml")


def sweep_file(folder: Path, **keys: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"config": QUICKSTART, "run_dir": str(folder / "runs"), **keys}, sort_keys=False))
    return path


def test_presets_variants_and_seeds_are_crossed_in_this_order(tmp_path: Path) -> None:
    variants = {"slow": ["optimizer.lr=1e-5"], "fast": ["optimizer.lr=1e-3", "objective.kl_coef=0"]}
    keys = {"presets": ["see_think", "gdpo"], "seeds": [3, 4], "overrides": ["train.steps=7"], "variants": variants}
    sweep = read_sweep(sweep_file(tmp_path, command="grpo", **keys))
    assert [run.name for run in sweep.runs] == [
        *("see_think-slow-seed3", "see_think-slow-seed4", "see_think-fast-seed3", "see_think-fast-seed4"),
        *("gdpo-slow-seed3", "gdpo-slow-seed4", "gdpo-fast-seed3", "gdpo-fast-seed4"),
    ]
    run = sweep.runs[-1]
    assert (run.preset, run.variant, run.seed) == ("gdpo", "fast", 4)
    assert run.run_dir == str(tmp_path / "runs" / "gdpo-fast-seed4")
    assert command_of(sweep, run)[:2] == ["grpo", QUICKSTART]
    config = load_config(command_of(sweep, run)[1], command_of(sweep, run)[2:])
    assert config == sweep.config_of(run)
    assert (config.train.steps, config.optimizer.lr, config.objective.kl_coef) == (7, 1e-3, 0)
    assert (config.seed, config.objective.preset, config.run_dir) == (4, "gdpo", run.run_dir)


def test_without_presets_and_seeds_it_is_the_configuration_itself(tmp_path: Path) -> None:
    (run,) = read_sweep(sweep_file(tmp_path)).runs
    assert (run.name, run.preset, run.variant, run.seed) == ("vision_sr1-seed1", "vision_sr1", "", 1)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from(PRESET_NAMES), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    st.lists(st.from_regex(r"[a-z][a-z0-9_.]{0,4}", fullmatch=True), max_size=2, unique=True),
)
def test_every_run_has_a_name_and_a_folder_of_its_own(tmp_path_factory, presets, seeds, variants) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    keys = {"presets": presets, "seeds": seeds, "variants": {name: ["train.steps=3"] for name in variants}}
    sweep = read_sweep(sweep_file(folder, **keys))
    assert len(sweep.runs) == len(presets) * len(seeds) * max(1, len(variants))
    assert len({run.name for run in sweep.runs}) == len({run.run_dir for run in sweep.runs}) == len(sweep.runs)
    assert all(Path(run.run_dir) == folder / "runs" / run.name for run in sweep.runs)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"preset": ["gdpo"]}, ["preset is not allowed", "presets"]),
        ({"command": "evaluate"}, ["command='evaluate'", "sft, grpo"]),
        ({"config": "nowhere.yaml"}, ["config='nowhere.yaml'", "not a file"]),
        ({"run_dir": ""}, ["run_dir is missing"]),
        ({"run_dir": 3}, ["run_dir=3"]),
        ({"presets": "gdpo"}, ["presets='gdpo'", "a list"]),
        ({"presets": ["gdpo", "gdpo"]}, ["gdpo-seed1 would run twice"]),
        ({"presets": ["grpo"]}, ["run grpo-seed1", "objective.preset='grpo'", "vision_sr1"]),
        ({"seeds": ["one"]}, ["seeds=['one']", "[1, 2]"]),
        ({"seeds": [True]}, ["seeds=[True]"]),
        ({"seeds": [1, 2, 1]}, ["vision_sr1-seed1 would run twice"]),
        ({"overrides": ["train.stesp=3"]}, ["run vision_sr1-seed1", "train.stesp"]),
        ({"overrides": ["train.steps"]}, ["run vision_sr1-seed1", "key=value"]),
        ({"overrides": ["train.batch_size=5"]}, ["run vision_sr1-seed1", "train.batch_size", "prompts_per_step"]),
        ({"overrides": ["seed=3"]}, ["'seed=3'", "the sweep sets"]),
        ({"variants": {"a": ["objective.preset=gdpo"]}}, ["a: 'objective.preset=gdpo'", "the sweep sets"]),
        ({"variants": {"a": "optimizer.lr=1"}}, ["variants=", "lists"]),
        ({"variants": {"../a": []}}, ["variants.../a", "names a folder"]),
        ({"variants": {"a": [], "b": ["optimizer.lr=0"]}}, ["run vision_sr1-b-seed1", "optimizer.lr"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, keys: dict[str, object], words: list[str]) -> None:
    path = sweep_file(tmp_path, **keys)
    with pytest.raises(ConfigError) as error:
        read_sweep(path)
    for word in (str(path), *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n", "holds a list"), ("a: b: c\n", "line 1: mapping values"), ("seeds: [1]\nseeds: [2]\n", "duplicate key")],
)
def test_a_file_that_is_no_sweep_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_sweep(path)
    with pytest.raises(ConfigError, match="is not a file"):
        read_sweep(tmp_path / "none.yaml")


def test_a_variant_replaces_lists_of_all_runs(tmp_path: Path) -> None:
    own = {"other": ["data.train=[b.tar]"], "later": ["objective.dual_clip=null", "data.train=[c.tar]"]}
    sweep = read_sweep(sweep_file(tmp_path, seeds=[1], overrides=["data.train=[a.tar]"], variants=own))
    assert [sweep.config_of(run).data.train for run in sweep.runs] == [("b.tar",), ("c.tar",)]
    assert all(sum(word.startswith("data.train=") for word in run.overrides) == 1 for run in sweep.runs)


def test_sections_of_all_runs_and_of_a_variant_are_joined(tmp_path: Path) -> None:
    own = {"a": ["optimizer={beta2: 0.9}", "optimizer={eps: 1e-7}"]}
    (run,) = (
        sweep := read_sweep(sweep_file(tmp_path, seeds=[1], overrides=["optimizer={lr: 3e-5}"], variants=own))
    ).runs
    optimizer = sweep.config_of(run).optimizer
    assert (optimizer.lr, optimizer.beta2, optimizer.eps) == (3e-5, 0.9, 1e-7)
    with pytest.raises(ConfigError, match=r"variants?.*objective=\{preset: gdpo\}.*the sweep sets|a: .*the sweep sets"):
        read_sweep(sweep_file(tmp_path, seeds=[1], variants={"a": ["objective={preset: gdpo}"]}))


def test_the_ablation_of_the_quickstart() -> None:
    sweep = read_sweep(REPOSITORY / "examples" / "quickstart" / "ablation.yaml")
    assert [run.name for run in sweep.runs] == [
        *("see_think-seed1", "see_think-seed2", "vision_sr1-seed1", "vision_sr1-seed2"),
    ]
    assert {sweep.config_of(run).model.hf_dir for run in sweep.runs} == {"runs/quickstart/sft/hf"}


def test_states_of_a_run(tmp_path: Path) -> None:
    overrides = ["evaluate.verify_export=4"]
    sweep = read_sweep(sweep_file(tmp_path, seeds=[1, 2], overrides=overrides))
    run, folder = sweep.runs[0], Path(sweep.runs[0].run_dir)
    assert state_of(sweep, run) == "new"
    (folder / "hf").mkdir(parents=True)
    assert state_of(sweep, run) == "new", "a folder without a configuration is no run yet"
    config = load_config(QUICKSTART, [*run.overrides, "track.wandb.mode=offline"])
    (folder / "config.yaml").write_text(dump_config(config))
    assert state_of(sweep, run) == "started", "a tracker makes no other run"
    (folder / "hf" / "config.json").write_text("{}")
    assert state_of(sweep, run) == "started", "the export is not verified"
    (folder / "export.json").write_text("{}")
    assert state_of(sweep, run) == "finished"
    assert state_of(sweep, sweep.runs[1]) == "new"

    longer = read_sweep(sweep_file(tmp_path, seeds=[1], overrides=[*overrides, "train.steps=500"]))
    with pytest.raises(ConfigError, match=r"vision_sr1-seed1.*train\.steps: 120 there, 500 now.*Remove"):
        state_of(longer, longer.runs[0])


def test_choosing_runs(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, seeds=[1, 2, 3]))
    assert choose_runs(sweep, []) == list(sweep.runs)
    chosen = choose_runs(sweep, ["vision_sr1-seed3", "vision_sr1-seed1"])
    assert [run.seed for run in chosen] == [1, 3]
    with pytest.raises(ConfigError, match=r"vision_sr1-seed4.*has no such run.*vision_sr1-seed3"):
        choose_runs(sweep, ["vision_sr1-seed4"])


# ---------------------------------------------------------------- the command
@pytest.fixture
def runnable(tmp_path: Path) -> list[str]:
    """Overrides with which the shards are there and the model divides."""
    for name in ("train", "heldout"):
        (tmp_path / f"{name}-0.tar").write_bytes(b"")
    write_config(tmp_path / "model", SMALL)
    shards = [f"data.{name}=[{tmp_path}/{name}-*.tar]" for name in ("train", "heldout")]
    return [f"model.hf_dir={tmp_path}/model", *shards]


def test_dry_run_prints_commands_that_say_it_all(
    tmp_path: Path, runnable: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, seeds=[1, 2], overrides=runnable)
    main(["sweep", str(path), "--dry-run", "--only", "vision_sr1-seed2"])
    (line,) = capsys.readouterr().out.splitlines()
    state, _, command = line.partition(": ")
    assert state == "vision_sr1-seed2 (new)"
    program, name, config, *overrides = shlex.split(command)
    assert (program, name) == ("megatron-sr1", "grpo")
    assert load_config(config, overrides) == read_sweep(path).config_of(read_sweep(path).runs[1])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "words", "message"),
    [
        ([], ["--jobs", "0"], "--jobs 0"),
        ([], ["--only", "gdpo-seed1"], "has no such run"),
        (["data.train=[/nowhere/*.tar]"], [], r"run vision_sr1-seed1: data\.train"),
        (["layout.tensor=8", "nproc=8", "train.batch_size=8"], [], r"layout\.tensor"),
        (["model.hf_dir=/nowhere"], [], r"model\.hf_dir"),
    ],
)
def test_mistakes_stop_a_sweep_before_anything_starts(
    tmp_path: Path, runnable: list[str], overrides: list[str], words: list[str], message: str
) -> None:
    path = sweep_file(tmp_path, overrides=[*runnable, *overrides])
    with pytest.raises(SystemExit, match=message):
        main(["sweep", str(path), *words])
    assert not (tmp_path / "runs").exists()


def test_report_takes_one_sweep_or_runs(tmp_path: Path) -> None:
    path = sweep_file(tmp_path)
    with pytest.raises(SystemExit, match="has made a step yet"):
        main(["report", str(path)])
    with pytest.raises(SystemExit, match="Give it alone"):
        main(["report", str(path), str(tmp_path)])
