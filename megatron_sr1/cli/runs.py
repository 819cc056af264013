"""One run on this machine: checked first, then its ranks are started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_sr1.config import (
    Command,
    Config,
    check_command,
    check_folders,
    check_reference,
    check_resume,
    check_weights,
    dump_config,
)
from megatron_sr1.config.credentials import without_queries
from megatron_sr1.launch import started_rank
from megatron_sr1.phases import during
from megatron_sr1.printable import printable

if TYPE_CHECKING:
    from megatron_sr1.data import DataList

ENGINE = "megatron_sr1.rollout.vllm.imported"  # what a run without engines does not import
TRAINING_DATA: dict[Command, tuple[DataList, ...]] = {
    "sft": ("cold_start",),
    "grpo": ("train", "heldout"),
    "evaluate": ("heldout",),
}


def data_of(command: Command, config: Config) -> tuple[DataList, ...]:
    """The lists of data that a command reads."""
    measures = command == "sft" and config.train.heldout_every
    return (*TRAINING_DATA[command], "heldout") if measures else TRAINING_DATA[command]


def check_run(command: Command, config: Config) -> list[str]:
    """What can be checked of a run without torch. Returns what keeps it from its data: a line for each list
    of data whose files are missing.

    Raises:
        ValueError: anything else that is wrong, a key without files included.
    """
    from megatron_sr1.data import MissingFiles, check_data
    from megatron_sr1.prompts import templates_of

    missing = []
    for name in data_of(command, config):
        try:
            check_data(config.data, name)
        except MissingFiles as error:
            missing.append(str(error))
    check_command(command, config)
    templates = templates_of(config)
    if command != "sft":
        from megatron_sr1.streams import check_objective, check_siblings, preset_of

        check_objective(config.objective, config.rewards, config.model.megatron_dir, templates=templates)
        preset = preset_of(config)
        check_reference(config, {later.reader for later in preset.passes.later})
        if command == "grpo":
            check_siblings(preset.distorted, config)
    if command != "evaluate":
        check_folders(config)
        check_resume(config)
    return missing


def start(command: Command, config: Config, args: argparse.Namespace) -> None:
    """Checks the run, then starts its ranks; with --dry-run it prints what they would hold instead.

    Raises:
        ValueError: what is wrong with the configuration, the data or the model.
    """
    missing_data = check_run(command, config)
    if "heldout" in (names := data_of(command, config)) and len(names) > 1 and not missing_data:
        _warn_of_shared_files(config, names[0])
    parts: dict[str, Any] = {}
    if command == "grpo":
        _check_parts(args)
        parts = {"rollouts_only": args.rollouts_only, "from_rollouts": args.from_rollouts}
    if command == "evaluate":
        parts = {"restart": args.restart}
    if args.dry_run:
        _dry_run(command, config, args, missing_data)
        return
    only_trained = command == "sft" or (command == "grpo" and args.train_only)
    _prepare(command, config, missing_data, only_trained=only_trained)
    imports = (f"megatron_sr1.loops.{command}", *(() if only_trained else (ENGINE,)))
    if started_rank(os.environ) is None:  # else others start as many commands
        ranks = f"{config.nproc} ranks" if config.nproc > 1 else "1 rank"
        print(printable(f"starting {ranks} of {command} in {config.run_dir}"), flush=True)
    _start_ranks(command, config, parts, imports)


def start_preflight(config: Config, args: argparse.Namespace) -> None:
    """Checks what `start` checks of the run, then starts its ranks to check the rest.

    Raises:
        ValueError: what is wrong, or which check has failed.
    """
    command: Command = args.checked
    _prepare(command, config, check_run(command, config), only_trained=command == "sft")
    imports = ("megatron_sr1.loops.preflight", *(() if command == "sft" else (ENGINE,)))
    _start_ranks("preflight", config, {"command": command, "as_json": args.json}, imports)


def _start_ranks(command: str, config: Config, parts: dict[str, Any], imports: Sequence[str]) -> None:
    from megatron_sr1.platform import run_on_ranks

    timeout = timedelta(minutes=config.timeout_minutes)
    run_on_ranks(_run, config.nproc, command, config, parts, during.began, imports=imports, timeout=timeout)


def _prepare(command: Command, config: Config, missing_data: Sequence[str], *, only_trained: bool) -> None:
    """What the ranks will find: data, weights, the keys of endpoints.

    Args:
        only_trained: no engine is started.
    """
    if missing_data:
        raise ValueError(missing_data[0])
    judges = [config.rewards.judge.endpoint] if command != "sft" and config.rewards.judge.url else []
    judges += [config.evaluate.judge] if command == "evaluate" and config.evaluate.judge_url else []
    if judges:
        from megatron_sr1.judge import judge_key

        for judge in judges:
            judge_key(judge)
    check_weights(config, weights=not (only_trained and config.model.megatron_dir))
    from megatron_sr1.data import prepare_data

    for name in data_of(command, config):
        prepare_data(config.data, name, _say)


def _warn_of_shared_files(config: Config, trained: DataList) -> None:
    """On stderr."""
    from megatron_sr1.data import files_of

    train, heldout = files_of(config.data, trained), files_of(config.data, "heldout")
    if shared := sorted(train.keys() & heldout.keys()):
        _say(
            f"warning: {len(shared)} files of data.heldout are trained on, too ({shared[0]}): evaluations will look "
            "better than they are."
        )


def _say(line: str) -> None:
    """On stderr; of URLs without what signs them."""
    print(printable(without_queries(line)), file=sys.stderr, flush=True)


def _check_parts(args: argparse.Namespace) -> None:
    if args.train_only != (args.from_rollouts is not None):
        raise ValueError("--train-only and --from-rollouts DIR go together: the first needs rollouts to train from.")
    if args.train_only and args.rollouts_only:
        raise ValueError(
            "--train-only and --rollouts-only exclude each other: one reads rollouts, the other makes them."
        )
    if args.train_only and not args.from_rollouts.is_dir():
        raise ValueError(f"--from-rollouts {args.from_rollouts}: not a folder. Give the `rollouts` folder of a run.")


def _dry_run(command: Command, config: Config, args: argparse.Namespace, missing_data: Sequence[str]) -> None:
    """Prints the configuration, and as comments below it what each rank would hold. What is printed loads again."""
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.data import check_data
    from megatron_sr1.estimate import Machine, advice, check_fits, make_plan, plan_text

    plan = make_plan(command, config, Machine(args.gpu_gib, args.gpus_per_node, args.host_gib))
    print(dump_config(config))
    notes = (
        [] if missing_data else [note for name in data_of(command, config) for note in check_data(config.data, name)]
    )
    if command != "evaluate" and config.train.steps is None:
        print(f"# train.epochs={config.train.epochs:g}: the run says at its start how many steps that is")
    for line in plan_text(plan, [*missing_data, *notes, *advice(plan)]).splitlines():
        print(f"# {line}".rstrip())
    check_fits(plan)


def _run(command: str, config: Config, parts: dict[str, Any], began: float) -> None:
    """One rank, of a command that began at `began`, as of time.time(). The platform comes first: Megatron-Core may be
    imported only after it is prepared."""
    during.began = began
    from megatron_sr1.platform import make_deterministic, start_platform

    if config.precision.deterministic:
        make_deterministic()
    platform = start_platform(timedelta(minutes=config.timeout_minutes))
    match command:
        case "sft":
            from megatron_sr1.loops.sft import run_sft as run
        case "grpo":
            from megatron_sr1.loops.grpo import run_grpo

            run = partial(run_grpo, **parts)
        case "preflight":
            from megatron_sr1.loops.preflight import run_preflight

            run_preflight(config, platform, **parts)
            return  # of no run: there is nothing to send
        case _:
            from megatron_sr1.loops.evaluate import run_evaluate

            run = partial(run_evaluate, **parts)
    run(config, platform)
    if platform.is_main:
        from megatron_sr1.metrics import send_evaluations

        send_evaluations(config)
