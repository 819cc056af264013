"""Answer equivalence, the reward components, and the checks of a description."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.prompts import CAPTION_REASONER, COT, OURS
from megatron_sr1.rewards import REWARDS, RewardError, components, faithful, grade, leaks, score_group, score_pair
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair

PROMPT = Prompt(key="sum/0", problem="What is the sum of the digits?", answer="10", metadata={"facts": ["3", "7"]})
SEE_THINK = "<description> 3 and 7 </description> <think> 3 + 7 = 10 </think> \\boxed{10}"
REASONER = "<think> 3 + 7 = 10 </think> \\boxed{10}"


def rollout(text: str, finish_reason: str = "stop") -> Rollout:
    return Rollout("0/sum/0/0/first", (1,), (2,), text, (-0.1,), finish_reason, 0)


def pair(first: str, second: str | None = None, description: str | None = None) -> RolloutPair:
    return RolloutPair(0, rollout(first), None if second is None else rollout(second), description)


# ---------------------------------------------------------------- grade
# "answer | gold" per line. Where the rule is symmetric, the mirror image is in the table too.
EQUAL = r"""
B | B
(B) | B
B | (B)
B. | B
b | B
B | b.
(b) Paris | B
B: 12 | B
B | (B) Paris
option B | B
J. Paris | J
(i) the second | I
\text{B} | B
$\boxed{C}$ | C
7 | 7.
007 | 7
7.0 | 7
+7 | 7
seven | 7
-3 | - 3
−3 | -3
1,234 | 1234
1234 | 1,234
1{,}234.50 | 1234.5
1\,234 | 1,234
1.2 \times 10^{3} | 1200
1/2 | 0.5
0.5 | \frac{1}{2}
\dfrac{1}{2} | \frac12
-\frac{1}{2} | \frac{-1}{2}
1 1/2 | 1.5
1\frac{1}{2} | 3/2
50\% | 50 %
50% | \frac{1}{2}
\frac{1}{2} | 50%
50 | 50%
50 percent | 50%
5 cm | 5
5 | 5 cm
5cm | 5 cm
5\text{ cm} | 5 centimetres
25 cm² | 25\,\text{cm}^{2}
5 square meters | 5 m^2
90^\circ | 90 degrees
\$5 | 5 dollars
5 apples | 5
3 million | 3,000,000
4\sqrt{3} | 4\sqrt{3}\text{ cm}
yes | Yes.
NO | no
True. | true
Ice  Cream | icecream
"left" | Left
New York. | new york
x = 5 | 5
5 | x=5
3 + 7 = 10 | 10
2\sqrt{2} | \sqrt{8}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}
2pi | 2π
x^2+2x+1 | (x+1)^2
\left( 1, 2 \right) | (1,2)
14 and 15 | 15, 14
\sqrt{16} | 4
the number is 7 | 7
100 cm | 1 m
50% | 50
"""

DIFFERENT = r"""
H. Paris | J
J. Paris | I
10 | J
C | B
B | C
(C) Paris | (B) Paris
A dog | A
A | A dog
8 | 7
77 | 7
7 | 77
7 7 | 77
3 7 | 37
3,7 | 37
3,7 | 3.7
-7 | 7
1/3 | 0.3
0.333 | 1/3
0.333333 | 1/3
1 1/2 | 11/2
11/2 | 1 1/2
12345 | 1,234
1/0 | 0
0.05 | 50%
50 | 0.5
5% | 50%
5 cm | 5 m
5 m | 5 cm
5 cm^2 | 5 cm
5 apples | 5 oranges
$5 | €5
4\sqrt{3} m | 4\sqrt{3} cm
5 million | 5
5x | 5
5 | 5x
5m | 5
7 pm | 7
3 or more | 3
yes | no
no | yes
yes | true
cat | dog
cat | 7
7 | cat
x = 5 | y = 5
x = 6 | 5
3 + 7 | 10
2 \times 5 | 10
(1,2) | (2,1)
(1,2) | [1,2]
\sqrt{2} | \sqrt{3}
1.414 | \sqrt{2}
x^2 | x^3
\frac{1}{2} | 2
__import__('os') | 7
"""


def cases(table: str) -> list[tuple[str, ...]]:
    return [tuple(part.strip() for part in line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("answer", "gold"), cases(EQUAL))
def test_grade_equal(answer: str, gold: str) -> None:
    assert grade(answer, gold) is True


@pytest.mark.parametrize(("answer", "gold"), cases(DIFFERENT))
def test_grade_different(answer: str, gold: str) -> None:
    assert grade(answer, gold) is False


def test_grade_empty_answer_is_wrong_and_blank_gold_is_an_error() -> None:
    assert grade("", "7") is False
    assert grade("  \n", "7") is False
    assert grade("$$", "7") is False
    with pytest.raises(ValueError, match="gold answer is blank"):
        grade("7", " ")


def test_grade_refuses_long_answers() -> None:
    assert grade(" " * 505 + "7", "7") is True
    assert grade(" " * 512 + "7", "7") is False


@settings(deadline=None)  # the first unit reads the table of units
@given(st.integers(-(10**12), 10**12), st.integers(1, 999), st.sampled_from(["", " cm", "%", " apples"]))
def test_grade_numbers_by_value(number: int, step: int, unit: str) -> None:
    spellings = (str(number), f"{number:,}", f"{number}.00", f"${number}$", f"\\frac{{{number * step}}}{{{step}}}")
    for spelling in spellings:
        assert grade(spelling + unit, str(number) + unit)
        assert not grade(spelling + unit, str(number + step) + unit)


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("0123456789.,/%$\\{}()frac text-+=<ecm", max_size=60))
def test_any_text_is_graded_and_equals_itself(text: str) -> None:
    assert not text.strip() or grade(text, text)
    assert grade(text, "7") in (True, False)


NASTY = [
    "9^{9^{9^{9}}}",
    "9^9^9^9",
    "9**9**9",
    "999999999!",
    "(x+y+z)^{99}",
    "1e9999999",
    r"\int_0^1 x^x dx",
    "(" * 256 + ")" * 256,
    r"\frac" * 100,
    r"\text{" * 80,
    "1," * 250,
    "9" * 510,
    "$" * 500,
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "\\0\x00\n",
    "\ud800",
    "\\boxed{",
    "=",
    "²",
    "٣",
]


def test_nasty_answers_neither_hang_nor_raise() -> None:
    start = time.monotonic()
    for answer in NASTY:
        for gold in ("7", r"\sqrt{2}", "B", "cat", "(1,2)"):
            assert grade(answer, gold) is False
    assert time.monotonic() - start < 20.0


def test_grade_works_outside_the_main_thread_and_in_many_threads() -> None:
    verdicts: list[bool] = []
    ask = [(rf"{n}\sqrt{{2}}", rf"\sqrt{{{2 * n * n + (n % 2)}}}") for n in range(2, 10)]
    threads = [threading.Thread(target=lambda case=case: verdicts.append(grade(*case))) for case in ask]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verdicts) == 8 and sum(verdicts) == 4


# ---------------------------------------------------------------- components
def test_all_components_of_a_perfect_pair() -> None:
    asked: list[str] = []
    (scores,) = score_group(
        RolloutGroup(0, PROMPT, (pair(SEE_THINK, REASONER, "3 and 7"),)),
        REWARDS,
        ask=lambda text: asked.append(text) or r"\boxed{10}",
    )
    assert asked == [CAPTION_REASONER.user_text(PROMPT.problem, 0, "3 and 7")]
    assert scores == {
        "acc": 1.0,
        "fmt": 1.0,
        "fmt_cot": 1.0,
        "acc_vis": 1.0,
        "fmt_vis": 1.0,
        "leak": 0.0,
        "acc_judge": 1.0,
    }


def test_each_pass_is_scored_on_its_own_response() -> None:
    wrong = REASONER.replace("{10}", "{9}")
    scores = score_pair(pair(SEE_THINK, wrong, "3 and 7"), PROMPT, ["acc", "acc_vis"])
    assert scores == {"acc": 1.0, "acc_vis": 0.0}
    scores = score_pair(pair(SEE_THINK.replace("{10}", "{9}"), REASONER, "3 and 7"), PROMPT, ["acc_vis", "acc"])
    assert list(scores.items()) == [("acc_vis", 1.0), ("acc", 0.0)]


def test_accuracy_takes_the_last_box_of_a_broken_or_cut_response() -> None:
    cut = RolloutPair(
        0, rollout("<description> 3 and 7 </description> \\boxed{1} so \\boxed{10} be", "length"), None, None
    )
    assert score_pair(cut, PROMPT, ["acc", "fmt"]) == {"acc": 1.0, "fmt": 0.0}
    assert score_pair(pair("10"), PROMPT, ["acc"]) == {"acc": 0.0}


def test_accuracy_knows_the_choices_of_the_sample_and_rounds_only_where_asked() -> None:
    asked = Prompt("k", "q", "B", metadata={"choices": ("1/2", "1/3")})
    assert score_pair(pair("\\boxed{1/3}"), asked, ["acc"]) == {"acc": 1.0}
    assert score_pair(pair("\\boxed{1/2}"), asked, ["acc"]) == {"acc": 0.0}
    assert score_pair(pair("\\boxed{0.33}"), asked, ["acc"]) == {"acc": 0.0}
    assert score_pair(pair("\\boxed{0.33}"), asked, ["acc"], rounded=True) == {"acc": 1.0}


def test_the_format_is_that_of_the_template_that_was_asked_by() -> None:
    plainly = replace(OURS, first=COT)
    for response, name, asked, expected in (
        (REASONER, "fmt", OURS, 0.0),
        (REASONER, "fmt_cot", plainly, 1.0),
        (SEE_THINK, "fmt", OURS, 1.0),
        (SEE_THINK, "fmt_cot", plainly, 0.0),
    ):
        assert score_pair(pair(response), PROMPT, [name], asked=asked) == {name: expected}


def test_defect_1_without_description_there_is_no_visual_reward() -> None:
    scores = score_pair(pair("The answer is \\boxed{10}", second=None), PROMPT, ["acc", "acc_vis", "fmt_vis", "leak"])
    assert scores == {"acc": 1.0, "acc_vis": 0.0, "fmt_vis": 0.0, "leak": 0.0}


def test_defect_2_second_pass_format_is_scored_with_the_reasoner_layout() -> None:
    assert score_pair(pair(SEE_THINK, REASONER, "3 and 7"), PROMPT, ["fmt_vis"]) == {"fmt_vis": 1.0}
    assert score_pair(pair(SEE_THINK, SEE_THINK, "3 and 7"), PROMPT, ["fmt_vis"]) == {"fmt_vis": 0.0}


def test_defect_3_a_description_that_states_the_answer_is_reported() -> None:
    for description, expected in (("3 and 7", 0.0), ("3 and 7, the total is 10", 1.0), ("the answer is unclear", 1.0)):
        assert score_pair(pair(SEE_THINK, REASONER, description), PROMPT, ["leak"]) == {"leak": expected}


def test_unknown_component_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'acuracy': ours are acc, acc_vis, fmt, fmt_vis, leak, acc_judge, fmt_cot"):
        score_pair(pair(SEE_THINK), PROMPT, ["acc", "acuracy"])


def test_an_exception_in_a_reward_is_an_error_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(answer: str, gold: str, choices: tuple[str, ...], *, rounded: bool) -> bool:
        raise ZeroDivisionError("broken reward")

    monkeypatch.setattr(components, "grade", broken)
    words = r"'acc' failed on response 0 to sample .* at .*components\.py:\d+ in _accuracy: ZeroDivisionError: broken"
    with pytest.raises(RewardError, match=words) as told:
        score_pair(pair(SEE_THINK), PROMPT, ["acc"])
    assert isinstance(told.value.__cause__, ZeroDivisionError)


# ---------------------------------------------------------------- descriptions
def prompt(answer: str, **metadata: object) -> Prompt:
    return Prompt(key="k", problem="q", answer=answer, metadata=metadata)


@pytest.mark.parametrize(
    ("description", "facts", "expected"),
    [
        ("the digits are 3 and 7", ["3", "7"], True),
        ("3 7", ["3", "7"], True),
        ("Three, then seven.", ["3", "7"], True),
        ("3 and 7", [3, 7], True),
        ("a red circle", ["red", "circle"], True),
        ("3 and 7, 9", ["3", "7"], False),
        ("7 and 3", ["3", "7"], False),
        ("37", ["3", "7"], False),
        ("3 3 7", ["3", "7"], False),
        ("two digits: 3 and 7", ["3", "7"], False),
        ("3", ["3", "7"], False),
        ("a blue circle", ["red", "circle"], False),
        ("", ["3"], False),
        (None, ["3", "7"], False),
        ("nothing", [], True),
    ],
)
def test_faithful(description: str | None, facts: list[object], expected: bool) -> None:
    assert faithful(description, prompt("10", facts=facts)) is expected


def test_faithful_is_unknown_without_facts_and_refuses_a_string_of_facts() -> None:
    assert faithful("3 and 7", prompt("10")) is None
    with pytest.raises(ValueError, match="metadata\\['facts'\\] of prompt 'k' is '37'"):
        faithful("3 and 7", prompt("10", facts="37"))


@pytest.mark.parametrize(
    ("description", "answer", "facts", "expected"),
    [
        ("3 and 7", "7", ["3", "7"], False),  # the larger digit is a fact of the image
        ("3 and 7, the answer is 7", "7", ["3", "7"], True),
        ("3 and 7 Answer: 7", "7", ["3", "7"], True),
        ("3 and 7 \\boxed{7}", "7", ["3", "7"], True),
        ("3 and 7 make ten", "10", ["3", "7"], True),
        ("3 and 7 make 100", "10", ["3", "7"], False),
        ("3 and 10.5", "10", ["3"], False),
        ("a table with 4 legs", "4", None, True),
        ("a red double-decker bus", "Red Bus", None, False),
        ("it shows a red bus.", "Red Bus", None, True),
        ("A photo of a dog", "A", None, False),
        ("triangle with corners A, B, C", "B", None, False),
        ("this is (b)", "B", None, True),
        ("so option B holds", "(B)", None, True),
        ("there are no trees", "no", None, False),
        ("the answer is no", "no", None, True),
        (None, "10", ["3"], False),
    ],
)
def test_leaks(description: str | None, answer: str, facts: list[str] | None, expected: bool) -> None:
    assert leaks(description, prompt(answer, **({} if facts is None else {"facts": facts}))) is expected
