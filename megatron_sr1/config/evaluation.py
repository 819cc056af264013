"""Evaluation on held-out shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_sr1.config.judge import JUDGE_NUMBERS, Endpoint
from megatron_sr1.config.rules import COUNT, COUNT_OR_NONE, Range, check_numbers, require

ControlName = Literal["prior", "shuffled", "gold", "reference", "other_question"]
CONTROLS: tuple[ControlName, ...] = get_args(ControlName)  # in the order in which they are kept and shown
_NUMBERS = {
    "max_prompts": COUNT_OR_NONE,
    "examples": COUNT_OR_NONE,
    "verify_export": COUNT_OR_NONE,
    "samples": COUNT,
    "temperature": Range(0, 100),
    "chunk_prompts": COUNT,
    **{f"judge_{name}": allowed for name, allowed in JUDGE_NUMBERS.items()},
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of both passes on `data.heldout`.

    The judge is a second opinion on the descriptions: a model behind any OpenAI-compatible endpoint answers from
    description and question, as text, and its answers are graded like all others. `megatron-sr1 evaluate` asks it; a
    run that evaluates while it trains does not.
    """

    max_prompts: int = 0  # 0: all
    examples: int = 12  # how many are kept with their images for the report
    verify_export: int = 0  # answers that transformers must repeat on the exported model (it loads it on one rank)
    samples: int = 1  # responses to each prompt; above 1 pass@k is measured
    temperature: float = 0.0  # 0: greedy
    rounded_decimals: bool = False  # true: 0.33 counts for 1/3 (two digits or more); training never counts it
    chunk_prompts: int = 512  # that passes which wait for other prompts are answered with; then a progress line
    # of the second pass: prior, shuffled, gold, reference, other_question (docs/evaluation.md); each is a text-only
    # answer more for every sample. Empty: none
    controls: tuple[str, ...] = ("prior", "shuffled", "gold")
    gold_field: str = "facts"  # field of the metadata that the control gold reads: a text, or a list
    other_questions: str = ""  # field of the metadata that the control other_question asks first, as a pass' `question`
    judge_url: str = ""  # for example http://127.0.0.1:8000/v1; empty: no judge
    judge_model: str = ""  # the name that the endpoint knows it by
    judge_api_key_env: str = ""  # NAME of the environment variable that holds the key; empty: the endpoint needs none
    # of each request, by the endpoint's own names; null leaves one out
    judge_parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 2048})
    judge_concurrency: int = 8  # requests at once
    judge_timeout: float = 120.0  # seconds of one request, to the last byte of its answer
    judge_retries: int = 6  # of one question, after a failure that may pass
    judge_backoff: float = 1.0  # seconds before the first retry, about; doubled before each further one
    judge_max_wait: float = 120.0  # seconds before a retry, at most, also where the endpoint asks for more

    def __post_init__(self) -> None:
        check_numbers("evaluate", self, _NUMBERS)
        self._check_controls()
        require(
            self.samples == 1 or self.temperature > 0,
            "evaluate.temperature",
            self.temperature,
            f"greater than 0 where evaluate.samples={self.samples}: greedy answers are all the same",
            "1.0 is common; or set evaluate.samples to 1.",
        )
        require(
            not self.verify_export or self.temperature == 0,
            "evaluate.verify_export",
            self.verify_export,
            f"0 where evaluate.temperature={self.temperature}: only greedy answers can be repeated",
            "Set it to 0, or evaluate.temperature to 0.",
        )
        if self.judge_url:
            self.judge.check()

    def _check_controls(self) -> None:
        unknown = [name for name in self.controls if name not in CONTROLS]
        require(
            not unknown and len(set(self.controls)) == len(self.controls),
            "evaluate.controls",
            list(self.controls),
            f"some of {', '.join(CONTROLS)}, each once",
            "Set it to [] for none.",
        )
        require(
            bool(self.gold_field), "evaluate.gold_field", self.gold_field, "a field's name", "facts is the common one."
        )

    @property
    def judge(self) -> Endpoint:
        """The keys that begin with `judge_`."""
        names = ("url", "model", "api_key_env", "parameters", *JUDGE_NUMBERS)
        return Endpoint("evaluate.judge_", *(getattr(self, f"judge_{name}") for name in names))
