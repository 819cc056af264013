"""Clock times and dates: `3:30 pm` is `15:30`, `half past three`, `3点30分`; `July 4, 2019` is `2019-07-04`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?:[:.](?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?\s?"
    r"(?P<half>[ap]\.?\s?m\.?)?(?P<oclock>\s?o'?clock)?",
    re.IGNORECASE,
)
_PAST = re.compile(  # 3 to 4 is a ratio, or a range
    r"(?:a )?(half|quarter|5|10|20|25|\d{1,2}(?= min))(?: minutes)? (past|to) (\d{1,2})", re.IGNORECASE
)
_CHINESE_CLOCK = re.compile(r"(上午|早上|凌晨|下午|晚上|中午)?(\d{1,2})(?:[点时](?:(\d{1,2})分?|(半|整))?|:([0-5]\d))")
_PART_OF_DAY = re.compile(r" in the (morning|afternoon|evening)$", re.IGNORECASE)
_NAMED = {"noon": 12 * 60, "midday": 12 * 60, "midnight": 0}
_MONTH_NAMES = "january february march april may june july august september october november december"
_MONTHS = {name[:3]: number for number, name in enumerate(_MONTH_NAMES.split(), 1)}
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_MONTH},?\s{_DAY}(?:,?\s(?P<year>\d{{4}}))?",
        rf"(?:the\s)?{_DAY}\s(?:of\s)?{_MONTH}(?:,?\s(?P<year>\d{{4}}))?",
        r"(?P<year>\d{4})[-/.年]\s?(?P<number>\d{1,2})[-/.月]\s?(?P<day>\d{1,2})日?",
        r"(?P<number>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})",
        rf"(?:in\s)?{_MONTH},?\s(?:of\s)?(?P<year>\d{{4}})",
        r"(?P<year>\d{4})年\s?(?P<number>\d{1,2})月",
    )
)


@dataclass(frozen=True)
class Clock:
    """Seconds since midnight. `half_open`: written without am or pm and before 13:00, so it may be either."""

    seconds: int
    half_open: bool


@dataclass(frozen=True)
class Date:
    """`year` and `day` are 0 where they are not said."""

    year: int
    month: int
    day: int


def same_moment(answer: str, gold: str) -> bool | None:
    """Whether both are the same clock time, or the same date; None where they are not two of a kind."""
    first, second = read_date(answer), read_date(gold)
    if first is not None and second is not None:
        return first == second
    clock, wanted = read_clock(answer), read_clock(gold)
    if clock is None or wanted is None:
        return False if re.search(r"\d\s?[ap]\.?m", answer + "\n" + gold, re.I) and (clock or wanted) else None
    if clock.half_open != wanted.half_open:
        return (clock.seconds - wanted.seconds) % (12 * 3600) == 0 and max(clock.seconds, wanted.seconds) < 24 * 3600
    return clock.seconds == wanted.seconds


def read_clock(text: str) -> Clock | None:
    """A time of day: it has minutes, am or pm, or o'clock."""
    text = _PART_OF_DAY.sub(lambda match: " am" if match[1].lower() == "morning" else " pm", text)
    lowered = re.sub(r"^(?:at|12) (?=noon|midnight)", "", text.lower())
    if lowered in _NAMED:
        return Clock(_NAMED[lowered] * 60, half_open=False)
    if match := _PAST.fullmatch(text):
        minutes = {"half": 30, "quarter": 15}.get(match[1].lower()) or int(match[1])
        return _clock(int(match[3]), minutes if match[2].lower() == "past" else -minutes, 0, "")
    if match := _CHINESE_CLOCK.fullmatch(text):
        if ":" in text and not match[1]:
            return _clock(int(match[2]), int(match[5]), 0, "")
        half = {"下午": "p", "晚上": "p", "中午": "p", None: ""}.get(match[1], "a")
        return _clock(int(match[2]), 30 if match[4] == "半" else int(match[3] or match[5] or 0), 0, half)
    match = _CLOCK.fullmatch(text)
    if match is None or not (match["minute"] or match["half"] or match["oclock"]):
        return None
    if "." in text[:3] and not match["half"]:
        return None  # 3.15 is a number
    half = (match["half"] or "")[:1].lower()
    return _clock(int(match["hour"]), int(match["minute"] or 0), int(match["second"] or 0), half)


def _clock(hour: int, minute: int, second: int, half: str) -> Clock | None:
    if hour > (12 if half == "a" else 24):
        return None
    if half and hour <= 12:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Clock((hour * 60 + minute) * 60 + second, half_open=not half and 0 < hour <= 12)


def read_date(text: str) -> Date | None:
    """The month, with its day, its year or both. Of three numbers the first is the month where it can be."""
    for pattern in _DATES:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        fields = match.groupdict()
        month = _MONTHS[fields["month"][:3].lower()] if fields.get("month") else int(fields["number"])
        day = int(fields.get("day", 0))
        if month > 12 >= day > 0:
            month, day = day, month
        if 1 <= month <= 12 and ("day" not in fields or 1 <= day <= 31):
            return Date(int(fields["year"] or 0), month, day)
    return None
