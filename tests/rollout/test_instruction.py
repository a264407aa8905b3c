"""What is added to a question, where, and what is said where nothing asks for the form that rewards read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl.config import INSTRUCTIONS, ColdStartConfig, Config, DataConfig, RewardConfig
from perl.permutation import permute
from perl.rewards.scorer import rollout_columns
from perl.rollout.instruction import Instruction, spread, tell_prompts
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import Example, Message, Rollout
from tests.messages import tells
from tests.stand_ins import Words, example

OWN = "tests.training.two_tokens:share_of_b"
THINK_BOX, THINK_TAGS = INSTRUCTIONS["think-box"], INSTRUCTIONS["think-tags"]
ASKED = (Message("user", "<image> Which?"),)


def config(*functions: str, weights: tuple[float, ...] = (), **data: Any) -> Config:
    reward = RewardConfig(functions=functions, weights=weights or (1.0,) * len(functions))
    return Config(reward=reward, data=DataConfig(**data))


@pytest.mark.parametrize(
    ("functions", "text", "names"),
    [
        (("accuracy", "format"), THINK_BOX, ["accuracy", "format"]),
        (("accuracy",), THINK_BOX, ["accuracy"]),
        (("math", OWN), THINK_BOX, ["math"]),
        (("accuracy(tags=True)", "format_tags"), THINK_TAGS, ["accuracy", "format_tags"]),
        (("ordering", "format_tags"), THINK_TAGS, ["ordering", "format_tags"]),
        # None serves both: the one that serves more, and of equals the paper's.
        (("accuracy", "format", "format_tags"), THINK_BOX, ["accuracy", "format"]),
        (("format_tags", "accuracy"), THINK_BOX, ["accuracy"]),
        (("choice", "judge", "length_penalty(longest=9, buffer=3)"), "", ["auto"]),
        ((OWN,), "", ["auto"]),
        (("frame_index(count=1)",), "", ["frame_index"]),
    ],
)
def test_auto_goes_by_what_the_rewards_read(
    functions: tuple[str, ...], text: str, names: list[str]
) -> None:
    found = Instruction.of(config(*functions))
    assert found.text == text
    tells(found.why, *names)


def test_rewards_without_weight_do_not_decide() -> None:
    assert Instruction.of(config("format_tags", "accuracy", weights=(0.5, 0.0))).text == THINK_TAGS


@pytest.mark.parametrize("name", [*INSTRUCTIONS, "Answer with one word.", ""])
def test_a_name_or_ones_own_words(name: str) -> None:
    """Added to every question, whether it asks already or not."""
    found = Instruction.of(config("accuracy", instruction=name))
    assert found.text == INSTRUCTIONS.get(name, name) and found.name == name
    asking = (Message("user", r"<image> \boxed{} <think> <answer>"),)
    (message,) = found.add(asking)
    assert message.content == asking[0].content + (f"\n{found.text}" if name else "")


@pytest.mark.parametrize(
    ("content", "added"),
    [
        ("Which?", True),
        (r"Which? Put it in \boxed{}.", True),  # `format` reads <think> too.
        ("Think within <think> </think> and answer in \\boxed{}.", False),
    ],
)
def test_a_question_that_asks_for_the_whole_form_is_left_as_it_is(
    content: str, added: bool
) -> None:
    auto = Instruction.of(config("accuracy", "format"))
    for chat in (
        (Message("user", content),),
        (Message("system", content), Message("user", "Which?")),
    ):
        assert (auto.add(chat) != chat) == added
    only = Instruction.of(config("accuracy"))
    assert only.add((Message("user", r"In \boxed{}."),)) == (Message("user", r"In \boxed{}."),)


CHAT = (
    Message("system", "Be kind."),
    Message("user", "<image> One?"),
    Message("assistant", "Yes."),
    Message("user", "Two?"),
)


@pytest.mark.parametrize(
    ("place", "system", "chat", "expected"),
    [
        ("user", "", CHAT, {3: "Two?\nADD IT"}),
        ("system", "", CHAT, {0: "Be kind.\nADD IT"}),
        ("user", "SYS", CHAT, {3: "Two?\nADD IT"}),  # A chat's own system message stays.
        ("user", "SYS", ASKED, ["SYS", "<image> Which?\nADD IT"]),
        ("system", "SYS", ASKED, ["SYS\nADD IT", "<image> Which?"]),
        ("system", "", ASKED, ["ADD IT", "<image> Which?"]),
    ],
)
def test_where_it_stands(place: Any, system: str, chat: Any, expected: Any) -> None:
    found = Instruction("ADD IT", place, system).add(chat)
    contents = [m.content for m in found]
    if isinstance(expected, dict):
        assert contents == [expected.get(i, m.content) for i, m in enumerate(chat)]
        assert [m.role for m in found] == [m.role for m in chat]
    else:
        assert contents == expected
        assert [m.role for m in found] == ["system", "user"][-len(expected) :]


def test_it_comes_after_the_permutation_and_rewards_see_it() -> None:
    """A text that names images is not rewritten, and the rule that moves them does not read it."""
    text = "Refer to the images as image 1 and image 2."
    one = example("q", 10, 20, question="<image> <image> Is image 1 darker?", should_change=False)
    one = replace(one, answer="yes")
    encoder = PromptEncoder(Words(), PromptLimit(99, ""), "error", Instruction(text))  # type: ignore[arg-type]
    variants = [permute(one, order, "references") for order in ((0, 1), (1, 0))]
    for _ in range(2):  # What has been asked is not asked twice.
        shown = encoder.encode(variants)
        variants = [v for v, _ in shown]
        questions = [v.messages[-1].content for v, _ in shown]
        assert questions == [f"<image> <image> Is image {k} darker?\n{text}" for k in (1, 2)]
        assert [len(p.input_ids) for _, p in shown] == [15, 15]
        assert [v.rewritten is None for v, _ in shown] == [True, False]
    rollouts = [Rollout(v, p, p.input_ids, p.input_ids, "", True) for v, p in shown]
    assert rollout_columns(rollouts)[0] == questions


class Model(Words):
    """A tokenizer that does not know some words, with a template that writes something before each chat."""

    def __init__(self, before: str = "", unknown: Sequence[str] = ()) -> None:
        super().__init__()
        self.before, self.unknown = before, unknown

    def render(self, messages: Sequence[Message], where: str = "") -> str:
        return self.before + super().render(messages, where)

    def unknown_words(self, messages: Sequence[Message]) -> list[str]:
        return [w for m in messages for w in m.content.split() if w in self.unknown]


def test_what_a_model_cannot_read_or_is_asked_already_is_not_added() -> None:
    auto = Instruction.of(config("accuracy", "format"))
    for model, text, wordless in (
        (Model(), THINK_BOX, False),
        (Model(unknown=["monologue"]), "", True),
        (Model(r"Think in <think> tags and box it in \boxed{}. "), "", False),
        (Model(r"Box it in \boxed{}. "), THINK_BOX, False),
    ):
        found = auto.fitted(model)  # type: ignore[arg-type]
        assert (found.text, found.wordless) == (text, wordless)
    own = Instruction.of(config("accuracy", instruction="box"))
    assert own.fitted(Model(unknown=["final"])) == own  # type: ignore[arg-type]


class Rows(list[Example]):
    @property
    def size(self) -> int:
        return len(self)

    def check(self, i: int) -> Example:
        return self[i]


def told(
    caplog: pytest.LogCaptureFixture, asked: Config, model: Model, *examples: Example
) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.INFO, "perl")
    instruction = Instruction.of(asked).fitted(model)  # type: ignore[arg-type]
    tell_prompts(asked, instruction, model, [("rows.jsonl", Rows(examples))])  # type: ignore[arg-type]
    info, *warnings = caplog.records
    assert info.levelname == "INFO" and all(w.levelname == "WARNING" for w in warnings)
    tells(info.getMessage(), "perl-rl preview")
    return [w.getMessage() for w in warnings]


def test_a_form_that_nothing_asks_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    plain = example("q", 1)
    off = config("accuracy", "format", "choice", instruction="")
    (said,) = told(caplog, off, Model(), plain)
    tells(said, "rows.jsonl", "accuracy", "\\boxed", "data.instruction", "think-box", "data.system")
    tells(said, "format", "<think> and \\boxed")
    # One row that asks is enough, and so are the template, the system message, the instruction.
    boxed = example("q", 1, question=r"<image> Which? In \boxed{}.")
    (only,) = told(caplog, off, Model(), plain, boxed)
    tells(only, "format")
    assert "accuracy" not in only
    assert not told(caplog, off, Model(r"<think> \boxed{}"), plain)
    system = replace(off, data=replace(off.data, system=r"<think> \boxed{}"))
    assert not told(caplog, system, Model(), plain)
    assert not told(caplog, config("accuracy", "format", "choice"), Model(), plain)
    both = config("math", instruction="")
    tells(*told(caplog, both, Model(), plain), "\\boxed or <answer>")


def test_a_cold_start_on_demonstrations_teaches_a_form(caplog: pytest.LogCaptureFixture) -> None:
    shown = example("q", 1, demonstration=r"<think> dark </think> \boxed{ A }")
    off = config("accuracy", instruction="")
    warm = replace(off, cold_start=ColdStartConfig(steps=5))
    assert len(told(caplog, off, Model(), shown)) == 1
    assert not told(caplog, warm, Model(), shown)
    assert len(told(caplog, warm, Model(), replace(shown, demonstration="A"))) == 1
    # A tiny model, which auto cannot ask, has learnt from such demonstrations.
    assert not told(caplog, config("accuracy"), Model(unknown=["monologue"]), shown)
    # Held-out rows without demonstrations tell nothing of those that were trained on.
    assert not told(caplog, warm, Model(), example("q", 1))


def test_a_model_of_a_run_that_was_taught_knows_the_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = example("q", 1, demonstration="A")
    off = config("accuracy", instruction="")
    for name, section in (
        ("warm", "[cold_start]\nsteps = 5"),
        ("after", f'[cold_start]\nsteps = 0\n[model]\npath = "{tmp_path}/warm/models/final"'),
        ("cold", "[cold_start]\nsteps = 0"),
    ):
        (tmp_path / name / "models/final").mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text(section)
        model = replace(off.model, path=f"{tmp_path}/{name}/models/final")
        said = told(caplog, replace(off, model=model), Model(), plain)
        assert len(said) == (name == "cold"), name


@pytest.mark.parametrize(
    ("functions", "said"),
    [(["accuracy"], r"accuracy reads \boxed"), (["accuracy", "choice", "format"], "accuracy and format read <think>")],
)  # fmt: skip
def test_why_an_instruction_is_added(functions: list[str], said: str) -> None:
    assert said in Instruction.of(config(*functions)).why


def test_words_that_the_model_does_not_know_are_told(caplog: pytest.LogCaptureFixture) -> None:
    words = [f"w{k}" for k in range(12)]
    asked = config(OWN, instruction="w0 now")
    row = example("q", 1, question="<image> " + " ".join(words[1:]))
    (said,) = told(caplog, asked, Model(unknown=words), row)
    tells(said, "rows.jsonl", "model.path", "12", "w1", "w10", "...")
    assert "w11" not in said
    assert not told(caplog, asked, Model(), row)


def test_rows_from_all_over() -> None:
    assert spread(9, 3) == [0, 4, 8] and spread(2, 3) == [0, 1] and spread(None, 2) == [0, 1]
    assert spread(5, 1) == [0]
