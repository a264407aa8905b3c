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
    r"\b(?:rank|place|position)s? (?:of|for) (?:each|every|all|the)\b|\b(?:its|their) (?:rank|place|position)s?\b",
    re.IGNORECASE,
)
_END = r"(?:\w+est|most|least|fewest|best|worst)"
_ONE_AND_ONE = re.compile(
    rf"\b{_END}\b[^.?!\n]{{0,80}}\band\b[^.?!\n]{{0,80}}\b{_END}\b", re.IGNORECASE
)
"""One image for each of them: "the largest and the smallest dog"."""
_PLURAL = r"(?:images|pictures|photos|photographs|figures|panels|frames|options|ones|of them|two|three|pair|all)"
_SET = re.compile(
    rf"\b(?:which|what|select|name|list|find|identify|choose|pick|tick|mark|give|indicate)\b[^.?!\n]{{0,40}}\b{_PLURAL}\b",
    re.IGNORECASE,
)


def form_of(text: str) -> str | None:
    """`values` for one value of each image in turn, `sequence`, `set`, `unclear` for a sequence or values; None where the
    text does not say."""
    if _VALUES.search(text):
        rest = _AS_SHOWN.sub(" ", text)
        return "unclear" if re.search(r"\b(?:arrange|rearrange|sort)\b", rest, re.I) else "values"
    if _PLACE_OF.search(text):
        return "unclear"
    if _ARRANGED.search(text) or _ONE_AND_ONE.search(text):
        return "sequence"
    if _RANKED.search(text):
        return "unclear"
    return "set" if _SET.search(text) else None
