"""Forms of questions whose answer is the same in whatever sequence the images are shown.

A list of what is allowed: a form is here if its meaning has no first and second image (counts, totals,
"both", "any", "the same", "in common", "one ... the other"), or if every image that it is about is
named. A question of any other form may depend on the sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from perl.data.labelling.text import Question
from perl.permutation import CARDINALS, ORDINALS

Asked = Literal["number", "truth", "thing"]

_LONGEST = 300  # Characters of a sentence; a longer one is of no known form.
_LONGEST_ANSWER = 5  # Words; a longer answer may describe the images one after the other.
_NAMED = "\0"

_NOUN = r"(?:images|pictures|photos|photographs|figures|panels)"
_ONE = r"(?:image|picture|photo|photograph|figure|panel)"
_MANY = rf"(?:{'|'.join(CARDINALS[1:])}|[0-9]{{1,2}})"
_THESE = rf"(?:(?:the |these |the following ){_MANY}?\s?{_NOUN})"
_EVERY = rf"(?:(?:both|all|all {_MANY}|both of|all of|all {_MANY} of)(?: {_THESE}| {_NOUN}))"
_ANY = rf"(?:(?:any|either|each|every|every one|each one)(?: of {_THESE}| {_ONE}))"
_SHOW = r"(?:show|contain|have|depict|feature|include|display|share)"
_STATE = r"(?:shows?|contains?|ha(?:s|ve)|depicts?|features?|includes?|displays?|is|are)"

# Words that put the images together, or in a sequence.
_ARRANGED = (
    r"\b(?:together|sorted|arranged|ranked|ordered|alphabetical\w*|ascending|descending|numerical\w*|"
    r"left|right)\b"
)
# Words that look from one image to another, or at what all of them make up.
_COMPARED = (
    r"tall|larg|small|bigg|dark|bright|light|high|low|long|short|old|young|new|clos|near|farth|furth|"
    r"fast|slow|warm|cold|hott|thick|thinn|wid|narrow|full|empt|strong|weak|deep|clean|lat|earl|steep|"
    r"fatt|great|loud|soft|\w+i"
)
_A_NUMBER = r"(?:[0-9]|(?:one|two|three|four|five)\b)"
_RELATIVE = (
    rf"(?:{_ARRANGED}|\b(?:more|less|fewer)\b(?! than {_A_NUMBER})|\bthan\b(?! {_A_NUMBER})|"
    rf"\b(?:{_COMPARED})er\b|\b[fgh]\(|"
    r"\b(?:better|worse|others?|another|else|rest|newly|new|still|again|already|yet|now|no longer|"
    r"any ?more|since|until|once|when|while|between|across|over|through|which|what|how|who|whose|where|"
    r"why|respectively|differ\w*|compar\w*|increas\w*|decreas\w*|grow\w*|grew|shr[aiu]nk\w*|being|"
    r"been|getting|become\w*|melt\w*|freez\w*|opening|closing|rising|falling|flew|came|gone|went|"
    r"arriv\w*|combin\w*|concat\w*|join\w*|spell\w*|form(?:s|ed)?|words?|letters?|phrase|sentence|"
    r"digits?|subtract\w*|divid\w*|ratio|quotient|minus)\b)"
)
_X = rf"(?:(?!{_RELATIVE})[^,;])+?"
_ANYTHING = rf"(?:(?!{_ARRANGED})[^;])+?"

_QUANTIFIED = (
    rf"(?:(?:(?:at least|at most|exactly|only) )?(?:one|two|three)|both|all|each|every|no|none|neither|some)"
    rf"(?: of {_THESE})?(?: (?:{_NOUN}|{_ONE}))? {_STATE} {_ANYTHING}"
    rf"|in (?:(?:at least|exactly|only) )?(?:one|both|all|each|every|no) (?:of {_THESE}|{_NOUN}|{_ONE}),? {_ANYTHING}"
)
_TRUTH = rf"(?:is (?:this|that|the statement) (?:true|correct) (?:of|for) (?:both|{_THESE}))"

_FORMS: tuple[tuple[Asked, str], ...] = (
    # Each image is judged by itself, and the ones that pass are counted.
    ("number", rf"how many (?:other )?(?:of {_THESE}|{_NOUN}) (?:{_STATE}|were|was) {_X}"),
    ("number", rf"in how many (?:other )?(?:of {_THESE}|{_NOUN}) (?:is|are|can you see|do you see) {_X}"),
    # Totals.
    ("number", rf"how many {_X} (?:are|are there|are shown|are visible|can be seen|can you see|do you see) "
               rf"(?:in|on) (?:{_THESE}|{_EVERY}) (?:together|in total|altogether|in all|combined)"),
    ("number", rf"how many {_X} (?:are|are there|are shown|are visible|can be seen|can you see|do you see) "
               rf"(?:together|in total|altogether|in all|combined) (?:in|on) (?:{_THESE}|{_EVERY})"),
    ("number", rf"how many {_X} do (?:{_THESE}|{_EVERY}) (?:show|contain) (?:together|in total|altogether|in all|combined)"),
    # Both, all, any.
    ("truth", rf"do {_EVERY} {_SHOW} {_X}|(?:do|does) {_ANY} {_SHOW} {_X}"),
    ("truth", rf"(?:are {_EVERY}|(?:is|are) {_ANY}) (?:taken )?(?:in|at|of|from) {_X}"),
    ("truth", rf"(?:does|do) any other {_ONE}s? {_SHOW} {_X}"),
    ("truth", rf"(?:is|are) there (?:a|an|any|at least one) {_X} in (?:{_EVERY}|{_ANY})"),
    # Relations that hold both ways.
    ("truth", rf"do {_THESE} {_SHOW} the same {_X}"),
    ("truth", rf"(?:is|are) the same {_X} (?:shown|visible|seen|depicted|present) in (?:{_THESE}|{_EVERY})"),
    ("truth", rf"are (?:{_THESE}|{_EVERY}) (?:identical|the same|alike|similar|(?:taken )?(?:in|at|of|from) the same {_X})"),
    ("truth", rf"do {_THESE} have {_X} in common"),
    # Statements without a first and a second image.
    ("truth", rf"is it (?:true|correct) (?:of|for) (?:both|{_THESE}) that (?:{_QUANTIFIED})"),
    # What is shared.
    ("thing", rf"what do (?:{_THESE}|{_EVERY}) have in common"),
    ("thing", rf"(?:what|which) {_X} do (?:{_THESE}|{_EVERY}) have in common"),
    ("thing", rf"what is common (?:to|in) (?:{_THESE}|{_EVERY})"),
    ("thing", rf"(?:what|which) (?!two|many|number)(?:{_X} )?(?:is|appears|occurs) in {_EVERY}"),
    # About images that are named; they stay, or their names follow.
    ("thing", rf"(?:what|which) {_X} (?:is|are) {_X} in {_NAMED}"),
    ("thing", rf"what (?:is|are) {_X} in {_NAMED}"),
    ("number", rf"how many {_X} (?:are|are there) in {_NAMED}"),
    ("truth", rf"(?:is|are) {_X} in {_NAMED}(?: {_X})?|is {_NAMED} {_X}|does {_NAMED} (?:show|contain|have) {_X}"),
    ("truth", rf"(?:is|are) {_X} in {_NAMED} \w+er than {_X} in {_NAMED}|is {_NAMED} \w+er than {_NAMED}"),
    ("number", rf"how many more {_X} (?:has|does) {_NAMED} (?:have )?than {_NAMED}"
               rf"|how many more {_X} are (?:there )?in {_NAMED} than in {_NAMED}"),
)  # fmt: skip
_READ: Sequence[tuple[Asked, re.Pattern[str]]] = tuple(
    (asked, re.compile(form)) for asked, form in _FORMS
)
_TRUTH_OF = re.compile(_TRUTH)
_STATEMENT = re.compile(_QUANTIFIED)
_OF_OPTIONS = re.compile(
    r"which (?:(?:of (?:these|the following)|statement|option|answer|one|of (?:these|the following) statements) )?"
    r"(?:is|are) (?:true|correct|right|false|wrong|not true)"
    rf"|which (?:pair|two|{_NOUN})(?: of {_NOUN})? (?:shows?|depicts?|contains?|ha(?:s|ve)|are of) the same {_X}"
)
# Sentences that say nothing about what the images show.
_INTRODUCTION = re.compile(
    rf"(?:(?:look at|consider|compare|examine|study|here are|these are|you (?:see|are given|are shown)) "
    rf"(?:both |all )?(?:{_THESE}|{_MANY} {_NOUN}|{_NOUN})(?: carefully| closely| below| above)?"
    r"|answer (?:with )?(?:yes or no|true or false)|(?:yes or no|true or false)|questions?|options?|choices?|answer)"
)
_NEAR_PLACES = re.compile(
    rf"\b(?:{'|'.join(ORDINALS)}|[0-9]{{1,2}}(?:st|nd|rd|th)|last|former|latter|left|right|top|bottom|upper|lower|"
    r"middle|cent(?:er|re|ral)|left-?most|right-?most|previous|next|earlier|later|other|other one)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(rf"[0-9]+(?:,[0-9]{{3}})*|{'|'.join(CARDINALS)}|zero|none", re.IGNORECASE)
_YES_NO = re.compile(r"yes|no|true|false", re.IGNORECASE)
_NO_ONE_IMAGE = re.compile(
    r"(?:neither|none|both|all|equal(?:ly)?|the same|cannot (?:tell|be (?:told|determined))|no difference)"
    rf"(?: of (?:them|the above|these|{_THESE}))?(?: {_NOUN})?",
    re.IGNORECASE,
)
_LIST = re.compile(r",|;|/|&|\b(?:and|or|then|versus|vs)\b", re.IGNORECASE)
_THAN = re.compile(_RELATIVE, re.IGNORECASE)


def stays_right(question: Question, answer: str) -> bool:
    """Whether question and answer are of a form whose answer does not depend on the sequence of the images.

    `answer` is the answer, or the words of the right option. Example: "How many images show a bus?"
    with "2" is; "Which is darker?" with "the left one", or "Has the plant grown?" with "Yes", is not.
    """
    said = answer.strip().rstrip(".")
    if any(_NEAR_PLACES.search(line) for line in (said, *question.options.values())):
        return False
    asked = _asked(_sentences(question))
    if asked == "number":
        return bool(_NUMBER.fullmatch(said))
    if asked == "truth":
        return bool(_YES_NO.fullmatch(said))
    return asked == "thing" and not _may_list(said, question.options)


def states_truth(answer: str) -> bool:
    """Whether an answer is yes, no, true or false."""
    return bool(_YES_NO.fullmatch(answer.strip().rstrip(".")))


def names_no_one(option: str) -> bool:
    """Whether an option speaks of no image apart from the others: neither, both, none of them."""
    return bool(_NO_ONE_IMAGE.fullmatch(option.strip().rstrip(".")))


def asks_about_options(question: Question) -> bool:
    """Whether it asks which option holds, and every option says by name which images it compares."""
    sentences = [s for s in _sentences(question) if not _INTRODUCTION.fullmatch(s)]
    named = {line: len(question.named(line)) for line in question.options.values()}
    clear = all(n > 1 or not _THAN.search(line) for line, n in named.items())
    return clear and len(sentences) == 1 and bool(_OF_OPTIONS.fullmatch(sentences[0]))


def _asked(sentences: list[str]) -> Asked | None:
    rest = [s for s in sentences if not _INTRODUCTION.fullmatch(s)]
    if any(len(s) > _LONGEST for s in rest):
        return None
    if len(rest) == 2 and _TRUTH_OF.fullmatch(rest[1]) and _STATEMENT.fullmatch(rest[0]):
        return "truth"
    if len(rest) != 1:
        return None
    for asked, form in _READ:
        if form.fullmatch(rest[0]):
            return asked
    return None


def _sentences(question: Question) -> list[str]:
    """The sentences of the stem in lower case, a mark in place of every image that is named."""
    text = question.stem
    for mention in sorted(question.named(text), key=lambda m: -m.start):
        text = text[: mention.start] + _NAMED + text[mention.end :]
    text = re.sub(
        rf"(?:\bthe\s+)?(?:\b{_ONE}[\s#_-]*)?{_NAMED}(?:\s+{_ONE}\b)?", _NAMED, text, flags=re.I
    )
    parts = (" ".join(part.lower().split()) for part in re.split(r"[.?!:\n]+", text))
    return [part for part in (part.strip(" ,;-()[]*") for part in parts) if part]


def _may_list(answer: str, options: dict[str, str]) -> bool:
    """Whether an answer in words could be about one image after the other."""
    if options:
        # "a cat and a dog" beside "a dog and a cat" asks for a sequence.
        words = sorted(answer.lower().split())
        return sum(sorted(line.lower().split()) == words for line in options.values()) > 1
    return len(answer.split()) > _LONGEST_ANSWER or bool(_LIST.search(answer))
