"""`megatron-sr1 launch`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_sr1.launch.experiment import RANK_COMMANDS, read_experiment
from megatron_sr1.launch.settings import EXECUTORS, load_settings
from megatron_sr1.launch.submit import check_machine, doubts, print_scripts, submit


def add_launch_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="an experiment, a sweep or a configuration")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for a configuration, as without launch")
    command.add_argument("--command", dest="task", choices=RANK_COMMANDS, help="what a configuration is for")
    command.add_argument("--executor", choices=EXECUTORS, help="where; default: the settings' own, or local")
    command.add_argument("--settings", type=Path, metavar="FILE", help="a YAML file of megatron_sr1/launch/settings.py")
    command.add_argument("--set", action="append", default=[], metavar="key=value", help="over the settings' file")
    command.add_argument("--follow", action="store_true", help="print the tasks' logs until all have ended")
    command.add_argument("--dry-run", action="store_true", help="print the scripts, start nothing")


def run_launch(args: argparse.Namespace) -> bool:
    """Whether the experiment went well; on Slurm without --follow, whether it is queued.

    Raises:
        ConfigError: a mistake in the files or the options, or something that is missing on this machine.
    """
    chosen = [f"executor={args.executor}"] if args.executor else []
    settings = load_settings(args.settings, [*args.set, *chosen])
    experiment = read_experiment(args.config, args.task, args.overrides, settings.num_ranks)
    check_machine(settings, os.environ)
    if args.dry_run:
        print_scripts(experiment, settings)
        for doubt in doubts(experiment, settings):
            print(f"warning: {doubt}", file=sys.stderr)
        return True
    return submit(experiment, settings, follow=args.follow)
