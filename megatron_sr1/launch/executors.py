"""NeMo-Run's executors, from the settings."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from megatron_sr1.launch.experiment import Task
from megatron_sr1.launch.script import REQUEUE
from megatron_sr1.launch.settings import LaunchSettings

if TYPE_CHECKING:
    from nemo_run import DockerExecutor, LocalExecutor, SlurmExecutor  # pyright: ignore[reportMissingImports]


def local_executor(settings: LaunchSettings) -> LocalExecutor:
    """Processes of this machine, with the variables of this shell."""
    from nemo_run import LocalExecutor  # pyright: ignore[reportMissingImports]

    return LocalExecutor(env_vars=dict(settings.variables))


def docker_executor(settings: LaunchSettings) -> DockerExecutor:
    """Containers of this machine's Docker."""
    from nemo_run import DockerExecutor, Packager  # pyright: ignore[reportMissingImports]

    container = settings.container
    assert container.image is not None
    return DockerExecutor(
        container_image=container.image,
        num_gpus=container.gpus or None,
        shm_size=container.shm_size,
        volumes=[*_mounts(settings), f"{settings.log_folder}:{settings.log_folder}"],
        env_vars={"HOME": "/tmp", **settings.variables},  # the user below has no home in the image
        packager=Packager(),
        # The image's entry point is megatron-sr1; what a task writes belongs to who launched it.
        additional_kwargs={"entrypoint": [""], "user": f"{os.getuid()}:{os.getgid()}"},
    )


def slurm_executor(settings: LaunchSettings, task: Task) -> SlurmExecutor:
    """One job for a task, an array for a sweep; a rank is a task of srun.

    Slurm itself hands the variables of this shell on (sbatch --export=ALL), so those of `env` need no mention but to
    the container.
    """
    from nemo_run import LocalTunnel, Packager, SlurmExecutor  # pyright: ignore[reportMissingImports]

    slurm, container = settings.slurm, settings.container
    num_steps = len(task.steps)
    array = None
    if num_steps > 1:
        array = f"0-{num_steps - 1}" + (f"%{slurm.parallel}" if slurm.parallel else "")
    return SlurmExecutor(
        account=slurm.account or None,  # type: ignore[arg-type]  # clusters without accounts know none
        partition=slurm.partition,
        qos=slurm.qos,
        time=slurm.time,
        nodes=slurm.nodes if task.on_ranks else 1,
        ntasks_per_node=slurm.tasks_per_node if task.on_ranks else 1,
        gpus_per_node=slurm.gpus_per_node,
        cpus_per_task=slurm.cpus_per_task,
        mem=slurm.mem,
        signal=slurm.signal,
        array=array,
        container_image=container.image,
        container_mounts=_mounts(settings) if container.image else [],
        container_env=list(settings.env) or None,
        additional_parameters=dict(slurm.extra) or None,
        # A rank that ends first must not have the others killed, whose status would then hide that it was asked to
        # stop. --wait=60, which NeMo-Run gives, still ends what a crash leaves.
        srun_args=["--kill-on-bad-exit=0", "--chdir", str(settings.folder)],
        setup_lines="\n".join([*slurm.setup, REQUEUE]),
        job_name_prefix=f"{slurm.account}-" if slurm.account else "sr1-",
        dependency_type=slurm.dependency,
        retries=settings.retries,
        env_vars={
            name: shlex.quote(value) for name, value in settings.variables.items()
        },  # it writes export NAME=value
        packager=Packager(),
        tunnel=LocalTunnel(job_dir=str(settings.log_folder / "experiments")),
        poll_estimated_start_time=False,
    )


def _mounts(settings: LaunchSettings) -> list[str]:
    return [f"{settings.folder}:{settings.folder}", *settings.container.mounts]
