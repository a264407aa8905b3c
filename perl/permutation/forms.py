"""What kind of list an answer is, by what the question asks for."""

from __future__ import annotations

import re

_IMAGE = r"(?:image|picture|photo|photograph|figure|panel|frame|one)"
_VALUES = re.compile(
    rf"\b(?:for|of|in) (?:each|every)(?: one)?(?: of (?:the|these)(?: [a-z0-9]+)?)? {_IMAGE}s?\b(?=[^.?!\n]{{0,30}}\b(?:in turn|in order|"
    r"in the (?:same )?(?:given |shown |displayed )?(?:order|sequence)))"
    rf"|\bin turn\b|\brespectively\b|\b(?:one|a) [a-z]+ (?:per|for each) {_IMAGE}\b|\bimage by image\b"
    rf"|(?:\A|[.:;?!,>\n]\s{{0,4}}|\b(?:give|state|write|name|tell|list|say)\s{{1,4}})(?:for|of) (?:each|every)(?: of the(?: \w+)?)? {_IMAGE}s?\b",
    re.IGNORECASE,
)
_VALUES_IN_EACH = re.compile(
    rf"\b(?:how many|how much|what|count|give|name|state|list|report|read|write|describe|label|classify)\b[^.?!\n]{{0,80}}"
    rf"\b(?:in|of|on|for|by|from|does|do|is) (?:each|every)(?: one)?(?: of (?:the|these|those)(?: \w+)?)? {_IMAGE}s?\b",
    re.IGNORECASE,
)
"""One for each image, though it does not say in turn: "how many dogs are in each image?"."""
_AS_SHOWN = re.compile(
    r"\bin (?:the )?(?:same |given |original )?(?:order|sequence)(?: (?:they are |in which they are )?(?:shown|given|displayed|presented|listed|above|below))?\b(?! of)",
    re.IGNORECASE,
)
_ARRANGED = re.compile(
    r"\b(?:order(?! to\b)|ordered|ordering|sequence|chronological(?:ly)?|arrange[ds]?|rearrange[ds]?|sort(?:ed)?|first to last|"
    r"from (?:the )?(?:\w+est|least|most|worst|best|first)\b|\w+est first)\b",
    re.IGNORECASE,
)
_RANKED = re.compile(r"\brank(?:s|ed|ing|ings)?\b", re.IGNORECASE)
_PLACE_OF = re.compile(
    r"\b(?:rank|place|position)s? (?:of|for) (?:each|every|all|the)\b|\b(?:its|their) (?:rank|place|position)s?\b"
    rf"|\b(?:at|in) (?:which|what) (?:place|position|spot)s?\b|\b(?:which|what) (?:place|position)s?\b|\bnumber (?:the|these|all|each|every) (?:\w+ )?{_IMAGE}s?\b"
    r"|\b(?:match|pair) (?:each|every|up)\b",
    re.IGNORECASE,
)
_END = r"(?:\w+est|most|least|fewest|best|worst)"
_ONE_AND_ONE = re.compile(
    rf"\b{_END}\b[^.?!\n]{{0,80}}\band\b[^.?!\n]{{0,80}}\b{_END}\b", re.IGNORECASE
)
"""One image for each of them: "the largest and the smallest dog"."""
_NTH = r"(?:first|second|third|fourth|fifth|last|left|right|top|bottom)"
_AS_NAMED = re.compile(
    rf"\b(?:left to right|right to left|top to bottom|bottom to top|(?:anti-?|counter-?)?clockwise|reading order)\b"
    rf"|\bfirst (?:the|give|name|write|state)\b"
    rf"|(?<!which of )\b(?:what|how (?:many|much)|state|count|name|read|give|list)\b[^.?!\n]{{0,80}}?\b(?:{_NTH},? (?:the )?)+and (?:the )?{_NTH}\b"
    rf"|\b(?:what|how (?:many|much)|state|count|name|read|give|list)\b[^.?!\n]{{0,80}}?\b{_IMAGE}s? [0-9](?:,? (?:{_IMAGE} )?[0-9])*,? and (?:{_IMAGE} )?[0-9]\b",
    re.IGNORECASE,
)
"""In the sequence in which the question names them: "what do the first and the second image show?"."""
_PLURAL = r"(?:images|pictures|photos|photographs|figures|panels|frames|options|ones|them|two|three|pairs?)"
_SET = re.compile(
    rf"\b(?:which|what)(?: of)?(?: (?:the|these|those|all|following|two|three|four|other))* {_PLURAL}\b"
    rf"|\b(?:select|name|list|find|identify|choose|pick|tick|mark|give|indicate)(?: out)?(?: (?:all|every|both|any|the|of|those|two|three))* {_PLURAL}\b"
    r"|\ball that apply\b",
    re.IGNORECASE,
)


def form_of(text: str) -> str | None:
    """`values` for one value of each image in turn, `sequence`, `set`, `as named` for a sequence whose members the question
    names or places, `unclear` for a sequence or values; None where the text does not say."""
    ranked = _PLACE_OF.search(text)
    if _VALUES.search(text) or (_VALUES_IN_EACH.search(text) and not ranked):
        rest = _AS_SHOWN.sub(" ", text)
        return "unclear" if re.search(r"\b(?:arrange|rearrange|sort)\b", rest, re.I) else "values"
    if ranked:
        return "unclear"
    if _AS_NAMED.search(text):
        return "as named"
    if _ARRANGED.search(text) or _ONE_AND_ONE.search(text):
        return "sequence"
    if _RANKED.search(text):
        return "unclear"
    return "set" if _SET.search(text) else None
