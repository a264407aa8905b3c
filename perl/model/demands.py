"""What a model asks of the texts and pictures that it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perl.model.control_tokens import ControlTokens
from perl.types import IMAGE_SLOT, Example, Message, UserError

if TYPE_CHECKING:
    from PIL import Image


class Demands:
    """No control tokens of the model in a text, and no picture of a shape that its image processor refuses.

    As it is here, what the Qwen-VL models ask, for data that are looked at before a model is named.
    """

    @property
    def control_tokens(self) -> ControlTokens:
        return _QWEN

    @property
    def longest_aspect(self) -> float:
        """How many times the shorter side the longer one may be."""
        return 200.0

    @property
    def demands(self) -> str:
        """What the checks depend on."""
        return f"{[*self.control_tokens]} {self.longest_aspect}"

    def check_texts(self, example: Example) -> None:
        """See that neither the question nor the demonstration writes a control token.

        Raises:
            UserError: one does.
        """
        where = f"example {example.id}"
        self.check_messages(example.messages, where)
        self._check_text(example.demonstration or "", f"{where}: its demonstration")

    def check_messages(self, messages: Sequence[Message], where: str) -> None:
        """The same of a chat."""
        for message in messages:
            self._check_text(message.role, f"{where}: a role")
            self._check_text(message.content, f"{where}: the text")

    def _check_text(self, text: str, where: str) -> None:
        if found := self.control_tokens.found_in(text):
            raise UserError(
                f"{where} holds {found}, a control token of the model; take it out ({IMAGE_SLOT} stands for an image), or "
                'set data.control_tokens = "escape" (--control-tokens escape)'
            )

    def check_shapes(self, example: Example) -> None:
        """See that the model takes pictures of these shapes.

        Raises:
            UserError: it does not.
        """
        for k, image in enumerate(example.images, start=1):
            self._check_shape(image, f"example {example.id}, image {k}")

    def _check_shape(self, image: Image.Image, where: str) -> None:
        if max(image.size) > self.longest_aspect * min(image.size):
            raise UserError(
                f"{where}: {image.width} x {image.height} pixels; of one side the model takes at most "
                f"{self.longest_aspect:g} times the other, so crop it"
            )


_QWEN = ControlTokens(
    f"<|{name}|>"
    for name in (
        *(
            "im_start",
            "im_end",
            "endoftext",
            "vision_start",
            "vision_end",
            "vision_pad",
            "image_pad",
            "video_pad",
        ),
        *("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end"),
    )
)
