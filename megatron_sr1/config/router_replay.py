"""`objective.router_replay`: whose choice of experts every pass of the trainer follows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.rules import require
from megatron_sr1.config.whole import Config
from megatron_sr1.types import RouterReplay

_DENSE = "none or null: the model has no experts"


@dataclass(frozen=True)
class Replay:
    """What is replayed of a model: k of E experts for a token, in M layers."""

    who: RouterReplay = "none"
    layers: int = 0  # M
    chosen: int = 0  # k
    experts: int = 0  # E

    @property
    def id_bytes(self) -> int:
        """Of one expert's id."""
        return 1 if self.experts <= 256 else 2

    @property
    def token_bytes(self) -> int:
        """Of a token's ids."""
        return self.layers * self.chosen * self.id_bytes


NO_REPLAY = Replay()


def replay_of(config: Config) -> Replay:
    """What null means: the trainer's own choice is replayed for a mixture of experts, none for a dense model.

    Raises:
        ConfigError: see `read_hf_config`.
    """
    model, who = read_hf_config(config.model.hf_dir), config.objective.router_replay
    if not model.num_experts:
        return NO_REPLAY
    return Replay(who or "trainer", sum(model.moe_layers), model.experts_per_token, model.num_experts)


def check_router_replay(config: Config) -> None:
    """
    Raises:
        ConfigError: a dense model has nothing to replay; engines that do not say where they sent their tokens.
    """
    who = config.objective.router_replay
    if who in (None, "none"):
        return
    require(replay_of(config).who == who, "objective.router_replay", who, _DENSE, "Leave it out.")
    if who == "generator":
        require(
            config.rollout.engine_tensor == 1,
            "objective.router_replay",
            who,
            f"trainer or none with rollout.engine_tensor={config.rollout.engine_tensor}: vLLM tells the first rank of "
            "an engine alone which experts it chose",
            "Set objective.router_replay=trainer.",
        )
        require(
            config.rollout.engine.get("enable_prefix_caching") in (None, True),
            "rollout.engine.enable_prefix_caching",
            config.rollout.engine.get("enable_prefix_caching"),
            "true or null with objective.router_replay=generator: vLLM keeps the experts of tokens by the blocks of "
            "prefixes",
            "Leave it out, or set objective.router_replay=trainer.",
        )
