"""What a question is followed by, so that the model writes its answer in the form that the rewards read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from perl.config import INSTRUCTIONS, Config, RewardConfig
from perl.data.dataset import Dataset
from perl.files import RunFolder, is_main_process
from perl.model.processor import Processor
from perl.model.sources import run_of
from perl.recipe import plan, read_config
from perl.rewards.forms import Form, fits, forms_of, opened
from perl.types import Example, Message, UserError

logger = logging.getLogger(__name__)

_LOOKED_AT = 32
"""How many rows of a data set are looked at."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """The text that is added to every question, and the system message of those that have none."""

    text: str = ""
    """Empty: nothing is added."""
    place: Literal["user", "system"] = "user"
    system: str = ""
    unless: tuple[Form, ...] = ()
    """Forms; a chat that asks for one of them already gets no text."""
    why: str = ""
    wordless: bool = False
    """Whether the model's tokenizer does not know the words that "auto" would add."""

    @classmethod
    def of(cls, config: Config) -> Instruction:
        """As `data.instruction`, `data.instruction_in` and `data.system` say; "auto" goes by the rewards that count."""
        data = config.data
        own = cls(place=data.instruction_in, system=data.system)
        if data.instruction != "auto":
            why = f"data.instruction = {data.instruction!r}"
            return replace(own, text=INSTRUCTIONS.get(data.instruction, data.instruction), why=why)
        forms = _needed(config.reward)
        if not forms:
            return replace(own, why="auto: no reward function needs a form")
        # Where no instruction serves all of them, the one that serves the most.
        served = {
            name: [f for f, wanted in forms.items() if fits(wanted, INSTRUCTIONS[name])]
            for name in ("think-box", "think-tags")
        }
        name = max(served, key=lambda name: len(served[name]))
        text, functions = INSTRUCTIONS[name], served[name]
        if not functions:
            return replace(
                own,
                why=f"auto: there is none that asks for what {_listed(forms)} read{'s' * (len(forms) == 1)}",
            )
        asked_for = [next(form for form in forms[f] if fits([form], text)) for f in functions]
        needed = Form().union(*asked_for)
        reads = "reads" if len(functions) == 1 else "read"
        why = f"auto, {name}: {_listed(functions)} {reads} {_listed(sorted(needed))}"
        return replace(own, text=text, unless=(needed,), why=why)

    def fitted(self, processor: Processor) -> Instruction:
        """What a model is asked: "auto" adds nothing where its tokenizer does not know the words, as those of the tiny
        models, or its chat template asks for the form."""
        if self.unless and processor.unknown_words([Message("user", self.text)]):
            why = f"{self.why}, but nothing is added, as the model's tokenizer does not know the words"
            return replace(self, text="", unless=(), why=why, wordless=True)
        if self.unless and fits(self.unless, processor.render([Message("user", "?")])):
            why = f"{self.why}, which the chat template asks for"
            return replace(self, text="", unless=(), why=why)
        return self

    @property
    def name(self) -> str:
        """Of the text: that of `INSTRUCTIONS`, else the text itself."""
        return next((name for name, text in INSTRUCTIONS.items() if text == self.text), self.text)

    def add(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """A chat with the instruction at the end of its last user turn, or of its system message.

        A chat's own system message stays, and `system` is then not used.
        """
        asks = fits(self.unless, "\n".join(m.content for m in messages))
        if self.system and all(m.role != "system" for m in messages):
            messages = (Message("system", self.system), *messages)
        if not self.text or asks:
            return messages
        places = [i for i, m in enumerate(messages) if m.role == self.place]
        if not places:
            return (Message(self.place, self.text), *messages)
        # The last user turn is asked; of system messages the first is the template's.
        i = places[-1 if self.place == "user" else 0]
        content = f"{messages[i].content}\n{self.text}"
        return (*messages[:i], Message(self.place, content), *messages[i + 1 :])


def tell_prompts(
    config: Config,
    instruction: Instruction,
    processor: Processor,
    sources: Sequence[tuple[str, Dataset]],
) -> None:
    """Say what is added to questions, and what `warn_of_prompts` finds."""
    if is_main_process():
        logger.info("instruction: %s (perl-rl preview shows the prompts)", instruction.why)
        warn_of_prompts(config, instruction, processor, sources)


def warn_of_prompts(
    config: Config,
    instruction: Instruction,
    processor: Processor,
    sources: Sequence[tuple[str, Dataset]],
) -> None:
    """Warn where rewards read a form that nothing asks for, or the model does not know words of its prompts.

    Args:
        config: with the rewards that read the answers. Where it has a cold start, demonstrations that show a form are
            enough; a model of a run that had one knows the form, and no more is asked.
        instruction: fitted to the model.
        sources: data sets by their names; some rows of each are looked at.
    """
    taught, before = is_taught(config), _was_taught(config.model.path)
    for name, dataset in sources:
        examples = _looked_at(dataset)
        chats = [instruction.add(e.messages) for e in examples]
        # As the template writes them: it may ask by itself.
        texts = [processor.render(chat, name) for chat in chats]
        shown = [e.demonstration for e in examples if e.demonstration]
        lost = [
            function
            for function, wanted in _needed(config.reward).items()
            if all(any(opened(text, [form]) for text in texts) for form in wanted)
        ]
        if lost:
            logger.warning(
                "%s: the chat template ends with %s, so that no completion begins with it, and what reads it stays 0: %s; "
                "name another template in model.chat_template, or other rewards",
                name,
                texts[0].split()[-1],
                _listed(lost),
            )
        if taught or instruction.wordless:
            texts += shown
        missed = [
            f"{function} reads {' or '.join(_listed(sorted(form)) for form in wanted)}"
            for function, wanted in _needed(config.reward).items()
            if not any(fits(wanted, text) for text in texts)
        ]
        # Held-out rows mostly have no demonstrations; those of the training data were looked at.
        if missed and not before and (shown or not taught):
            logger.warning(
                "%s: rewards read a form that nothing asks the model for, so that they stay 0: %s; ask in "
                "data.instruction (auto, %s, or your own words), data.system or the questions, or teach it by a cold "
                "start",
                name,
                "; ".join(missed),
                ", ".join(INSTRUCTIONS),
            )
        unknown = list(dict.fromkeys(w for chat in chats for w in processor.unknown_words(chat)))
        if unknown:
            logger.warning(
                "%s: model.path = %s reads whole words and does not know %d of the prompts': %s",
                name,
                config.model.path,
                len(unknown),
                ", ".join(unknown[:10] + ["..."] * (len(unknown) > 10)),
            )


def is_taught(config: Config) -> bool:
    """Whether a run trains on demonstrations, which may show a form that no prompt asks for."""
    return any(stage.kind == "cold_start" and stage.steps for stage in plan(config))


def _was_taught(model: str) -> bool:
    """The same of the run that left a model, or of one that it started from."""
    root = run_of(model)
    if root is None:
        return False
    with suppress(UserError):
        config = read_config(RunFolder(root).config)
        return is_taught(config) or _was_taught(config.model.path)
    return False


def spread(size: int | None, count: int) -> list[int]:
    """`count` numbers from all over `range(size)`; the first ones of what is endless.

    Example: `spread(9, 3) == [0, 4, 8]`.
    """
    if size is None or size <= count:
        return list(range(count if size is None else size))
    return [round(k * (size - 1) / max(count - 1, 1)) for k in range(count)]


def _looked_at(dataset: Dataset) -> list[Example]:
    """Some examples, of whose images only the headers are read; broken ones are left out."""
    found = []
    for i in spread(dataset.size, _LOOKED_AT):
        with suppress(UserError):
            found.append(dataset.check(i))
    return found


def _needed(reward: RewardConfig) -> dict[str, tuple[Form, ...]]:
    """By its name the forms of each reward function that needs one."""
    return {name: f for name, f in forms_of(reward.functions, reward.weights).items() if f}


def _listed(names: Collection[str]) -> str:
    *most, last = names or ("",)
    return f"{', '.join(most)} and {last}" if most else last
