"""megatron-sr1 sft, grpo, evaluate CONFIG.yaml [key=value ...]; sweep; launch; report; convert."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_sr1.cli.arguments import parse, sources
from megatron_sr1.cli.convert import run_convert
from megatron_sr1.cli.reports import run_report, run_sweep
from megatron_sr1.cli.runs import start
from megatron_sr1.config import load_config
from megatron_sr1.launch import run_launch


class Mistake(SystemExit):
    """Ends the command with a message on stderr and exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message
        print(message, file=sys.stderr)

    def __str__(self) -> str:
        return self.message


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A mistake in the configuration or the data ends with one line and exit status 2."""
    args = parse(arguments)
    try:
        if args.command == "report":
            run_report(args.runs, args.out)
        elif args.command == "convert":
            sys.exit(run_convert(args))
        elif args.command == "sweep":
            run_sweep(args)
        elif args.command == "launch":
            sys.exit(0 if run_launch(args) else 1)
        else:
            start(args.command, load_config(*sources(args)), args)
    except ValueError as error:
        raise Mistake(f"megatron-sr1 {args.command}: {error}") from error
