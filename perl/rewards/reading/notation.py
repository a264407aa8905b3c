r"""What LaTeX and Markdown add to the look of an answer alone, taken away; numbers with their units."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

LONGEST = 2000
"""Characters of an answer that has a form; longer ones are texts."""
_LONGEST_NUMBER = 64
WIDE = {ord("、"): ",", ord("。"): "."} | {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
"""Signs of Chinese texts in their ASCII form."""
_POWERS = {ord("²"): "2", ord("³"): "3", ord("{"): "", ord("}"): ""}
_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches \" ″", "ft": "foot feet ' ′", "yd": "yard", "mi": "mile", "mg": "milligram",
    "g": "gram", "kg": "kilogram", "ton": "tonne", "lb": "lbs pound", "oz": "ounce", "ms": "millisecond", "s": "sec second",
    "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "", "year": "yr", "ml": "milliliter millilitre",
    "L": "l liter litre", "°": "degree deg", "°c": "celsius", "°f": "fahrenheit", "K": "kelvin", "rad": "radian", "mph": "",
    "hz": "hertz", "W": "watt", "kw": "kilowatt", "J": "joule", "N": "newton", "pa": "pascal", "V": "volt", "unit": "",
    "$": "dollar usd", "€": "euro eur", "£": "gbp", "¥": "yen yuan", "₹": "rupee", "¢": "cent",
}  # fmt: skip
_UNIT_OF = {
    name: unit
    for unit, names in _UNITS.items()
    for one in (unit, *names.split())
    for name in (one, f"{one}s" if len(one) > 2 else one)
}
_UNIT = re.compile(
    r"(square |sq\.? |cubic )?([a-z°$€£¥₹¢\"″'′]{1,16}) ?\^? ?([23]?)", re.IGNORECASE
)

WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|boldsymbol|operatorname)\s?\{([^{}]*)\}"
)
_N = r"-?[0-9]{1,64}(?:\.[0-9]{1,64})?"
_FRACTION = re.compile(
    rf"\\[dt]?frac\s?(?:\{{\s?({_N})\s?\}}|([0-9]))\s?(?:\{{\s?([0-9]{{1,64}})\s?\}}|([0-9]))"
)
_LATEX = (
    (re.compile(r"\\[()\[\]]|\$\$"), ""),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!"), ""),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3})"), ","),
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\s?(?:\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree)(?![a-zA-Z])"), "°"),
    (re.compile(r"\\cup(?![a-zA-Z])|(?<=[)\]])\s?U\s?(?=[(\[])"), "∪"),
    (re.compile(r"\\infty(?![a-zA-Z])|\binfinity\b|\binf\b"), "∞"),
    (re.compile(r"\+ ?(?=∞)"), ""),
    (re.compile(r"\\(?:to|rightarrow)(?![a-zA-Z])|->"), "→"),
    (re.compile(r"\\(?:lbrace|rbrace)(?![a-zA-Z])"), lambda m: "{" if m[0][1] == "l" else "}"),
    (re.compile(r"\\([{}%])"), r"\1"),
    (re.compile(r"\\(?:geq?(?:slant)?|gt)(?![a-zA-Z])|>="), lambda m: ">" if m[0] == r"\gt" else "≥"),
    (re.compile(r"\\(?:leq?(?:slant)?|lt)(?![a-zA-Z])|<="), lambda m: "<" if m[0] == r"\lt" else "≤"),
    (re.compile(r"\u2212|(?:\A|(?<=[0-9])|(?<=[0-9] ))\u2013(?= ?[0-9.])"), "-"),
    (re.compile("[¼-¾⅐-⅞]"), lambda m: f" {unicodedata.normalize('NFKC', m[0])} ".replace("\u2044", "/")),
)  # fmt: skip
_INLINE = re.compile(r"(?<!\\)\$(?=\S)((?:\\.|[^$\\\n]){1,300})(?<=[A-Za-z0-9)}\]%])\$(?![0-9])")
_PREFIX = re.compile(
    r"\A(?:so |thus,? |therefore,? )?(?:the |my )?(?:final |correct )?answer(?: is|:| is:) ?(?=\S)",
    re.IGNORECASE | re.ASCII,
)
_DECORATION = "*_`"
_QUOTED = re.compile(r"\A(?:\"([^\"]*)\"|“([^“”]*)”|['‘]([^'‘’]*)['’])\Z")
_MONEY = re.compile(r"([-+]?) ?(?:US)?([$€£¥₹]) ?(?=[-+.0-9])")
_AMOUNT = re.compile(
    r"([-+]?) ?(?:([0-9]{1,64}) ([0-9]{1,64}) ?/ ?([0-9]{1,64})(?![0-9.])"
    r"|((?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,20}(?![0-9])|[0-9]{1,64})(?:\.[0-9]{0,64})?|\.[0-9]{1,64})(?: ?/ ?([0-9]{1,64}))?)"
)
_UNIT_BEHIND = re.compile(
    r"(?:(?<=[0-9})\]])|(?<=\\pi)) ?([a-z°%$€£][a-z°%/ ^{}0-9²³.]{0,30})\Z",
    re.IGNORECASE | re.ASCII,
)
_LOOSE = re.compile(r" (?!\w)|(?<![\w.]) ")
"""A space beside a sign, which says nothing."""


@lru_cache(256)
def tidy(answer: str) -> str:
    """Without what LaTeX and Markdown add to the look alone, and without a period at the end."""
    text = _bare(answer.strip()[: LONGEST * 4].translate(WIDE))
    text = _INLINE.sub(r"\1", text)
    for pattern, new in _LATEX:
        text = pattern.sub(new, text)
    text = WRAPPED.sub(r"\1", WRAPPED.sub(r"\1", text))
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).replace("\\$", "$")
    return _bare(_PREFIX.sub("", _bare(" ".join(text.split()))))


def _bare(text: str) -> str:
    """Without quotes and Markdown around it, and without the period that ends it."""
    text = text.strip(f"{_DECORATION} ")
    text = text if text.endswith("..") else text.removesuffix(".").strip(f"{_DECORATION} ")
    quoted = _QUOTED.match(text)
    return (quoted[1] or quoted[2] or quoted[3] or "").strip() if quoted else text


def plain(answer: str) -> str:
    """A text as texts are compared."""
    text = answer if len(answer) > 4 * LONGEST else tidy(answer)
    return _LOOSE.sub("", " ".join(_bare(text.replace("$", "")).casefold().split()))


def number_in(text: str) -> tuple[Fraction, bool, str] | None:
    """The number that a tidy text is, whether it has a point, and its unit; None if it is none."""
    money = _MONEY.match(text)
    sign, unit = (money[1], money[2]) if money else ("", "")
    rest = text[money.end() :] if money else text
    match = _AMOUNT.match(rest)
    if match is None or (sign and match[1]):
        return None
    behind, percent = rest[match.end() :].strip(), 1
    if behind in ("%", "percent", "per cent"):
        percent = 100
    elif behind:
        other = unit_of(behind)
        if not other or (unit and other != unit):
            return None
        unit = other
    whole, top, bottom = match[2] or "0", match[3] or match[5], match[4] or match[6] or "1"
    top = top.replace(",", "")
    if len(top) > _LONGEST_NUMBER or int(bottom) == 0 or (match[3] and int(top) >= int(bottom)):
        return None
    number = (int(whole) + Fraction(top) / int(bottom)) / percent
    number = -number if "-" in (sign, match[1]) else number
    return number, "." in top, unit


def unit_of(text: str) -> str:
    """A unit in its short form, empty if it is none: `square centimeters` gives `cm^2`. Only of one letter is the case
    told apart: 5 N is a force, and 5n is none."""
    text = (
        text.strip(" .")
        .translate(_POWERS)
        .replace(" per ", "/")
        .replace("degrees ", "")
        .replace("° ", "°")
    )
    parts = []
    for part in text.split("/"):
        match = _UNIT.fullmatch(part.strip())
        name = match and _UNIT_OF.get(match[2] if len(match[2]) == 1 else match[2].casefold())
        if not match or not name:
            return ""
        power = match[3] or {"s": "2", "c": "3"}.get((match[1] or " ")[0].lower())
        parts.append(f"{name}^{power}" if power else name)
    return "/".join(parts)


def without_unit(text: str) -> tuple[str, str]:
    """An expression, and the unit that it ends with; empty if it has none."""
    behind = _UNIT_BEHIND.search(text)
    unit = unit_of(behind[1]) if behind else ""
    return (text[: behind.start()], unit) if behind and unit else (text, "")
