"""megatron-sr1 sft, grpo, evaluate, preflight CONFIG.yaml [key=value ...]; sweep; launch; watch; plan; report; credit;
convert; data; model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_sr1.cli.arguments import parse, started_config
from megatron_sr1.cli.convert import run_convert
from megatron_sr1.cli.credit import run_credit
from megatron_sr1.cli.plans import run_plan
from megatron_sr1.cli.reports import run_report, run_sweep
from megatron_sr1.cli.runs import start, start_preflight
from megatron_sr1.cli.tools import run_data, run_model
from megatron_sr1.cli.watch import run_watch
from megatron_sr1.config.mistakes import EXPECTED_ERRORS, MISTAKE_STATUS, one_line
from megatron_sr1.launch import run_launch
from megatron_sr1.printable import printable

INTERRUPTED_STATUS = os.EX_TEMPFAIL  # platform.STOPPED_STATUS, which torch would have to be imported for


class Mistake(SystemExit):
    """Ends the command with a message on stderr."""

    def __init__(self, message: str, status: int = MISTAKE_STATUS) -> None:
        super().__init__(status)
        self.message = message
        print(printable(message), file=sys.stderr)

    def __str__(self) -> str:
        return self.message


@contextmanager
def one_line_for_mistakes(name: str) -> Iterator[None]:
    """The one place where a command's expected errors become a line and a status.

    Raises:
        Mistake: such an error, or Ctrl-C where no loop that saves has taken it.
    """
    try:
        yield
    except EXPECTED_ERRORS as error:
        raise Mistake(f"megatron-sr1 {name}: {one_line(error)}") from error
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from what is saved, if anything"
        raise Mistake(f"megatron-sr1 {name}: {message}", INTERRUPTED_STATUS) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A mistake in the configuration, the data or the environment ends with one line and exit status 2."""
    args = parse(arguments)
    with one_line_for_mistakes(args.command):
        if args.command == "report":
            run_report(args)
        elif args.command == "credit":
            run_credit(args)
        elif args.command == "watch":
            run_watch(args.run, once=args.once)
        elif args.command == "convert":
            sys.exit(run_convert(args))
        elif args.command == "data":
            run_data(args)
        elif args.command == "model":
            run_model(args)
        elif args.command == "plan":
            run_plan(args)
        elif args.command == "preflight":
            start_preflight(started_config(args), args)
        elif args.command == "sweep":
            run_sweep(args)
        elif args.command == "launch":
            sys.exit(0 if run_launch(args) else 1)
        else:
            start(args.command, started_config(args), args)
