"""Answers to questions whose options stand in words: `A. Image 2`, `B. both`, `C. a dog`.

Where the text is rewritten, an option follows its images and its letter stays right. Where the text
stays, the right option is the one that says of the images' new slots what the old one said of the
old slots. If no option does, or two do, there is no right answer and the question is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from perl.permutation.answers import LETTER_AND_TEXT, Lettering, rename
from perl.permutation.options import Meaning, described, images_in, letter_of, meaning, moved
from perl.permutation.references import bare_name

_LETTER = re.compile(
    r"(\s*[(\[]*\s*(?:(?:option|choice|image|picture)\s+)?)([A-Za-z])(\s*[)\]]*\s*\.?\s*)",
    re.IGNORECASE | re.ASCII,
)
_SEPARATOR = re.compile(r"(\s{0,8}(?:,|;|&|\band\b)\s{0,8})", re.IGNORECASE | re.ASCII)


class NoAnswer(Exception):
    """Why an answer cannot be written when the images move."""


def says(names: Lettering, text: str) -> Meaning:
    """What an option or an answer says."""
    one = bare_name(text, names.count, names.numbers) if names.bare else None
    return meaning(text, [one] if one else names.found(text))


def meanings(names: Lettering) -> dict[str, Meaning]:
    """What every option says, by letter."""
    return {line.letter: says(names, line.text) for line in names.lines}


def is_choice(names: Lettering, answer: str) -> bool:
    """Whether an answer gives letters of options, alone or with the text of one."""
    return (
        _replace(answer, names, lambda letter: letter) is not None
        or _both(names, answer) is not None
    )


def follow(names: Lettering, answer: str, where: Sequence[int], rewritten: bool) -> str:
    """The right answer when the image of each slot s has moved to slot `where[s]`.

    Raises:
        NoAnswer: there is none that is certain.
    """
    options = meanings(names)
    if not rewritten and (words := [w for line in names.lines for w in names.vague(line.text)]):
        raise NoAnswer(f"its options name images in words that cannot be followed ('{words[0]}')")
    both = _both(names, answer)
    if both is None and (_replace(answer, names, lambda letter: letter) is None):
        return _in_words(names, answer, where, rewritten, options)
    if names.source == "slots":
        raise NoAnswer("its letters label images as well as options in words")
    if both is None:
        out = (
            answer
            if rewritten
            else _replace(answer, names, lambda k: _moved_letter(k, where, options))
        )
        assert out is not None
        return out
    letter, text = both
    if says(names, text) != options[letter.upper()]:
        raise NoAnswer("its letter and its text are not the same option")
    new = letter if rewritten else _moved_letter(letter.upper(), where, options)
    said = rename(text, where, names.in_text, True, names.numbers)
    if said is None:
        if images_in(options[letter.upper()]):
            raise NoAnswer("its text cannot be rewritten")
        said = text
    at = answer.index(letter)
    new = new.upper() if letter.isupper() else new.lower()
    start = answer.rindex(text)
    return answer[:at] + new + answer[at + 1 : start] + said + answer[start + len(text) :]


def back(names: Lettering, answer: str, order: Sequence[int], rewritten: bool) -> str | None:
    """An answer given in `order`, as the original option, or in words if none says the same there.

    Equal results mean that the same pictures were chosen; None if letter and text disagree or no
    image is named.
    """
    options = meanings(names)
    both = _both(names, answer)
    if both is not None:
        letter, text = both
        where = sorted(range(len(order)), key=lambda slot: order[slot])
        shown = options[letter.upper()]
        shown = moved(shown, where) if rewritten else shown
        if says(names, text) != shown:
            return None
        answer = letter

    def original(letter: str) -> str:
        if rewritten or not images_in(options[letter]):
            return letter
        said = moved(options[letter], order)
        same = letter if said == options[letter] else letter_of(said, options)
        return same or described(said)

    chosen = _replace(answer, names, original)
    if chosen is not None:
        return chosen
    return rename(answer, order, names.in_text, True, names.numbers)


def _moved_letter(letter: str, where: Sequence[int], options: Mapping[str, Meaning]) -> str:
    said = options[letter]
    if not images_in(said):
        raise NoAnswer(f"option {letter} speaks of no image")
    new = letter_of(moved(said, where), options)
    if new is None or letter_of(said, options) is None:
        raise NoAnswer(f"no option, or more than one, says what {letter} says when images move")
    return new


def _in_words(
    names: Lettering,
    answer: str,
    where: Sequence[int],
    rewritten: bool,
    options: Mapping[str, Meaning],
) -> str:
    """An answer without a letter, which may be an option's own words."""
    said = says(names, answer)
    if not rewritten and letter_of(said, options) and not letter_of(moved(said, where), options):
        raise NoAnswer("no option says the same when images move")
    new = rename(answer, where, names.in_text, True, names.numbers)
    if new is None:
        raise NoAnswer("it names no image, or one that moves to a slot without a name")
    return new


def _both(names: Lettering, answer: str) -> tuple[str, str] | None:
    match = LETTER_AND_TEXT.fullmatch(answer)
    if match and match[1].upper() in {line.letter for line in names.lines}:
        return match[1], match[2]
    return None


def _replace(answer: str, names: Lettering, new: Callable[[str], str]) -> str | None:
    """An answer that is a list of option letters, each replaced; None if it is anything else."""
    known = {line.letter for line in names.lines}
    if len(answer) > 400:
        return None
    parts = _SEPARATOR.split(answer)
    for i in range(0, len(parts), 2):
        match = _LETTER.fullmatch(parts[i])
        if match is None or match[2].upper() not in known:
            return None
        letter = new(match[2].upper())
        parts[i] = match[1] + (letter if match[2].isupper() else letter.lower()) + match[3]
    return "".join(parts)
