r"""What LaTeX and Markdown add to the look of an answer alone, taken away; numbers with their units."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST = 2000
"""Characters of an answer that has a form; longer ones are texts."""
_LONGEST_NUMBER = 64
_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram",
    "g": "gram", "kg": "kilogram", "t": "ton tonne", "lb": "lbs pound", "oz": "ounce", "ms": "millisecond", "s": "sec second",
    "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "", "year": "yr", "ml": "milliliter millilitre",
    "l": "liter litre", "°": "degree deg", "°c": "celsius", "°f": "fahrenheit", "k": "kelvin", "rad": "radian", "mph": "",
    "hz": "hertz", "w": "watt", "kw": "kilowatt", "j": "joule", "n": "newton", "pa": "pascal", "v": "volt", "unit": "",
    "$": "dollar usd", "€": "euro eur", "£": "gbp", "¥": "yen yuan", "₹": "rupee", "¢": "cent",
}  # fmt: skip
_UNIT_OF = {
    name: unit
    for unit, names in _UNITS.items()
    for one in (unit, *names.split())
    for name in (one, f"{one}s" if len(one) > 2 else one)
}

_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s?\{([^{}]*)\}"
)
_N = r"-?[0-9]{1,64}(?:\.[0-9]{1,64})?"
_FRACTION = re.compile(
    rf"\\[dt]?frac\s?(?:\{{\s?({_N})\s?\}}|([0-9]))\s?(?:\{{\s?([0-9]{{1,64}})\s?\}}|([0-9]))"
)
_LATEX = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!"), ""),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3})"), ","),
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\s?(?:\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree)(?![a-zA-Z])"), "°"),
    (re.compile(r"\\cup(?![a-zA-Z])|(?<=[)\]])\s?U\s?(?=[(\[])"), "∪"),
    (re.compile(r"\\infty(?![a-zA-Z])|\binfinity\b|\binf\b"), "∞"),
    (re.compile(r"\\(?:to|rightarrow)(?![a-zA-Z])|->"), "→"),
    (re.compile(r"\\(?:lbrace|rbrace)(?![a-zA-Z])"), lambda m: "{" if m[0][1] == "l" else "}"),
    (re.compile(r"\\([{}%])"), r"\1"),
    (re.compile(r"\u2212"), "-"),
    (re.compile("[¼-¾⅐-⅞]"), lambda m: f" {unicodedata.normalize('NFKC', m[0])} ".replace("\u2044", "/")),
)  # fmt: skip
_INLINE = re.compile(r"(?<!\\)\$(?=\S)([^$\n]{0,200}[A-Za-z0-9)}\]])\$(?![0-9])")
_DECORATION = "*_`\"'“”‘’"
_MONEY = re.compile(r"([-+]?) ?(?:US)?([$€£¥₹]) ?(?=[-+.0-9])")
_AMOUNT = re.compile(
    r"([-+]?) ?(?:([0-9]{1,64}) ([0-9]{1,64}) ?/ ?([0-9]{1,64})(?![0-9.])"
    r"|((?:[0-9]{1,3}(?:,[0-9]{3}){1,20}(?![0-9])|[0-9]{1,64})(?:\.[0-9]{0,64})?|\.[0-9]{1,64})(?: ?/ ?([0-9]{1,64}))?)"
)
_UNIT_BEHIND = re.compile(
    r"(?<=[0-9})\]]) ?([a-z°%$€£][a-z°%/ ^{}0-9²³.]{0,30})\Z", re.IGNORECASE | re.ASCII
)
_AROUND = re.compile(r" ?([<>=+]) ?")


def tidy(answer: str) -> str:
    """Without what LaTeX and Markdown add to the look alone, and without a period at the end."""
    text = answer.strip()[: LONGEST * 4].strip(_DECORATION).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if (
            text.startswith(opening)
            and text.rstrip(".").endswith(closing)
            and not text.endswith(r"\$")
        ):
            inner = text.rstrip(".")[len(opening) : -len(closing)]
            if inner and not re.search(r"(?<!\\)\$", inner):
                text = inner
                break
    text = _INLINE.sub(r"\1", text)
    for pattern, new in _LATEX:
        text = pattern.sub(new, text)
    text = _WRAPPED.sub(r"\1", _WRAPPED.sub(r"\1", text))
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).replace("\\$", "$")
    return " ".join(text.split()).rstrip(".").strip(_DECORATION).strip()


def plain(answer: str) -> str:
    """A text as texts are compared."""
    text = answer if len(answer) > 4 * LONGEST else tidy(answer)
    return _AROUND.sub(r"\1", " ".join(text.replace("$", "").casefold().split()).rstrip(". "))


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
    """A unit in its short form, empty if it is none: `square centimeters` gives `cm^2`."""
    text = (
        text.strip(" .")
        .casefold()
        .replace("²", "^2")
        .replace("³", "^3")
        .replace("{", "")
        .replace("}", "")
    )
    text = text.replace(" per ", "/").replace("degrees ", "").replace("° ", "°")
    power = ""
    for word, exponent in (("square ", "^2"), ("sq ", "^2"), ("sq. ", "^2"), ("cubic ", "^3")):
        if text.startswith(word):
            text, power = text[len(word) :], exponent
    parts = []
    for part in text.split("/"):
        name, _, exponent = part.strip().partition("^")
        if name.strip() not in _UNIT_OF or exponent.strip() not in ("", "2", "3"):
            return ""
        parts.append(_UNIT_OF[name.strip()] + (power or (exponent and f"^{exponent.strip()}")))
    return "/".join(parts)


def unit_behind(text: str) -> str:
    """The unit that an expression ends with, empty if it has none."""
    behind = _UNIT_BEHIND.search(text)
    return unit_of(behind[1]) if behind else ""
