"""The words of the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.cli.convert import add_convert_options
from megatron_sr1.cli.tools import add_data_options, add_model_options
from megatron_sr1.config import Config, load_config
from megatron_sr1.config.yaml_files import read_mapping
from megatron_sr1.launch import add_launch_options, started_rank

HELP = {
    "sft": "cold start: supervised fine-tuning on both response layouts",
    "grpo": "self-rewarded reinforcement learning",
    "evaluate": "evaluation of both passes on data.heldout: of model.hf_dir, or of what a run has trained",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; `overrides` has all key=value words, also those that options stand for."""
    parser = argparse.ArgumentParser(prog="megatron-sr1", description="Self-rewarded RL of vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        metavar = "CONFIG.yaml|RUN" if name == "evaluate" else "CONFIG.yaml"
        command.add_argument("config", type=Path, metavar=metavar)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=10")
        command.add_argument("--nproc", type=int, help="ranks on this machine; the same as nproc=N")
        _add_dry_run(command)
        if name == "grpo":
            _add_parts(command)
        if name == "evaluate":
            command.add_argument("--restart", action="store_true", help="remove what an earlier evaluation left first")
    _add_preflight(commands.add_parser("preflight", help="what a run would look at before its first step, and a table"))
    _add_sweep(commands.add_parser("sweep", help="the runs of a sweep file on this machine, then their report"))
    text = "experiments of dependent tasks, and sweeps, on this machine, in containers or on Slurm, by NeMo-Run"
    add_launch_options(commands.add_parser("launch", help=text, description=text))
    text = "checkpoints between Hugging Face and Megatron-Core, and their comparison"
    add_convert_options(commands.add_parser("convert", help=text, description=text))
    text = "samples as a model will see them"
    add_data_options(commands.add_parser("data", help=text, description=text))
    text = "small models to try things on"
    add_model_options(commands.add_parser("model", help=text, description=text))
    _add_plan(commands.add_parser("plan", help="the fastest layouts of a GRPO run on so many GPUs, by prediction"))
    _add_report(commands.add_parser("report", help="table and page of runs, or of a sweep, with their rollouts"))
    _add_watch(commands.add_parser("watch", help="a run from another shell: how far it is, and whether it lives"))
    _add_credit(commands.add_parser("credit", help="which tokens of a saved step two objectives would credit"))
    args, rest = parser.parse_known_args(arguments)
    if args.command in ("convert", "report", "credit", "sweep", "watch", "data", "model") or any(
        word.startswith("-") for word in rest
    ):
        parser.parse_args(arguments)  # ends here where words are left that no option takes
        return args
    args.overrides += rest  # argparse takes overrides that follow an option for unknown words
    if args.command not in ("launch", "plan") and args.nproc is not None:
        args.overrides.append(f"nproc={args.nproc}")
    return args


def started_config(args: argparse.Namespace) -> Config:
    """The configuration of `sft`, `grpo` or `evaluate`. Where torchrun or srun has started this rank, the environment
    gets torchrun's variables, and nproc is their number unless it says another.

    Raises:
        ValueError: what is wrong with it, or with the environment.
    """
    rank = started_rank(os.environ)
    if rank is None:
        return load_config(*sources(args))
    config = load_config(*sources(args), defaults=[f"nproc={rank.num_ranks}"])
    rank.check(config)
    os.environ.update(rank.variables)
    return config


def sources(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The configuration file and the overrides. For `evaluate` a run folder stands for its configuration and for the
    weights it exported; the results go to its folder `evaluate`.

    Raises:
        ValueError: the folder is not one of a finished run.
    """
    run = args.config
    if args.command != "evaluate" or not run.is_dir():
        return run, args.overrides
    if not (run / "config.yaml").is_file() or not (run / "hf" / "config.json").is_file():
        raise ValueError(
            f"{run} is not the folder of a finished run, which holds config.yaml and hf/config.json. Let the run end, "
            "or give a configuration with model.hf_dir."
        )
    kept = read_mapping(run / "config.yaml")
    began = str(kept.get("objective", {}).get("reference_dir") or kept.get("model", {}).get("hf_dir") or "")
    own = [f"model.hf_dir={run / 'hf'}", f"run_dir={run / 'evaluate'}", "evaluate.verify_export=0"]
    own += [f"objective.reference_dir={began}"] if began else []
    return run / "config.yaml", [*own, *args.overrides]


def _add_preflight(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for example preflight.prompts=64")
    command.add_argument("--nproc", type=int, help="ranks on this machine; the same as nproc=N")
    text = "the run that is to be started (default: grpo)"
    command.add_argument("--command", choices=("grpo", "sft"), default="grpo", dest="checked", help=text)
    command.add_argument("--json", action="store_true", help="print the rows as JSON")


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time; each has the ranks that nproc says")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs of the sweep alone")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the commands, stop")


def _add_report(command: argparse.ArgumentParser) -> None:
    text = "run folders, folders that hold some, or a sweep's YAML file"
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN|SWEEP.yaml", help=text)
    text = "the rollouts of this step, several times for several, or all; default: as many steps as stay quick"
    command.add_argument("--step", action="append", metavar="N|all", help=text)
    command.add_argument("--out", type=Path, help="the page; default: report.html in the first folder")
    command.add_argument("--serve", action="store_true", help="then serve the page on this machine, until Ctrl-C")
    command.add_argument("--port", type=int, help="of the server; default: a free one")
    command.add_argument("--host", help="of the server, one of this machine's own addresses; default: 127.0.0.1")


def _add_watch(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="its folder, run_dir; it need not be there yet")
    command.add_argument("--once", action="store_true", help="print what is known now, and end")


def _add_credit(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a GRPO run")
    command.add_argument("--step", type=int, required=True, metavar="N", help="as in rollouts/step_N and metrics.jsonl")
    text = "a preset, or a YAML file whose section objective changes the run's; default: the run's own objective"
    command.add_argument("--preset", metavar="A", help=text)
    command.add_argument("--against", required=True, metavar="B", help="what it is compared with: the same kinds")
    command.add_argument("--out", type=Path, help="the page; default: credit.html in the folder")


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for example rollout.kv_cache_gib=30")
    command.add_argument("--gpus", required=True, metavar="N,N,...", help="for example 64,128,256,512")
    command.add_argument("--top", type=int, default=3, metavar="N", help="layouts of each number (default: 3)")
    _add_machine(command)


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    text = "check everything, print the configuration and the memory it takes on GPUs, stop; needs no GPU, no weights"
    command.add_argument("--dry-run", action="store_true", help=text)
    _add_machine(command)


def _add_machine(command: argparse.ArgumentParser) -> None:
    text = "memory of a GPU to plan for (default: 80)"
    command.add_argument("--gpu-gib", type=float, default=80.0, metavar="N", help=text)
    text = "GPUs of a node to plan for (default: 8)"
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help=text)
    text = "host memory of a node to plan for (default: 1800)"
    command.add_argument("--host-gib", type=float, default=1800.0, metavar="N", help=text)


def _add_parts(command: argparse.ArgumentParser) -> None:
    parts = command.add_argument_group("parts of a run, to look into a step")
    text = "generate, grade and save the rollouts of the steps; train nothing"
    parts.add_argument("--rollouts-only", action="store_true", help=text)
    parts.add_argument("--train-only", action="store_true", help="train from saved rollouts; start no engine")
    parts.add_argument("--from-rollouts", type=Path, metavar="DIR", help="the `rollouts` folder for --train-only")
