"""Names of units that pint does not know, or means otherwise; which of its symbols count; what is no counted noun."""

from __future__ import annotations

from fractions import Fraction

CURRENCIES = {  # code -> its names
    "USD": "$ dollar dollars usd USD US$ bucks 美元", "EUR": "€ euro euros EUR eur 欧元",
    "GBP": "£ GBP gbp pounds pound 英镑", "CNY": "¥ 元 yuan CNY RMB rmb 人民币 块 块钱", "JPY": "¥ yen JPY 日元 円",
    "INR": "₹ Rs Rs. rupee rupees INR 卢比", "KRW": "₩ won KRW", "AUD": "A$ AUD", "CAD": "C$ CAD", "CHF": "CHF francs",
}  # fmt: skip
SMALL_CHANGE = {  # code -> names of its hundredth
    "USD": "cent cents ¢ c", "EUR": "cent cents", "GBP": "pence p", "CNY": "分 fen",
}  # fmt: skip
SPELLINGS = {
    "'": "ft", '"': "in", "in.": "in", "°": "degree", "deg": "degree", "kmh": "km/h", "kmph": "km/h", "kph": "km/h",
    "rpm": "revolution/min", "rps": "revolution/s", "rev": "revolution", "revs": "revolution", "mcg": "ug",
    "sqft": "ft^2", "sqm": "m^2", "Å": "angstrom", "℧": "siemens", "bpm": "beats/min", "fps": "frames/s",
    "ly": "light_year", "amps": "ampere", "u": "amu", "sec": "s", "mins": "min", "lbs": "lb", "kilohm": "kohm",
    "megohm": "Mohm",
    "米": "m", "厘米": "cm", "毫米": "mm", "分米": "dm", "千米": "km", "公里": "km", "微米": "um", "纳米": "nm",
    "英寸": "in", "英尺": "ft", "英里": "mile", "公顷": "hectare", "升": "L", "毫升": "mL", "克": "g", "千克": "kg",
    "公斤": "kg", "毫克": "mg", "吨": "t", "秒": "s", "秒钟": "s", "毫秒": "ms", "分": "min", "分钟": "min",
    "小时": "h", "时": "h", "钟头": "h", "天": "day", "日": "day", "周": "week", "星期": "week", "个月": "month",
    "月": "month", "年": "year", "度": "degree", "摄氏度": "degC", "华氏度": "degF", "开尔文": "K", "牛": "N",
    "牛顿": "N", "焦": "J", "焦耳": "J", "千焦": "kJ", "卡": "cal", "千卡": "kcal", "瓦": "W", "瓦特": "W",
    "千瓦": "kW", "千瓦时": "kWh", "伏": "V", "伏特": "V", "安": "A", "安培": "A", "毫安": "mA", "欧": "ohm",
    "欧姆": "ohm", "帕": "Pa", "帕斯卡": "Pa", "千帕": "kPa", "赫兹": "Hz", "摩尔": "mol",
}  # fmt: skip
ONE_LETTER = frozenset("mgsAKNJWVCFHTLlhdtSMΩ")  # pint has more, but those are variables
_PREFIXED = "m g s A K mol cd N J W V C F H T L l Pa Hz eV Ω ohm B cal bar M Wb S Bq Gy Wh pc atm bps rad u Da mHg"
PREFIXED = frozenset(_PREFIXED.split())  # take a prefix of one letter: `kPa`; pint would read `ab` as attobarn
ANGLES = {  # name -> (factor, power of π) to radians
    "radian": (Fraction(1), 0), "degree": (Fraction(1, 180), 1), "arcminute": (Fraction(1, 10800), 1),
    "arcsecond": (Fraction(1, 648000), 1), "turn": (Fraction(2), 1),
}  # fmt: skip
OWN = frozenset(("beats", "frames", "unit", "units"))  # each a dimension of its own
_NO_NOUN = """
am pm a.m. p.m. or and nor not no more less fewer than at least most over under above below out past bc ad plus minus
point to by if when percent is are clock
tenths hundredths thousandths halves thirds quarters fourths fifths sixths sevenths eighths ninths twelfths sixteenths
tens hundreds thousands millions billions ones squared cubed factorial times dozen dozens double score wrong false
incorrect maybe perhaps missing short negative negatives inverse opposite unknown nothing ish th st nd rd percents
"""
NO_NOUN = frozenset(_NO_NOUN.split())  # with one of them, the words behind a number say something else
