"""One frozen dataclass per stage of the data's way through PeRL; nothing here computes anything.

Example --permute--> Variant --generate--> Rollout --reward--> Group --filter--> Group --> Segment --pack--> PackedBatch
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

IMAGE_SLOT = "<image>"
"""Marks the place of an image in a question or a chat message; the k-th slot shows the k-th image."""


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what to do. Exit code 2."""

    kind = ""
    """Of a mistake in a row of data: what it is counted as."""


class Interrupted(Exception):
    """The run was asked to stop and has saved itself."""


class RunFailed(Exception):
    """An error that is nobody's mistake ended a run: one line that says which, where, what is kept and how to go on. Exit
    code 1."""


def one_line(value: object, limit: int = 200) -> str:
    """A value as one line of a message, cut at `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


Meaning = tuple["str | tuple[int, ...]", ...]
"""What an option says: its words in lower case, and for each list of images their sorted 0-based slots."""


@dataclass(frozen=True, slots=True)
class Mention:
    """One image named in a text: `text[start:end]` names the 0-based slot `slot` in a `style`.

    Styles: `number` ("2" of "Image 2"), `word` ("two"), `tag` ("<image_2>"), `letter` ("B" of
    "image B"), `ordinal` ("second"), `suffixed` ("2nd"), `last`; `several` for words of which no part stands for one
    image alone ("first two images", "images 1-3"), one mention for each, all of one span, and `other` for those
    that may name an image by what it shows ("chart 1"): these are not rewritten.
    """

    start: int
    end: int
    slot: int
    style: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How the text and the answer of a question follow its images: what was read in it, once. Slots are 0-based.

    Letter k names the slot `letters[k]`, number `start` + k the slot `numbers[k]`.
    Example: `"A <image> B <image> Is image A the darker one?"` has `letters=(0, 1)`, `lettered=True` and one mention, of slot 0.
    """

    key: str
    """A hash of what was read, and by which version of the reader: a plan counts only for the text, answer and label that it
    was made of."""
    letters: tuple[int, ...]
    numbers: tuple[int, ...]
    start: int = 1
    nouns: tuple[str, ...] = ()
    """What slots are labelled with: in a text with `Chart 1: <image>`, "chart 1" is as good as "image 1"."""
    lettered: bool = False
    """Letters label slots, so that "image B" in the text names one; else they count images, or stand for options."""
    mentions: tuple[Mention, ...] = ()
    """Names of images in the messages, joined by newlines; labels of slots are none."""
    options: dict[str, Meaning] = field(default_factory=dict)
    """Options in words, and codes that a sentence explains, by letter or number: what each says."""
    sequences: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Options that list images, as "2, 1, 3", by letter: the slots."""
    lines: tuple[tuple[int, int], ...] = ()
    """Where the options stand in the messages."""
    bare: bool = False
    """Options that are nothing but a number or an ordinal name images."""
    form: str | None = None
    """What a list in the answer is: a `set`, a `sequence`, or one of the `values` of each image in turn; None: nothing says."""
    faults: dict[str, str] = field(default_factory=dict)
    """Why images cannot move: `answer` where the answer is to follow them, `text` where the text is rewritten, `options`
    where it is not, and `any`."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn. `content` may hold `<image>` slots.

    Example: `Message("user", "A <image> B <image> Which image shows three?")`
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One question over images, as it stands in the data.

    Example: images `(cat, dog)`, question `"A <image> B <image> Which image shows a dog?"`, answer `"B"`,
    kind `"all"` (both images may move), `should_change=True` (the answer follows its image).
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str | tuple[Message, ...]
    """A text with one `<image>` slot per image, or a chat whose messages hold them."""
    answer: str
    """Empty: the data have none, and no reward may read it."""
    kind: str = "all"
    """Which images may change places: `"all"`, `"first_fixed"`, `"last:K"`, `"none"`, blocks of 1-based
    slots whose images may be exchanged among themselves, as in `"blocks:2,4/1,3"`, or `"ordering"`:
    the options are sequences of images, and the images are arranged so that another one is right."""
    should_change: bool = True
    """True: the answer names an image and is re-indexed when images move. False: it stays."""
    demonstration: str | None = None
    """A demonstration (the whole completion) for the cold start, in the original order."""
    task: str = ""
    """A name to report accuracies by."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Every other column of the data; handed to reward functions as keyword arguments."""
    plan: Plan | None = None
    """What was read in question and answer when they were loaded or labelled; None: `permute` reads them."""
    origin: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Where the data had these fields: name here -> column there and its value, as in
    `{"answer": ("solution", "<answer>B</answer>")}`; reward functions get them under the data's names too."""

    @property
    def messages(self) -> tuple[Message, ...]:
        if isinstance(self.question, str):
            return (Message("user", self.question),)
        return self.question


@dataclass(frozen=True, slots=True)
class Variant:
    """An Example with its images in one order, and the text and the answer that are right in that order.

    `order[j]` is the original index of the image shown in slot j, so `images[j] = example.images[order[j]]`.
    Example: order `(1, 0)` of the example above shows dog, cat; the answer becomes `"A"`.
    """

    example: Example
    order: tuple[int, ...]
    images: tuple[Image.Image, ...]
    answer: str
    rewritten: tuple[Message, ...] | None = None
    """The messages with their mentions of images following the images; None: the text is the example's."""
    asked: tuple[Message, ...] | None = None
    """The messages with the instruction and the system message of the run; None: it adds nothing."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat as the model sees it."""
        return self.asked or self.rewritten or self.example.messages


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as the vision tower takes it.

    `pixel_values` in the tower's dtype: Qwen-VL's patches [t * h * w, channels * temporal_patch * patch^2], or tiles of a fixed
    size; `grid` (t, h, w) in patches, or the number of tiles. It becomes `tokens` visual tokens, each of `merge` x `merge`
    patches (1 for tiles). `key` is a hash of the content: equal images have equal keys. `size` (width, height) is what the
    picture was resized to, in pixels; None where that is not known.

    Example: 56 x 112 pixels in patches of 14 that are merged 2 x 2: grid `(1, 4, 8)`, `merge=2`, `tokens=8`.
    """

    key: str
    pixel_values: torch.Tensor
    grid: tuple[int, ...]
    tokens: int
    merge: int = 1
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A chat written out by the model's template, and its pictures: what a model's own processor takes.

    Example: `"<|im_start|>user\\nA <|image_pad|> which ...<|im_end|>"` with one picture.
    """

    text: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A Variant's chat as tokens.

    `input_ids` int64 [P], with each slot expanded to its image's number of image tokens;
    `position_ids` int64 [A, P] the temporal, height and width axes of M-RoPE, or one axis for families without it;
    `next_position` the position of the first completion token on all axes.

    Example: two images of 8 tokens each in a chat of 20 others give P = 36. With M-RoPE an image of 2 x 4 merged patches takes up
    4 positions, as many as its longer side has, so that `next_position` is 20 + 2 * 4 = 28.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    next_position: int
    images: tuple[EncodedImage, ...]
    image_token_id: int
    raw: RawPrompt | None = None
    """For models that are trained on padded batches, whose own processor makes the tower's input anew each time."""
    pictures: tuple[Image.Image, ...] = ()
    """What `images` were made of, for an engine that makes them itself."""


class WeightSpan(NamedTuple):
    """`token_ids[start:end]` were sampled by the weights after `version` steps of the run."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion of one Variant.

    `token_ids` int64 [L] includes the end token when the model wrote one (`finished`), `logprobs` float32 [L]
    are those of the sampling distribution, `text` has the special tokens removed.

    Example: the text `"B"` is `token_ids` of length 2, the letter and the end; cut after the letter it is 1 and not `finished`.
    """

    variant: Variant
    prompt: EncodedPrompt
    token_ids: np.ndarray
    logprobs: np.ndarray
    text: str
    finished: bool
    weight_versions: tuple[WeightSpan, ...] = ()
    """Which weights sampled which tokens, in their sequence; empty: those of its step sampled all."""


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one Example over all its orders: the set one advantage baseline is taken over.

    `rewards` float64 [R] the weighted sum per rollout, NaN where a rollout cannot be scored;
    `reward_parts` name -> float64 [R]; `advantages` float32 [R].
    Example: 4 orders x 4 rollouts = 16 rewards, one mean and one standard deviation.
    """

    example: Example
    variants: tuple[Variant, ...]
    rollouts: tuple[Rollout, ...]
    """Those of one variant stand together, the variants in their sequence."""
    rewards: np.ndarray
    reward_parts: dict[str, np.ndarray]
    advantages: np.ndarray
    key: tuple[int, ...] = ()
    """Finds the example in its stream again."""
    step: int = 0
    """The step of the stage that sampled it."""
    off_policy: bool = False
    """Sampled by an earlier policy: its rollouts' `logprobs` are the old log-probs of its loss."""
    logged: dict[str, list[Any]] = field(default_factory=dict)
    """What reward functions say of each rollout beside their scores, by name; for the record of rollouts."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What the packer takes: one prompt with the completions that continue it, and their advantages.

    `completions` R arrays int64 [L_r], each may be empty; `advantages` R scalars (1 for supervised fine-tuning).
    `group` says which segments belong to one Example: they show the same images and are kept together.

    Example: the Group above becomes four Segments of `group` 0, one an order, with four completions each.
    """

    prompt: EncodedPrompt
    completions: tuple[np.ndarray, ...]
    advantages: tuple[float, ...]
    group: int = 0
    sampled_logprobs: tuple[np.ndarray, ...] | None = None
    """R arrays float32 [L_r], log-probs as the engine gave them; None where nothing was sampled."""
    off_policy: bool = False
    """Sampled by an earlier policy, so that these are the old log-probs of the loss."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: S segments [prompt | completion 1 | ... | completion R] end to end in one row of T tokens.

    To attention the row is Q sequences, as flash-attn's varlen functions take them. The first completion continues its
    prompt in one sequence; each further completion is a sequence of its own whose prefix, keys that it shares with
    others, is the prompt. A token sees its sequence up to itself, and all of the sequence's prefix.

    Example: a prompt of 5 tokens with completions of 3 and 2, then a prompt of 4 with one of 1, give T = 15,
    `cu_seqlens_q = [0, 8, 10, 15]`, `prefix_starts = [0, 0, 0]`, `prefix_lengths = [0, 5, 0]`,
    `scored = [4, 5, 6, 4, 8, 13]`, `completion_cu_seqlens = [0, 3, 5, 6]`.
    """

    input_ids: torch.Tensor
    """int64 [T]"""
    position_ids: torch.Tensor
    """int64 [A, T]: M-RoPE's three axes, or one axis; every completion goes on from the end of its prompt."""
    cu_seqlens_q: torch.Tensor
    """int32 [Q+1]: where the queries of each sequence start, ending at T."""
    prefix_starts: torch.Tensor
    """int32 [Q]: where in the row each sequence's prefix starts."""
    prefix_lengths: torch.Tensor
    """int32 [Q]: tokens of each sequence's prefix; 0: none. The sequence has this many more keys than queries."""
    scored: torch.Tensor
    """int64 [N]: rows of the hidden states whose *next* token is a completion token; a prompt's last row stands
    there once for each of its completions."""
    targets: torch.Tensor
    """int64 [N]: those next tokens."""
    completion_cu_seqlens: torch.Tensor
    """int32 [B+1]: where the B completions start among the N scored tokens."""
    advantages: torch.Tensor
    """float32 [B]"""
    images: tuple[EncodedImage, ...]
    """The M distinct images, each once."""
    visual_positions: torch.Tensor
    """int64 [K]: rows of the T that hold a visual token."""
    visual_source: torch.Tensor
    """int64 [K]: which row of the concatenated features of `images` each of them shows."""
    source: tuple[tuple[int, int], ...]
    """For each of the B completions (index of its segment, index of the completion in it) in the packed list."""
    sampled_logprobs: torch.Tensor | None
    """float32 [N]: log-probs of the targets as the engine gave them when it sampled. None: nothing was sampled."""
    off_policy: torch.Tensor | None
    """bool [N]: whether an earlier policy sampled the target. None: the present one sampled all."""

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_scored(self) -> int:
        return int(self.scored.shape[0])
