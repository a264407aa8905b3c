r"""The one reader of answers, of completions and of the data: rewards, evaluation, the filter and suites all ask it.

Where an answer stands, `places`: `extract_answer` (the last `\\boxed{}`), `tagged` (the last `<answer>` block),
`final_answer` (these or all behind the thinking), `stated_answer` (or what it says after "the answer is"), `gold_text` (of
a value in the data). `perl.rewards.forms.reader_of(function)` is what a reward function reads with its options.

Which options it chooses, `letters`: `chosen_letters(completion, count, options)`, `letters_in(answer, count, options)`.

Which form it has and whether two are equal, `forms`, `notation` and `equality`: `equal(given, gold, form)`, where `form` is
what a list in the gold is (`perl.permutation.answer_form`; the column `answer_form`); `canonical(answer, form)`, a text that
equal answers share, to count or store them by; `items(answer)` of a list. Expressions too by their values, in math-verify:
`perl.rewards.math.equal_values(given, gold, form, digits)`.

docs/rewards.md has the table of what counts as equal. To add a unit or a notation, see `notation`.
"""

from perl.rewards.reading.equality import canonical, equal, items
from perl.rewards.reading.letters import chosen_letters, letters_in
from perl.rewards.reading.places import (
    GOLD_COLUMNS,
    Reader,
    extract_answer,
    final_answer,
    gold_text,
    marked,
    said,
    stated_answer,
    tagged,
    with_answer,
)

__all__ = [
    "GOLD_COLUMNS",
    "Reader",
    "canonical",
    "chosen_letters",
    "equal",
    "extract_answer",
    "final_answer",
    "gold_text",
    "items",
    "letters_in",
    "marked",
    "said",
    "stated_answer",
    "tagged",
    "with_answer",
]
