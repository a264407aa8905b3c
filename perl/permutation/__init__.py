"""Orders of a question's images, and the text and the answer that are right in each. No torch here.

`permute` holds the permutation rule: images move, and text and answer go on naming the same pictures,
or the example is refused. `orders` says which orders a kind of example has and which are drawn;
`ordering` is the kind whose options are sequences of images. What a text names is read in `layout`
(labels of slots, options), `references` ("image 2", "the second picture") and `answers`.

To add a kind that moves images in blocks, add a branch to `orders.movable`; to follow another way of
naming an image, add a pattern to `references`.
"""

from perl.permutation.alike import alike
from perl.permutation.answers import Lettering, lettering, named_images, text_of
from perl.permutation.forms import AnswerForm, answer_form
from perl.permutation.layout import option_lines
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
    Consistency,
    check_answer,
    check_moves,
    letter_slots,
    original_answer,
    permute,
)
from perl.permutation.references import CARDINALS, LETTERS, ORDINALS, Mention, Names, mentions

__all__ = [
    "CARDINALS",
    "LETTERS",
    "ORDINALS",
    "AnswerForm",
    "Consistency",
    "Lettering",
    "Mention",
    "Names",
    "Order",
    "alike",
    "all_orders",
    "answer_form",
    "check_answer",
    "check_moves",
    "is_permuted",
    "letter_slots",
    "lettering",
    "mentions",
    "misplaced",
    "movable",
    "named_images",
    "num_orders",
    "option_lines",
    "orders",
    "original_answer",
    "permute",
    "rate_at",
    "released_orders",
    "shares",
    "text_of",
]
