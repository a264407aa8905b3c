"""Mentions of images in a text ("Image 2", "the second picture", "<image_2>"), found and rewritten.

*Unclear* words may name images, in a way that is read in more than one way ("the second of the second
to last image") or that no rewriting follows ("the first one", "image II", "chart 1").
All patterns are ASCII, so that no other script's digits or letters are taken for a name, and bounded,
so that reading takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from perl.types import Mention

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
    *("tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth"),
    *("seventeenth", "eighteenth", "nineteenth", "twentieth"),
)
CARDINALS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_SEPARATOR = re.compile(r"\s{0,8}(?:,|;|->|→|>|<|&|\band\b)\s{0,8}", re.IGNORECASE | re.ASCII)
_ITEM = re.compile(
    r"\s*[(\[]*\s*(?:(?:image|picture|option|(?P<noun>[a-z]{2,16}))(?:[\s#_-]+|(?=[0-9])))?(?P<name>[A-Za-z]|[0-9]{1,4})\s*[)\]]*\s*\.?\s*",
    re.IGNORECASE | re.ASCII,
)
_ONE = r"(?i:image|img|picture|pic|photo|photograph|figure|frame|panel|fig\.?)"
_MANY = r"(?i:images|imgs|pictures|pics|photos|photographs|figures|frames|panels)"
NOUN = rf"(?:{_MANY}|{_ONE})"
OTHER_NOUN = (
    r"(?i:charts?|graphs?|plots?|diagrams?|sketch(?:es)?|drawings?|maps?|samples?|scenes?|views?|screenshots?|screens?|"
    r"slides?|paintings?|snapshots?|shots?|illustrations?|scans?|sub-?figures?|sub-?plots?|thumbnails?|candidates?|"
    r"exhibits?|designs?|patterns?|shapes?|logos?|plans?|tables?|pages?|cards?|items?|objects?|"
    r"specimens?|products?|posters?|renders?|renderings?|layouts?|versions?|clips?|videos?|examples?|displays?|tiles?|"
    r"crops?|patch(?:es)?|portraits?|steps?|stages?|cases?|visuals?|documents?|memes?|comics?)"
)
"""Words that may name an image with a number or letter behind them, or something that it shows."""
ORDINAL = rf"(?i:{'|'.join(ORDINALS)}|last|[0-9]{{1,2}}(?:st|nd|rd|th))"

_CARDINAL = rf"(?i:{'|'.join(reversed(CARDINALS))})"
LINK = r"(?:[ \t]{1,8}(?:(?i:number|no\.?|nr\.?)[ \t]{1,8})?|-|_)#?[ \t]{0,8}"
_END = r"(?![A-Za-z0-9_])(?!\.[0-9])"
_NAME = rf"(?:[0-9]{{1,2}}|[A-Z]|{_CARDINAL}){_END}"
_OR = r"(?:\s{0,8},?\s{1,8}(?i:and|or|nor|vs\.?|versus)\s{1,8}|\s{0,8}[&/]\s{0,8})"
_AND = rf"(?:{_OR}|\s{{1,8}}to\s{{1,8}})"
_COMMA = r"\s{0,8},\s{0,8}"
# "If it is image 1 and 2 if it is image 3" explains a code.
_NO_CODE = r"(?!\s{0,8}=|\s{1,8}(?i:if|for|when|means|stands)\b)"
_AGAIN = rf"(?:(?i:the)\s{{1,8}})?{NOUN}{LINK}"
_JOINT = rf"(?:{_OR}|{_COMMA})"

_TAGGED = re.compile(r"<image[ _-]?([0-9]{1,2})>|\[image[ _-]?([0-9]{1,2})\]", re.I | re.ASCII)
_SPAN = re.compile(
    rf"\b(?:the\s{{1,8}})?(first|last)\s{{1,8}}({_CARDINAL}|[0-9]{{1,2}})\s{{1,8}}({NOUN})\b",
    re.IGNORECASE | re.ASCII,
)
_RANGE = re.compile(
    rf"\b{NOUN}\b\s{{1,8}}([0-9]{{1,2}})\s{{0,8}}(?:-|–|to|through)\s{{0,8}}([0-9]{{1,2}}){_END}",
    re.ASCII,
)
# A comma goes on with a list after a plural only: "in image 1, 2 dogs play".
_NOUN_NAME = re.compile(
    rf"\b(?:{_ONE}(?:{LINK}{_NAME}|#?[0-9]{{1,2}}{_END})"
    rf"(?:(?:{_AND}|{_COMMA}){_AGAIN}{_NAME}|{_AND}{_NAME}{_NO_CODE}){{0,30}}"
    rf"|{_MANY}(?:{LINK}{_NAME}|#?[0-9]{{1,2}}{_END})"
    rf"(?:{_COMMA}(?:{_AGAIN})?{_NAME}){{0,30}}(?:{_AND}(?:{_AGAIN})?{_NAME}){{0,30}})",
    re.ASCII,
)
_OTHER_NAME = re.compile(
    rf"\b(?P<noun>{OTHER_NOUN})(?:{LINK}|(?=[0-9]))(?P<name>[0-9]{{1,2}}|[A-Z]){_END}", re.ASCII
)
_ORDINAL_NOUN = re.compile(
    rf"(?<![\w-])({ORDINAL}(?:{_JOINT}(?:the\s{{1,8}})?{ORDINAL}){{0,30}})\s{{1,8}}({NOUN})(?!\w)",
    re.IGNORECASE | re.ASCII,
)
_NAMES = re.compile(rf"(?<![A-Za-z0-9]){_NAME}|[0-9]{{1,2}}{_END}", re.ASCII)
# "Image 2 shows" names an image; in "in the image 2 dogs" the number counts what follows.
_VERB = (
    r"(?:is|are|was|were|has|have|had|do|does|did|shows?|contains?|depicts?|looks?|seems?|differs?|"
    r"match(?:es)?|appears?|and|or|but|than|to|in|on|at|with|from|of|the|for|that|which|where|by|as|"
    r"both|together|respectively|could|will|would|only|instead|shares?|vs|versus|nor|if|like|not|"
    r"above|below|alike|darker|lighter|brighter|larger|smaller|taller|bigger|similar|different)\b"
)
_COUNTING = re.compile(rf"\s{{1,8}}(?!{_VERB})[a-z]", re.ASCII)
_ARTICLE = re.compile(r"\b(?:the|this|that|each|every|an?|one|any)\s{1,8}$", re.I | re.ASCII)
_COMPOUND = re.compile(
    rf"(?:\b(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|every|each)[\s-]{{1,8}}"
    rf"|\b(?:{ORDINAL}|next)[\s-]{{1,8}}(?:to|but)[\s-]{{1,8}}(?:the\s{{1,8}})?|-)$",
    re.IGNORECASE | re.ASCII,
)
_FROM_END = re.compile(r"\s{1,8}(?:from\s{1,8}the|but)\b", re.I | re.ASCII)
_UNREAD = re.compile(
    rf"(?:{_JOINT}|\s{{0,8}}(?:-|–|\bthrough\b)\s{{0,8}})(?:[0-9]{{1,2}}|[B-HJ-Z]){_END}"
    r"(?=\s{0,8}(?:[^\w\s]|$|\n|(?i:and|or)\b))",
    re.ASCII,
)

_TENS = r"(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)"
_BEHIND = (
    r"(?:and|or|but|nor|than|to|from|with|vs\.?|versus|is|are|was|were|has|have|had|does|do|shows?|"
    r"contains?|depicts?|of\s{1,8}(?:the|these|them|all))\b"
)
_UNSUPPORTED_FORMS = (
    rf"\b{ORDINAL}(?:\s{{1,8}}ones?\b|(?=/))",
    rf"\bthe\s{{1,8}}{ORDINAL}\b(?=\s{{0,8}}(?:[^\w\s'\"(\[<]|\Z)|\s{{1,8}}{_BEHIND})",
    rf"\b{_TENS}[\s-]{{1,8}}{ORDINAL}\s{{1,8}}{NOUN}(?!\w)",
    rf"\b(?:pen)?ultimate\s{{1,8}}{NOUN}(?!\w)|\b(?:last|next|second)\s{{1,8}}(?:but|to)\s{{1,8}}(?:one|last)\b",
    r"\b(?:first|last)\s{1,8}(?:few|several|couple|pair)\b|\b(?:former|latter)\b",
    rf"\b(?:left|left-?most|right-?most|left-hand|right-hand|middle|previous|preceding)\s{{1,8}}(?:{NOUN}|ones?)(?!\w)",
    rf"\b{NOUN}(?:\s{{1,8}}|-)(?-i:I{{2,3}}|IV|VI{{0,3}}|IX|[b-h])(?!\w)",
    rf"\b{NOUN}\s{{0,8}}(?:[(\[]\s{{0,4}}[0-9]{{1,2}}\s{{0,4}}[)\]]|\n\s{{0,8}}[0-9]{{1,2}}(?![\w.):]))",
)
_UNSUPPORTED = re.compile(
    "|".join(f"(?:{pattern})" for pattern in _UNSUPPORTED_FORMS), re.IGNORECASE | re.ASCII
)

# A letter that may be a slot's: not that of "vitamin B", nor the article "a".
_ANSWERING = re.compile(
    r"\b(?:answer|option|choice|choose|letter|label|respon|repl|select|output|format|return|write|give)",
    re.IGNORECASE,
)
_BEFORE_LETTER = re.compile(
    r"(?:^|[,;:(]|\b(?:is|are|than|from|to|and|or|of|in|on|with|between|does|do|that|like|both|as|vs|for|by|but|if|whether|while))\s*$",
    re.IGNORECASE,
)
_BEHIND_A = re.compile(
    r"\s*(?:$|[,;:&/]|(?:is|are|or|and|than|to|has|have|shows?|contains?|vs|differs?|like|as|but|the|more|less|\w+er(?= than))\b)"
)


@dataclass(frozen=True, slots=True)
class Names:
    """What names the images of a question: letter k the 0-based slot `letters[k]`, number `start` + k the slot
    `numbers[k]`, and an ordinal any of the `count` slots."""

    count: int
    letters: Sequence[int]
    numbers: Sequence[int]
    start: int = 1
    nouns: Collection[str] = ()
    """Words that labels have before them: in a text with `Chart 1: <image>`, "chart 1" is as good as "image 1"."""

    def slot(self, name: str) -> int | None:
        """The slot of a letter, or of a number in digits or words; None: no slot has that name."""
        if len(name) == 1 and name.isalpha():
            place, slots = LETTERS.index(name.upper()), self.letters
        else:
            place, slots = value_of(name) - self.start, self.numbers
        return slots[place] if 0 <= place < len(slots) else None

    def number(self, slot: int) -> int:
        """The number of a slot; raises LookupError for one without."""
        if slot not in self.numbers:
            raise LookupError(slot)
        return list(self.numbers).index(slot) + self.start


FIXED = ("several", "other")
"""Styles of mentions that cannot be rewritten."""


def value_of(number: str) -> int:
    """The value of a number in digits or words, -1 if it is none: "7", "seven"."""
    if number.isascii() and number.isdigit():
        return int(number)
    return CARDINALS.index(number.lower()) + 1 if number.lower() in CARDINALS else -1


def mentions(text: str, names: Names) -> list[Mention]:
    """The images that a text mentions, in the sequence of the text.

    `<image>` placeholders are no mentions, nor is a number or ordinal beyond the last image.
    Example: "Is image 2 like the first picture?" names slots 1 and 0.
    """
    return read(text, names)[0]


def read(
    text: str, names: Names, labels: Sequence[tuple[int, int]] = ()
) -> tuple[list[Mention], list[str]]:
    """The mentions in a text, and its unclear words.

    `labels` are where what labels a slot stands (`Image 1: <image>`); that is no mention.
    """
    found: list[Mention] = []
    unclear: list[str] = []
    taken = bytearray(len(text))  # 1 where a label or an expression that was read stands.
    for start, end in labels:
        taken[start:end] = b"\1" * (end - start)
    for pattern, reader in (
        (_TAGGED, _tagged),
        (_SPAN, _span),
        (_RANGE, _range),
        (_NOUN_NAME, _names),
        (_ORDINAL_NOUN, _ordinals),
        (_OTHER_NAME, _other),
    ):
        for match in pattern.finditer(text):
            start, end = match.span()
            if any(taken[start:end]):
                continue
            named = reader(match, names)
            if named is None:
                unclear.append(" ".join(text[start:end].split()))
            elif named:
                found += named
            else:
                continue
            taken[start:end] = b"\1" * (end - start)
            if named and (rest := _UNREAD.match(text, end)):
                unclear.append(" ".join(text[start : rest.end()].split()))
    unsupported = [words for words, _ in hinted(text, found, names.count)]
    return sorted(found, key=lambda m: (m.start, m.slot)), unsupported + unclear


def hinted(text: str, found: Sequence[Mention], count: int) -> list[tuple[str, int | None]]:
    """Words of a text that may name an image in a way that no rewriting follows ("the first one", "the left image"), and
    the slot they mean; None: any."""
    read_well = bytearray(len(text))
    for mention in found:
        read_well[mention.start : mention.end] = b"\1" * (mention.end - mention.start)
    return [
        (" ".join(match[0].split()), _hinted_slot(match[0], count))
        for match in _UNSUPPORTED.finditer(text)
        if not any(read_well[match.start() : match.end()])
    ]


def _hinted_slot(words: str, count: int) -> int | None:
    named = re.findall(rf"\b(?:{ORDINAL}|left|right|former|latter)\b", words.lower())
    if len(named) != 1 or re.search(r"ultimate|few|several|couple|pair", words.lower()):
        return None
    sides = {"left": 0, "former": 0, "right": count - 1, "latter": count - 1}
    return sides[named[0]] if named[0] in sides else _ordinal(named[0], count)[0]


def labels_in(text: str, letters: str) -> list[str]:
    """Letters of slots that stand alone in a sentence ("Is A darker than B?"), if not all of them stand in one list ("Which
    is darker, A or B?") or in words about the form of the answer."""
    out: list[str] = []
    for sentence in re.split(r"[.?!\n]|<image>", text):
        if _ANSWERING.search(sentence):
            continue
        alone = [
            match
            for match in re.finditer(
                rf"(?<![\w'’.-])[(\[]?([{letters}])[)\]]?(?![\w'’-])", sentence
            )
            if _BEFORE_LETTER.search(sentence[: match.start()])
            and (match[1] != "A" or match[0] != "A" or _BEHIND_A.match(sentence, match.end()))
        ]
        lists: list[list[re.Match[str]]] = []
        for match in alone:
            between = sentence[lists[-1][-1].end() : match.start()] if lists else "."
            if re.fullmatch(rf"(?:{_AND}|{_OR}|{_COMMA})+", between, re.ASCII):
                lists[-1].append(match)
            else:
                lists.append([match])
        out += [
            sentence[row[0].start() : row[-1].end()]
            for row in lists
            if {match[1] for match in row} != set(letters)
        ]
    return out


def bare_name(text: str, names: Names) -> Mention | None:
    """The image that a text names which is nothing but a number or an ordinal: `2`, `Second`, `(3).`"""
    match = re.fullmatch(
        rf"[\s(\[]{{0,8}}(?:the\s{{1,8}})?(?P<name>{ORDINAL}|{_CARDINAL}|[0-9]{{1,2}})(?:\s{{1,8}}one)?[\s).,;\]]{{0,8}}",
        text,
        re.IGNORECASE | re.ASCII,
    )
    if not match:
        return None
    name = match["name"].lower()
    slot, style = names.slot(name), "number" if name.isdigit() else "word"
    if value_of(name) < 0:
        slot, style = _ordinal(name, names.count)
        slot = slot if 0 <= slot < names.count else None
    return None if slot is None else Mention(*match.span("name"), slot, style)


def listed(answer: str, names: Names) -> list[Mention]:
    """An answer that is nothing but names; empty if it is not."""
    found, position = [], 0
    ends = [match.span() for match in _SEPARATOR.finditer(answer)]
    for end, after in [*ends, (len(answer), len(answer))]:
        item = answer[position:end]
        match = _ITEM.fullmatch(item)
        if match and (not match["noun"] or match["noun"].lower() in names.nouns):
            slot = names.slot(match["name"])
            style = "number" if match["name"].isdigit() else "letter"
            one = None if slot is None else Mention(*match.span("name"), slot, style)
        else:
            one = bare_name(item, names)
        if one is None or one.style == "word":
            return []
        found.append(replace(one, start=one.start + position, end=one.end + position))
        position = after
    return found


def write(text: str, found: Sequence[Mention], slots: Sequence[int], names: Names) -> str:
    """The text with each of its mentions of slot s naming slot `slots[s]` instead, in the same style.

    A slot without a letter is written as a number. Raises LookupError for an image that is named by
    number and has moved to a slot that no number names, and for a mention of a style in `FIXED` that would move.

    Example: with slots (1, 0) "Is Image 1 like the second picture?" becomes "Is Image 2 like the first
    picture?".
    """
    out, position = [], 0
    for mention in found:
        slot, old = slots[mention.slot], text[mention.start : mention.end]
        if slot != mention.slot:
            out += [text[position : mention.start], written(mention, old, slot, names)]
            position = mention.end
    return "".join([*out, text[position:]])


def _tagged(match: re.Match[str], names: Names) -> list[Mention] | None:
    group = 1 if match[1] else 2
    slot = int(match[group]) - 1
    if names.start != 1 or (slot < len(names.numbers) and names.numbers[slot] != slot):
        return None  # It may count all images, or mean the one that is labelled so.
    return [Mention(*match.span(group), slot, "tag")] if 0 <= slot < names.count else []


def _span(match: re.Match[str], names: Names) -> list[Mention] | None:
    length = value_of(match[2])
    if length > names.count or length < 2:
        return None if length == 1 else []
    start = 0 if match[1].lower() == "first" else names.count - length
    return [Mention(*match.span(), slot, "several") for slot in range(start, start + length)]


def _range(match: re.Match[str], names: Names) -> list[Mention] | None:
    low, high = int(match[1]) - names.start, int(match[2]) - names.start
    if max(low, high) >= names.count:
        return []
    plural = match[0].split()[0].lower().endswith("s")
    if not plural and re.search(r"to\s*[0-9]+$", match[0], re.ASCII):
        return []  # "From image 1 to 2" names two images in sequence.
    if not plural or not 0 <= low < high < len(names.numbers):
        return None
    return [Mention(*match.span(), slot, "several") for slot in names.numbers[low : high + 1]]


def _names(match: re.Match[str], known: Names) -> list[Mention] | None:
    """Names behind a noun; None where a number may count what follows it, or names no known image."""
    text = match.string
    noun = re.match(NOUN, match[0])
    assert noun is not None
    names = list(_NAMES.finditer(text, match.start() + noun.end(), match.end()))
    places = [
        LETTERS.index(name[0]) if name[0] in LETTERS else value_of(name[0]) - known.start
        for name in names
    ]
    if max(places) >= known.count or min(places) < 0:
        return []
    plural = noun[0].lower().endswith("s")
    spelled = names[0][0].lower() in CARDINALS
    counting = _COUNTING.match(text, match.end())
    article = _ARTICLE.search(text[max(0, match.start() - 12) : match.start()])
    if len(names) == 1 and counting and (plural or (spelled and article) or names[0][0] == "I"):
        return []  # "In the images 2 dogs", "the image two dogs", "the picture I took".
    if len(names) == 1 and (plural or (spelled and article)):
        return None
    listed = plural and re.search(rf"{_AND}{_NAME}$", match[0], re.ASCII)
    if counting and (spelled or article or (len(names) > 1 and not listed)):
        return None
    out = []
    for name in names:
        slot = known.slot(name[0])
        if slot is None:
            return None
        style = "letter" if name[0] in LETTERS else "number" if name[0].isdigit() else "word"
        out.append(Mention(*name.span(), slot, style))
    return out


def _other(match: re.Match[str], names: Names) -> list[Mention] | None:
    """What may be an image by a noun of what it shows: "chart 1"."""
    slot = names.slot(match["name"])
    if slot is None:
        place = LETTERS.find(match["name"])
        return None if 0 <= place < names.count else []
    known = match["noun"].lower() in names.nouns
    if not known:
        return [Mention(*match.span(), slot, "other")]
    style = "letter" if match["name"] in LETTERS else "number"
    return [Mention(*match.span("name"), slot, style)]


def _ordinals(match: re.Match[str], names: Names) -> list[Mention] | None:
    text = match.string
    named = [
        (name, *_ordinal(name[0].lower(), names.count))
        for name in re.finditer(rf"\b{ORDINAL}\b", match[1], re.IGNORECASE | re.ASCII)
    ]
    if not all(0 <= slot < names.count for _, slot, _ in named):
        return []
    one_of_many = len(named) == 1 and match[2].lower().endswith("s")
    if (
        one_of_many
        or _COMPOUND.search(text[max(0, match.start() - 40) : match.start()])
        or _FROM_END.match(text, match.end())
    ):
        return None
    offset = match.start(1)
    return [Mention(offset + n.start(), offset + n.end(), slot, style) for n, slot, style in named]


def _ordinal(word: str, count: int) -> tuple[int, str]:
    if word == "last":
        return count - 1, "last"
    if word in ORDINALS:
        return ORDINALS.index(word), "ordinal"
    return int(word[:-2]) - 1, "suffixed"


def written(mention: Mention, old: str, slot: int, names: Names) -> str:
    """The words `old` of a mention as they name another slot; raises LookupError where none do."""
    if mention.style in FIXED:
        raise LookupError(slot)
    if mention.style == "letter" and slot in names.letters:
        letter = LETTERS[list(names.letters).index(slot)]
        return letter if old.isupper() else letter.lower()
    if mention.style in ("ordinal", "last") and slot < len(ORDINALS):
        return ORDINALS[slot].capitalize() if old[0].isupper() else ORDINALS[slot]
    if mention.style in ("ordinal", "suffixed", "last"):
        return f"{slot + 1}{_suffix(slot + 1)}"
    if mention.style == "tag":
        return str(slot + 1)
    number = names.number(slot)
    if mention.style == "word" and 0 < number <= len(CARDINALS):
        word = CARDINALS[number - 1]
        return word.capitalize() if old[0].isupper() else word
    return str(number)


def _suffix(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
