"""The published numbers of sets of yes-or-no questions, from what each sample said (`Sample.said`).

    undecided                answers that are neither yes nor no; they are wrong, and count as given in no class
    yes_ratio                answers that are yes
    precision                of the answers that are the positive word, those that are right: TP / P
    recall                   of the questions whose gold is the positive word, those that are answered so: TP / G
    f1                       2 TP / (P + G), their harmonic mean
    question_pair_accuracy   questions that are answered rightly about every figure they are asked about, and without
    figure_accuracy          figures about which every question is answered rightly

Sources: POPE (arXiv 2305.10355, its `evaluate.py`) counts yes as positive and reports accuracy, precision, recall, F1
and the share of yes. AMBER (arXiv 2311.07397, its `inference.py`) counts no as positive, for its discriminative task
and for each kind of it; it adds small constants to denominators, which are left out here. HallusionBench (arXiv
2310.14566, its `evaluation.py` and `utils.py`) has aAcc, which is `accuracy`, and qAcc and fAcc, which are the last
two; a question without a figure belongs to no figure.

With several samples a prompt, each number is that of the first samples of all prompts, of the second ones and so on,
and then the mean of these; where one of them is not defined, as precision where the positive word was never said, that
of the others, and None where none is. What is not of one kind has no number: precision where the positive words differ,
and any number of yes-or-no questions among others.
"""

from __future__ import annotations

import math

from megatron_sr1.data.yes_no import YesNo, gold_word
from megatron_sr1.evaluation.records import Record

Group = tuple[str, str]  # benchmark, name of a question or figure


class YesNoTally:
    """Counts the answers to some questions; what it holds grows with the names of figures and questions alone."""

    def __init__(self) -> None:
        self._samples: list[_OneSample] = []  # the first of each prompt, the second ones ...
        self._fewest: int | None = None  # samples of a prompt
        self._others = False  # whether there are other questions
        self._positives: set[str] = set()
        self._all_named = True  # whether every question has a name

    def add(self, record: Record) -> None:
        """Counts a prompt in."""
        asked, answered = record.yes_no, len(record.samples)
        if asked is None:
            self._others = True
            return
        self._fewest = answered if self._fewest is None else min(self._fewest, answered)
        self._positives.add(asked.positive)
        self._all_named &= bool(asked.question)
        while len(self._samples) < answered:
            self._samples.append(_OneSample())
        for counts, sample in zip(self._samples, record.samples, strict=False):
            assert sample.said is not None, record.key
            counts.add(asked, record.source.split("/")[0], gold_word(record.answer), sample.said)

    def numbers(self) -> dict[str, float | None]:
        """Those that are defined for all of these prompts."""
        if self._others or not self._fewest:
            return {}
        samples = self._samples[: self._fewest]
        numbers = {
            "undecided": _mean([sample.undecided / sample.questions for sample in samples]),
            "yes_ratio": _mean([sample.said["yes"] / sample.questions for sample in samples]),
        }
        if len(self._positives) == 1 and (positive := next(iter(self._positives))):
            numbers |= {
                "precision": _mean([_ratio(s.right[positive], s.said[positive]) for s in samples]),
                "recall": _mean([_ratio(s.right[positive], s.gold[positive]) for s in samples]),
                "f1": _mean([_ratio(2 * s.right[positive], s.said[positive] + s.gold[positive]) for s in samples]),
            }
        if self._all_named:
            numbers |= {
                "question_pair_accuracy": _mean([_share(sample.pairs) for sample in samples]),
                "figure_accuracy": _mean([_share(sample.figures) for sample in samples]),
            }
        return numbers


class _OneSample:
    """One answer to each question."""

    def __init__(self) -> None:
        self.questions = self.undecided = 0
        self.gold, self.said, self.right = ({"yes": 0, "no": 0} for _ in range(3))  # by the word
        self.pairs: dict[Group, bool] = {}  # whether all of it is right
        self.figures: dict[Group, bool] = {}

    def add(self, asked: YesNo, benchmark: str, gold: str, said: str) -> None:
        self.questions += 1
        self.gold[gold] += 1
        if said:
            self.said[said] += 1
            self.right[said] += said == gold
        else:
            self.undecided += 1
        for groups, name in ((self.pairs, asked.question), (self.figures, asked.figure)):
            if name:
                groups[benchmark, name] = groups.get((benchmark, name), True) and said == gold


def _share(groups: dict[Group, bool]) -> float | None:
    return _ratio(sum(groups.values()), len(groups))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float | None] | list[float]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
