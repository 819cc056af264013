"""The shell script of a task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.launch.experiment import Step, Task
from megatron_sr1.launch.settings import LaunchSettings

STOPPED_STATUS = 75  # platform.STOPPED_STATUS: the run was asked to stop, and saved
STOPPED_MARK = ".stopped"  # among the marks of an experiment: nothing more is started
_TERMINATED_STATUS = 143  # 128 + SIGTERM: it had nothing to save yet

# A preempted job that ends by itself within its grace is finished for Slurm: only the job can say that it is not. A job
# that was cancelled is no longer RUNNING, and stays cancelled.
REQUEUE = f"""\
requeue_if_stopped() {{
  status=$?
  if [ $status -eq {STOPPED_STATUS} ] || [ $status -eq {_TERMINATED_STATUS} ]; then
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
      echo "asked to stop: back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
    fi
  fi
}}
trap requeue_if_stopped EXIT"""


def command_of(step: Step, settings: LaunchSettings) -> str:
    """The command line of a step, from the working directory."""
    program = ("-m", "megatron_sr1.cli", step.command)
    return shlex.join((settings.program, *program, *step.words))


def slurm_script(task: Task, settings: LaunchSettings) -> str:
    """What every srun task of the job runs: of an array, the run with the element's number."""
    lines = [f"cd {shlex.quote(str(settings.folder))} || exit 1"]
    commands = [command_of(step, settings) for step in task.steps]
    if len(commands) == 1:
        return "\n".join([*lines, f"exec {commands[0]}"]) + "\n"
    lines.append('case "$SLURM_ARRAY_TASK_ID" in')
    lines += [f"  {number}) exec {command} ;;" for number, command in enumerate(commands)]
    return "\n".join([*lines, "esac", "exit 1"]) + "\n"


def local_script(name: str, step: Step, settings: LaunchSettings, marks: Path, before: Sequence[str]) -> str:
    """Tries a step until it succeeds, is asked to stop, or `retries` are used up.

    NeMo-Run's local and Docker executors start what depends on a task whether that succeeded or not: here each step
    that does leaves a mark, and one without the marks of those before it does not start. While it runs, `<name>.pid`
    is there too: its process group.

    Args:
        name: of the job.
        marks: a folder of this experiment alone; the first step makes it.
        before: names of the jobs that must have succeeded.
    """
    succeeded, process = shlex.quote(str(marks / name)), shlex.quote(str(marks / f"{name}.pid"))
    lines = [
        f"cd {shlex.quote(str(settings.folder))} || exit 1",
        f"mkdir -p {shlex.quote(str(marks))}",
        f"[ -e {shlex.quote(str(marks / STOPPED_MARK))} ] && exit {STOPPED_STATUS}",
        "trap : TERM USR1  # they are for the step; this script sees how it ends",
        f"process={process}",
        "trap 'rm -f -- \"$process\"' EXIT",  # no path is pasted into it: the shell would read that twice
        'echo $$ > "$process.new" && mv -- "$process.new" "$process"',
    ]
    for other in before:
        sign, text = shlex.quote(str(marks / other)), shlex.quote(f"{name} is not started: {other} did not succeed")
        lines.append(f"[ -e {sign} ] || {{ echo {text}; exit 1; }}")
    lines += [
        f"for attempt in $(seq 0 {settings.retries}); do",
        f"  {command_of(step, settings)}",
        "  status=$?",
        f"  [ $status -eq 0 ] && touch {succeeded} && exit 0",
        f"  [ $status -eq {STOPPED_STATUS} ] && exit $status",
        f'  echo "attempt $attempt of {name} ended with status $status"',
        "done",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"
