"""What a label is, and whether it holds: an example with it must go through every order without an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from perl.permutation import Consistency, all_orders, check_moves, movable, num_orders, permute
from perl.types import IMAGE_SLOT, Example, Message, UserError

_ORDERS_TRIED = 6
_NAMED_SLOT = re.compile(
    r"\b(?:image|picture|photo|figure|panel|frame|img)\s*[#_-]?\s*\w{1,3}[).:\]\s-]*"
    + re.escape(IMAGE_SLOT),
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Label:
    """Which images of an example may change places, whether its answer then follows, and why.

    `kind` and `should_change` as in `Example`. A reason that begins with "unsure" means that nothing
    could be told, and the images stay.
    """

    kind: str
    should_change: bool
    reason: str

    @property
    def sure(self) -> bool:
        return not self.reason.startswith("unsure")


def stays(reason: str) -> Label:
    """The label of an example whose images keep their places."""
    return Label("none", False, reason)


def unsure(reason: str) -> Label:
    """The label of an example of which nothing can be told."""
    return stays(f"unsure: {reason}")


def kind_of(slots: Sequence[int], count: int) -> str:
    """The name of the kind under which just these 0-based slots may change places.

    Example: `kind_of((2, 3), 4) == "last:2"`; fewer than two slots give `"none"`.
    """
    slots = sorted(slots)
    if len(slots) < 2:
        return "none"
    if slots != list(range(slots[0], count)):
        return f"blocks:{','.join(str(slot + 1) for slot in slots)}"
    return {0: "all", 1: "first_fixed"}.get(slots[0], f"last:{len(slots)}")


def checked(example: Example, label: Label, text: Consistency = "slots") -> Label:
    """The label, or `unsure` with the reason where the example does not go through with it.

    The kind must be known and fit the images, an answer that is to follow must name an image, and
    there must be a name for it wherever that image may move. With `text="references"`
    the name that stands before a slot (`Image 2: <image>`) must stay with its slot.
    """
    labelled = replace(example, kind=label.kind, should_change=label.should_change)
    try:
        if label.kind != "ordering" and not movable(label.kind, len(example.images)):
            return replace(label, kind="none", should_change=False)
        check_moves(labelled, text)
        if num_orders(labelled) == 1:
            return stays(f"{label.reason}; there is one order only")
        for order in all_orders(labelled, _ORDERS_TRIED, seed=0):
            variant = permute(labelled, order, text)
            if _names_of_slots(variant.messages) != _names_of_slots(example.messages):
                return unsure("the names before the images would be rewritten")
    except UserError as error:
        return unsure(" ".join(str(error).removeprefix(f"example '{example.id}': ").split()))
    return label


def _names_of_slots(messages: Sequence[Message]) -> list[str]:
    return [name for m in messages for name in _NAMED_SLOT.findall(m.content)]
