"""The numbers of controls, each over the samples that it was asked for, which have a second pass all.

    <control>_accuracy       it is answered correctly
    sufficiency              second pass minus prior, on the same samples: what the description adds to the question
    <control>_gap            second pass minus another control, on the same samples
    shuffled_same_question   of the descriptions that `shuffled` read, those that were made for the same question
    <control>_samples        samples that it was asked for

The second pass of a response that describes nothing is wrong: `prior`, `shuffled` and `gold` are asked there, too, and
`reference` and `other_question` cannot be. A control that was asked for no sample has no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.evaluation.controls import has_controls
from megatron_sr1.evaluation.records import Record
from megatron_sr1.evaluation.statistics import difference_of, share_of

Numbers = dict[str, float | None]


class ControlTally:
    """Counts the answers to some controls."""

    def __init__(self, controls: Sequence[str]) -> None:
        # by control, of each prompt: (right second passes, right answers, samples)
        self._counts: dict[str, list[tuple[int, int, int]]] = {name: [] for name in controls}
        self._same: list[tuple[int, int]] = []  # (lent for the same question, lent) of each prompt

    def add(self, record: Record) -> None:
        """Counts a prompt in."""
        if not has_controls(record):
            return
        for name, counts in self._counts.items():
            asked = [
                (sample.rewards["acc_vis"] == 1.0, answer)
                for sample in record.samples
                if (answer := sample.controls.get(name)) is not None and answer.response is not None
            ]
            if not asked:
                continue
            counts.append((sum(second for second, _ in asked), sum(answer.right for _, answer in asked), len(asked)))
            lent = [answer.same_question for _, answer in asked if answer.same_question is not None]
            if lent:
                self._same.append((sum(lent), len(lent)))

    def numbers(self) -> Numbers:
        """All that there are; accuracies and differences with the bounds of their 95 % intervals."""
        numbers: Numbers = {}
        for name, counts in self._counts.items():
            right = share_of([(control, samples) for _, control, samples in counts])
            if right is None:
                continue
            gap = difference_of(counts)
            for title, found in ((f"{name}_accuracy", right), (gap_of(name), gap)):
                numbers |= {title: found.value, f"{title}_low": found.low, f"{title}_high": found.high}
            same = share_of(self._same) if name == "shuffled" else None
            if same is not None:
                numbers["shuffled_same_question"] = same.value
            numbers[f"{name}_samples"] = right.num_samples
        return numbers


def gap_of(control: str) -> str:
    """The name of the second pass' accuracy minus the control's."""
    return "sufficiency" if control == "prior" else f"{control}_gap"
