"""The options that a text chooses, by their letters, however it writes them.

`chosen_letters(completion, count, options)` reads a completion, `letters_in(text, count, options)` a short text that is
known to be the answer, such as what stands in a box. Both give letters in alphabetical order, as in "B" or "AC", and None
where there is none: a hedge ("A or B"), a negation ("not B", "B is wrong") and a letter beyond the options choose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from perl.permutation import LETTERS
from perl.rewards.reading.notation import WIDE, WRAPPED
from perl.rewards.reading.places import marked

_DECORATION = re.compile(
    r"\\(?:text[a-z]*|mathrm|mathbf)\b|\\[()\[\]]|</?[a-z]{1,10}>|[*_`$\"“”#]| (?= )"
    r"|['‘](?=[A-Za-z]['’](?!\w))|(?<=['‘][A-Za-z])['’](?!\w)"
    r"|\b(?:[A-Za-z]\.){1,4}[A-Za-z]\b\.?"
)
"""With abbreviations: the e of `e.g. B` is no choice."""
_NAME = r"(?:options?|choices?|answers?|letters?)"
_BARE = re.compile(
    rf"(?:(?:{_NAME}|image|picture|photo|figure|panel|view)\s)?[\W_]*([A-Za-z])(?:(?!\?)[\W_])*",
    re.IGNORECASE | re.ASCII,
)
_BARE_LIST = re.compile(r"[\s,;&()\[\]{}.]|\band\b", re.IGNORECASE | re.ASCII)
_GLUED = re.compile(r"(?:([A-J])(?!.*\1)){2,10}")
_LABEL = re.compile(
    r"[(\[]?([A-Za-z])\s?(?:[)\]][.:]?|[.:])(?![.:)])\s{0,4}(?!(?:or|and)\b)(?=\S)", re.ASCII
)
_LABELS = re.compile(r"(?<![A-Za-z0-9'’])([A-Za-z])(?:\)|[.:]\s)", re.ASCII)
_LISTED = re.compile(r"^[ (\[-]*([A-Za-z])(?:\)|[.:])\s", re.ASCII | re.MULTILINE)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9'’\\^+])(?:[(\[{]\s?([A-Za-z])\s?[)\]}]|([A-Za-z])(?![A-Za-z0-9'’+(-]|\s?[=^])[)\]]?)",
    re.ASCII,
)
_ARTICLE = re.compile(
    r" (?!(?:and|or|nor|is|are|was|isn|because|since|as|for|but|not|so|if|which|that|based|due|while|has|shows?|would|seems"
    r"|looks|must|can|cannot|does|rather|fits|matches|alone|only|to|vs|then|with)\b)[a-z0-9]"
)
"""Behind an A or I that is a word and no letter."""
_JOIN = re.compile(
    rf"\s?(?:[,;&/|]\s?)?(?:\b(and|or|nor)\b|(?<=[,;&/|])|(?<=[,;&/|]\s))\s?(?:(?:also|the|{_NAME})\s){{0,3}}",
    re.IGNORECASE | re.ASCII,
)
_FILLER = (
    rf"(?:(?:the|be|is|a|any|simply|just|correct|right|final|either|both|likely|probably|most|clearly|definitely|certainly|seems|to|{_NAME}|image|picture|photo|figure"
    rf"|panel)\s|{_NAME}?\s?[:=]\s?){{0,5}}"
)
_CUE = re.compile(
    r"(?:\banswers?(?:['’]s)?(?:\s(?:to|for)\s(?:the|this)\s[a-z]{1,12})?|\b(?:option|choice|pick)(?=\s(?:is|should|must|would)\b)"
    r"|\b(?:correct|right|best|final)\s(?:option|choice|letter|one)s?"
    r"|\b(?:choose|chose|choosing|pick|picked|select|selected|go with|opt for|settle on)"
    r"|\bit(?:['’]s| is| must be| should be))(?:\s(?:is|are|should be|must be|might be|may be|would be|therefore|thus))*\s?[:=]?\s{0,3}"
    rf"{_FILLER}[\[{{<]?\Z",
    re.IGNORECASE | re.ASCII,
)
_CUE_BEHIND = re.compile(
    r"\s(?:is|are|must be)\s(?:the\s)?(?:correct|right|answer|best)\b", re.IGNORECASE
)
_OPTION = re.compile(rf"\b(?:{_NAME} ?|(?:option|choice|answer|letter) ?[:=] ?)\Z", re.IGNORECASE)
_NOT = re.compile(
    r"(?:\b(?:not|never|neither|cannot be|without|except(?: for)?|rather than|instead of|other than|over"
    r"|(?:any(?:thing)?|all|everything)\sbut|rules? out|ruled out|ruling out|eliminat(?:e|es|ed|ing)|exclud(?:e|es|ed|ing)"
    rf"|reject(?:s|ed|ing)?)|n['’]t(?: be)?)\s(?:(?:choose|pick|select|say|go with)\s)?{_FILLER}\Z"
    r"|\bif\s(?:[a-z'’]{1,10}\s){0,5}\Z",
    re.IGNORECASE | re.ASCII,
)
_NOT_BEHIND = re.compile(
    r"(?:\s\([^()]{1,30}\))?(?:\s?(?:\?|\(?(?:wrong|incorrect|false)\b)|\s(?:if|unless)\b|\s(?:cannot\b|[a-z]{2,6}n['’]t\b|can['’]t\b"
    r"|(?:is|are|was|can|could|does|would|will|must|seems?|looks?)\s(?:[a-z]{2,12}ly\s|also\s)?"
    r"(?:not|never|wrong|incorrect|false|ruled out|out|eliminated|excluded|impossible|unlikely)\b))",
    re.IGNORECASE | re.ASCII,
)
_END = re.compile(r"\s*(?:[.,;:!]|\Z)")
_RETRACTED = re.compile(
    r"\b(?:wait|actually|correction|scratch that|sorry|no)\b\s?[,.:;!-]", re.IGNORECASE
)
_LONGEST = 5000
"""The end of a longer text is read."""
_BEFORE, _BEHIND = 80, 60
"""Characters around a letter that may say something about it."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Letters that are named together, as in `A, C and D`."""

    letters: str
    level: int
    """2: said to be the answer; 1: called an option, or in brackets; 0: alone."""
    negated: bool
    hedged: bool
    start: int


def chosen_letters(completion: str, count: int = 26, options: Sequence[str] = ()) -> str | None:
    """The letters that a completion chooses among `count` options: by what its last `<answer>` block or box holds, else
    by what it says behind its thinking, where a letter must be called the answer or an option, stand in brackets or be all
    that is said."""
    answer = marked(completion)
    if answer is not None:
        return letters_in(answer, count, options)
    return letters_in(completion.rpartition("</think>")[2], count, options, whole=True)


def letters_in(
    text: str, count: int = 26, options: Sequence[str] = (), *, whole: bool = False
) -> str | None:
    """The letters that an answer chooses. In this order: letters alone; those of the last "answer is X"; a letter that
    opens the text (`B. a dog`); those called an option or in brackets; single capitals, unless the text is a `whole`
    completion; the only one of the texts in `options` that occurs."""
    text = WRAPPED.sub(r"\1", text[-_LONGEST:].translate(WIDE))
    text = _DECORATION.sub("", text).strip()
    chosen, named = _read(text, whole)
    if not named and options:
        chosen = _by_text(text, options)
    return chosen if chosen and set(chosen) <= set(LETTERS[:count]) else None


def _read(text: str, whole: bool) -> tuple[str | None, bool]:
    """The letters chosen, and whether any is named."""
    if alone := _BARE.fullmatch(text):
        return alone[1].upper(), True
    letters = "".join(sorted(text)) if _GLUED.fullmatch(text) else ""
    if letters and (letters == text or not whole):  # All that is said may be a sequence, or a word.
        return letters, True
    parts = [part for part in _BARE_LIST.split(text[:400]) if part]
    if (
        parts
        and len(text) < 400
        and all(len(part) == 1 and part.isascii() and part.isalpha() for part in parts)
        and len({part.isupper() for part in parts}) == 1  # Not `(A) x`.
    ):
        return "".join(sorted({part.upper() for part in parts})), True
    groups = _groups(text)
    changed = max((match.end() for match in _RETRACTED.finditer(text)), default=0)
    if changed:
        later = _choose(text, [group for group in groups if group.start >= changed], False)
        if later and len(later) == 1:
            return later, True
    chosen = _choose(text, groups, whole)
    named = any(group.level or group.negated or not whole for group in groups)
    return chosen or None, named or chosen is not None


def _choose(text: str, groups: Sequence[_Group], whole: bool) -> str | None:
    """The letters that one level settles on, empty for a hedge; None if nothing is chosen."""
    kept = [group for group in groups if not group.negated]
    said = [group for group in kept if group.level == 2]
    if said:
        later = "".join(g.letters for g in groups if g.negated and g.start > said[-1].start)
        return "" if said[-1].hedged or set(said[-1].letters) & set(later) else said[-1].letters
    denied = {letter for group in groups if group.negated for letter in group.letters}
    label, labels = _LABEL.match(text), {letter.upper() for letter in _LABELS.findall(text)}
    if label and {label[1].upper(), *labels} - denied == {label[1].upper()}:
        return label[1].upper()
    for level in (1,) if whole else (1, 0):
        found = [group for group in kept if group.level == level]
        last = text.rfind("\n\n")
        if whole and last >= 0 and not _LABELS.match(text[last:].strip(" \n([")):
            found = [group for group in found if group.start > last] or found
        if found:
            letters = {letter for group in found for letter in group.letters}
            unclear = any(group.hedged for group in found) or (whole and len(letters) > 1)
            return "" if unclear else "".join(sorted(letters))
    return None


def _groups(text: str) -> list[_Group]:
    """The letters that a text names, those that it joins together as one group."""
    groups: list[_Group] = []
    lines = pairwise(_LISTED.finditer(text))
    listed = {one.start(1) for one, other in lines if ord(other[1]) == ord(one[1]) + 1}
    end, last = 0, len(text.rstrip("."))
    for token in _TOKEN.finditer(text):
        before = text[max(0, token.start() - _BEFORE) : token.start()]
        behind = text[token.end() : token.end() + _BEHIND]
        # A list of the options may stand behind a line that ends with "the correct option:".
        cued = token.start(2) not in listed and _CUE.search(before)
        option = _OPTION.search(before)
        if not token[1]:
            if token[2] in "AIai" and _ARTICLE.match(behind):
                continue
            alone = token[2].islower() or token[2] == "I"
            ends = _END.match(behind) or _CUE_BEHIND.match(behind)
            if alone and not ((cued or option) and ends):
                continue
        opens, closes = not before and behind.startswith("\n"), before.endswith("\n")
        line = opens or (closes and token.end() == last)
        new = _Group(
            (token[1] or token[2]).upper(),
            2 if cued or line or _CUE_BEHIND.match(behind) else 1 if option or token[1] else 0,
            bool(_NOT.search(before) or _NOT_BEHIND.match(behind)),
            False,
            token.start(),
        )
        join = _JOIN.fullmatch(text, end, token.start())
        clause = new.negated if join and "," in join[0] else not _END.match(behind)
        if groups and join and (join[1] or join[0][:1] not in ",;" or not clause):
            groups[-1] = _joined(groups[-1], new, join)
        else:
            groups.append(new)
        end = token.end()
    return groups


def _joined(one: _Group, other: _Group, join: re.Match[str]) -> _Group:
    return _Group(
        "".join(sorted({*one.letters, *other.letters})),
        max(one.level, other.level),
        one.negated or other.negated,
        one.hedged or any(sign in join[0].lower() for sign in ("/", "|", "or ")),
        one.start,
    )


def _by_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text is all that is said, or else that occurs and is not negated."""
    low, labels = (
        text.casefold(),
        [
            _LABEL.sub("", _DECORATION.sub("", option).strip(), count=1).casefold()
            for option in options
        ],
    )
    for found in (
        [k for k, option in enumerate(labels) if option and option == low.rstrip(". ")],
        [k for k, option in enumerate(labels) if option and _occurs(option, low)],
    ):
        if len(found) == 1:
            return LETTERS[found[0]]
    return None


def _occurs(option: str, text: str) -> bool:
    match = re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text)
    return bool(match) and not _NOT.search(text[max(0, match.start() - _BEFORE) : match.start()])
