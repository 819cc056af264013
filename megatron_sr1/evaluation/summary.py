"""The numbers of an evaluation, from its records: overall and by source, in one pass over the file.

    accuracy                  the first pass answers correctly
    second_pass_accuracy      the description alone leads to the correct answer
    language_shortcut_rate    #(right, and the description alone does not give the right answer) / #samples
                              (Vision-SR1, section 5); self-judged: the second pass tells whether it does
    judged_accuracy           the judge, given the description alone, answers correctly; no description: it does not
    language_shortcut_rate_judged   as above, the judge tells; samples whose verdict is missing are in neither number
    faithful, leak            see `rewards/description.py`
    format                    the first response follows its layout
    reward/<name>             the mean of a reward of the user's own
    precision, qAcc ...       of yes-or-no questions, see `yes_no.py`
    prior_accuracy, sufficiency ...   of controls, see `control_tally.py`

Of prompts without images, and of templates that ask for no description, only accuracy, format, pass@k and lengths are
measured: there is no description that could suffice, leak or be faithful. A share that no sample counts for is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from megatron_sr1.evaluation.control_tally import ControlTally
from megatron_sr1.evaluation.records import Record, Response, Sample
from megatron_sr1.evaluation.statistics import ks_of, pass_at_k, share_of
from megatron_sr1.evaluation.yes_no import YesNoTally
from megatron_sr1.rewards import REWARDS

Hit = bool | None  # None: the sample does not count
Numbers = dict[str, float | None]


def summarise_records(
    records: Iterable[Record], judge_model: str = "", controls: Sequence[str] = ()
) -> tuple[Numbers, dict[str, Numbers]]:
    """The numbers of all records and of each source, sources sorted.

    A source may have parts, as in `mmmu/Art`; then `mmmu` has numbers too, of all its parts. `macro_accuracy` is the
    mean of the accuracies of the first parts: each benchmark counts the same, however large it is.

    Args:
        judge_model: whose verdicts count; empty: there is no judge, and its numbers are left out.
        controls: whose answers count.
    """
    everything, by_source = Tally(judge_model, controls), {}
    for record in records:
        everything.add(record)
        parts = record.source.split("/")
        for depth in range(1, len(parts) + 1):
            by_source.setdefault("/".join(parts[:depth]), Tally(judge_model, controls)).add(record)
    numbers = {source: by_source[source].numbers() for source in sorted(by_source)}
    benchmarks = [values["accuracy"] for source, values in numbers.items() if "/" not in source]
    known = [accuracy for accuracy in benchmarks if accuracy is not None]
    return {**everything.numbers(), "macro_accuracy": _mean(known) if known else None}, numbers


_LATER = "acc_vis."  # a later pass is right: rewards are shown so


class Tally:
    """Counts the samples of some prompts; what it holds does not grow with their texts."""

    def __init__(self, judge_model: str = "", controls: Sequence[str] = ()) -> None:
        self._judge_model = judge_model
        self._hits: dict[str, list[tuple[int, int]]] = {
            name: [] for name in [*_SHARES, *(_JUDGED if judge_model else ())]
        }
        self._right: list[tuple[int, int]] = []  # (samples, right ones) of each prompt
        self._lengths = {"first": _Lengths(), "second": _Lengths()}
        self._yes_no = YesNoTally()
        self._controls = ControlTally(controls)
        self._unjudged = 0
        self._users: dict[str, list[float]] = {}  # values of the user's rewards, and of other later passes
        self._missing: dict[str, list[float]] = {}  # of these passes, whether they could not be asked

    def add(self, record: Record) -> None:
        """Counts a prompt in."""
        for name, counts in self._hits.items():
            hits = [self._hit(name, sample, record) for sample in record.samples]
            known = [hit for hit in hits if hit is not None]
            counts.append((sum(known), len(known)))
        self._yes_no.add(record)
        self._controls.add(record)
        self._right.append((len(record.samples), sum(_accuracy(sample, record) is True for sample in record.samples)))
        for sample in record.samples:
            self._lengths["first"].add(sample.first)
            if sample.second is not None:
                self._lengths["second"].add(sample.second)
            self._unjudged += self._suffices(sample, record) is None and record.described
            for name in sample.rewards.keys() - REWARDS.keys():
                self._users.setdefault(name, []).append(sample.rewards[name])
            for later in (name.removeprefix(_LATER) for name in sample.rewards if name.startswith(_LATER)):
                self._missing.setdefault(later, []).append(float(later not in sample.further))

    def numbers(self) -> Numbers:
        """All numbers; every share with the bounds of its 95 % interval as `<name>_low` and `<name>_high`."""
        numbers: Numbers = {}
        for name, counts in self._hits.items():
            share = share_of(counts)
            numbers |= {
                name: None if share is None else share.value,
                f"{name}_low": None if share is None else share.low,
                f"{name}_high": None if share is None else share.high,
            }
        fewest = min((samples for samples, _ in self._right), default=0)
        if fewest > 1:
            for k in ks_of(fewest):
                numbers[f"pass@{k}"] = _mean([pass_at_k(samples, right, k) for samples, right in self._right])
        numbers |= self._yes_no.numbers()
        numbers |= self._controls.numbers()
        for name, lengths in self._lengths.items():
            numbers |= lengths.numbers(name)
        numbers |= {f"reward/{name}": _mean(values) for name, values in sorted(self._users.items())}
        numbers |= {f"{later}/missing": _mean(values) for later, values in sorted(self._missing.items())}
        if self._judge_model:
            numbers["judge_missing"] = self._unjudged
        numbers |= {"num_samples": sum(samples for samples, _ in self._right), "num_prompts": len(self._right)}
        return numbers

    def _hit(self, name: str, sample: Sample, record: Record) -> Hit:
        if name in _SHARES:
            return _SHARES[name](sample, record)
        suffices = self._suffices(sample, record)
        if suffices is None or name == "judged_accuracy":
            return suffices
        return _accuracy(sample, record) is True and not suffices

    def _suffices(self, sample: Sample, record: Record) -> Hit:
        """What the judge says of the description; None: nothing, or there is none to be asked for."""
        if not record.described:
            return None
        if sample.description is None:
            return False
        verdict = sample.judge
        return verdict.right if verdict is not None and verdict.model == self._judge_model else None


class _Lengths:
    """Of the responses of one pass, in tokens."""

    def __init__(self) -> None:
        self._count = self._sum = self._longest = self._cut = 0

    def add(self, response: Response) -> None:
        self._count += 1
        self._sum += response.tokens
        self._longest = max(self._longest, response.tokens)
        self._cut += response.finish_reason == "length"

    def numbers(self, name: str) -> Numbers:
        some = self._count > 0
        return {
            f"{name}_tokens": self._sum / self._count if some else None,
            f"{name}_tokens_longest": self._longest if some else None,
            f"{name}_truncated": self._cut / self._count if some else None,
        }


def _accuracy(sample: Sample, record: Record) -> Hit:
    return sample.rewards["acc"] == 1.0


def _format(sample: Sample, record: Record) -> Hit:
    return sample.rewards["fmt" if record.described else "fmt_cot"] == 1.0


def _second_pass(sample: Sample, record: Record) -> Hit:
    return sample.rewards["acc_vis"] == 1.0 if record.described and record.second_pass else None


def _shortcut(sample: Sample, record: Record) -> Hit:
    if not record.described or not record.second_pass:
        return None
    return sample.rewards["acc"] == 1.0 and sample.rewards["acc_vis"] == 0.0


def _faithful(sample: Sample, record: Record) -> Hit:
    return sample.faithful if record.described else None


def _leak(sample: Sample, record: Record) -> Hit:
    return sample.rewards["leak"] == 1.0 if record.described else None


_SHARES: dict[str, Callable[[Sample, Record], Hit]] = {
    "accuracy": _accuracy,
    "second_pass_accuracy": _second_pass,
    "language_shortcut_rate": _shortcut,
    "faithful": _faithful,
    "format": _format,
    "leak": _leak,
}
_JUDGED = ("judged_accuracy", "language_shortcut_rate_judged")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
