"""How the answers to a question of yes or no are counted: the entry `yes_no_metrics` of a sample's metadata.

    "metadata": {"yes_no_metrics": {"positive": "no"}}
    "metadata": {"yes_no_metrics": {"question": "VS/chart/0_1", "figure": "VS/chart/0_2"}}

What is made of it stands in `evaluation/yes_no.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_sr1.types import Prompt

ENTRY = "yes_no_metrics"
WORDS = ("yes", "no")


@dataclass(frozen=True)
class YesNo:
    """Of one question. Names of questions and figures are compared within a benchmark, the first part of `source`."""

    positive: str = ""  # yes or no: the answer that precision, recall and F1 are of; "": they are of none
    question: str = ""  # what the same question about several figures is called; "": it is asked once
    figure: str = ""  # what all questions about one figure have in common; "": there is no figure

    def entry(self) -> dict[str, Any]:
        """As metadata."""
        return {ENTRY: {name: value for name, value in asdict(self).items() if value}}


def yes_no_of(prompt: Prompt) -> YesNo | None:
    """What the metadata of a prompt say; None where it is no question of yes or no.

    Raises:
        ValueError: they say what is unknown, or the gold answer is neither yes nor no; the message names the sample.
    """
    if ENTRY not in prompt.metadata:
        return None
    said, names = prompt.metadata[ENTRY], [field.name for field in fields(YesNo)]
    known = {name: said[name] for name in said if said[name] is not None} if isinstance(said, dict) else None
    if known is None or not known.keys() <= set(names) or not all(isinstance(value, str) for value in known.values()):
        raise ValueError(
            f"sample {prompt.key!r}: metadata.{ENTRY}={said!r} must be an object of texts, with none but "
            f"{', '.join(names)}. Correct it, or leave it out: the question then counts for accuracy alone."
        )
    found = YesNo(**known)
    if found.positive not in ("", *WORDS):
        raise ValueError(f"sample {prompt.key!r}: metadata.{ENTRY}.positive={found.positive!r}: write yes or no.")
    if found.figure and not found.question:
        raise ValueError(
            f"sample {prompt.key!r}: metadata.{ENTRY} has figure={found.figure!r} and no question. Name the question, "
            "which is asked about other figures too, or leave the figure out."
        )
    if gold_word(prompt.answer) not in WORDS:
        raise ValueError(
            f"sample {prompt.key!r}: its answer {prompt.answer!r} is neither yes nor no, as metadata.{ENTRY} has it. "
            f"Correct the answer, or leave {ENTRY} out; a question with options has their letters for answers."
        )
    return found


def gold_word(answer: str) -> str:
    """The gold answer of such a question: yes or no."""
    return answer.strip().lower()
