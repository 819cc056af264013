"""What a run looks at before its first step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.rules import COUNT_OR_NONE, check_numbers


@dataclass(frozen=True)
class PreflightConfig:
    """Checks before the first step of `grpo` and `sft`, and of `megatron-sr1 preflight`: docs/preflight.md."""

    enabled: bool = True  # false: a run checks nothing of this; the command does in any case
    prompts: int = 32  # of data.train that are answered, graded and compared; 0: no engine is asked anything

    def __post_init__(self) -> None:
        check_numbers("preflight", self, {"prompts": COUNT_OR_NONE})
