"""What a configuration is to run on."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs, as many as the run's ranks fill: one rank is one GPU."""

    gpu_gib: float = 80.0  # memory of one GPU: 80 for an H100, in GiB
    gpus_per_node: int = 8
    host_gib: float = 1800.0  # memory of a node beside its GPUs: what an H100 node of 2 TB leaves

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a size that is not positive.
        """
        for option, value in (
            ("--gpu-gib", self.gpu_gib),
            ("--gpus-per-node", self.gpus_per_node),
            ("--host-gib", self.host_gib),
        ):
            if not value > 0:
                raise ConfigError(
                    f"{option}={value} is not allowed: it must be greater than 0. 80, 8 and 1800 are an H100 node's."
                )

    def nodes(self, num_ranks: int) -> int:
        """
        Raises:
            ConfigError: the last of several nodes would be filled in part.
        """
        if num_ranks <= self.gpus_per_node:
            return 1
        if num_ranks % self.gpus_per_node:
            raise ConfigError(
                f"nproc={num_ranks} is not allowed: it must be a multiple of the {self.gpus_per_node} GPUs of a node. "
                "Change nproc, or give --gpus-per-node."
            )
        return num_ranks // self.gpus_per_node
