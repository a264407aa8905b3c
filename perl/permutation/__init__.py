"""Orders of a question's images, and the text and the answer that are right in each. No torch here.

`plan` reads a question once, into what follows its images: what letters and numbers name (`layout`: labels of slots, options,
codes; `references`: "image 2", "the second picture"), and what kind of list the answer is (`forms`). `permute` holds the
permutation rule: images move, and text and answer go on naming the same pictures (`answers`), or the example is refused.
`orders` says which orders a kind of example has and which are drawn; `ordering` is the kind whose options are sequences of
images; `alike` and `twins` are about pictures that stand in two slots.

To add a kind that moves images in blocks, add a branch to `orders.movable`; to follow another way of
naming an image, add a pattern to `references`.
"""

from perl.permutation.alike import alike
from perl.permutation.answers import named_images, slots_named
from perl.permutation.layout import only_options, option_lines
from perl.permutation.orders import (
    Order,
    all_orders,
    is_permuted,
    misplaced,
    movable,
    num_orders,
    orders,
    rate_at,
    released_orders,
    shares,
)
from perl.permutation.permute import (
    AnswerForm,
    Consistency,
    answer_form,
    check_answer,
    check_moves,
    letter_slots,
    original_answer,
    permute,
)
from perl.permutation.plan import from_json, names_in_answers, plan_of, text_of, to_json
from perl.permutation.references import CARDINALS, LETTERS, ORDINALS, Names, mentions

__all__ = [
    "CARDINALS",
    "LETTERS",
    "ORDINALS",
    "AnswerForm",
    "Consistency",
    "Names",
    "Order",
    "alike",
    "all_orders",
    "answer_form",
    "check_answer",
    "check_moves",
    "from_json",
    "is_permuted",
    "letter_slots",
    "mentions",
    "misplaced",
    "movable",
    "named_images",
    "names_in_answers",
    "num_orders",
    "only_options",
    "option_lines",
    "orders",
    "original_answer",
    "permute",
    "plan_of",
    "rate_at",
    "released_orders",
    "shares",
    "slots_named",
    "text_of",
    "to_json",
]
