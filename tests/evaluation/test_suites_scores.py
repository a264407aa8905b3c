"""How each benchmark's rule reads completions: right, wrong and odd ones. And which images it lets move."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perl.evaluation.suites import SUITES
from perl.evaluation.suites.base import Items, kind_by_rules, make_example, open_items
from perl.evaluation.suites.reading import (
    Reply,
    image_kind,
    judge_value,
    numbered_slots,
    option_letter,
)
from perl.permutation import all_orders, permute
from perl.types import IMAGE_SLOT, Example

THINK = "Think, and write <answer>{question}</answer>."
CASES = {
    "mantis_eval me_0": [
        ("B", "B", 1),
        ("(B) Image 2", "B", 1),
        ("A", "A", 0),
        ("Answer: B", "B", 1),
        ("Final Answer: b", "B", 1),
        ("<think>A?</think> \\boxed{\\text{B}}", "B", 1),
        ("<think>\\boxed{A}</think> \\boxed{B}.", "B", 1),
        ("Image 2", None, 1),  # no letter of an option first, so the text is compared
        ("The answer is B", None, 0),  # the published rule reads its first letter, T
        ("", None, 0),
    ],
    "mantis_eval me_1": [
        ("I count. Final Answer: two", "two", 1),
        ("two", "two", 1),
        ("two images", "two images", 0),
        ("\\boxed{Two}", "Two", 1),
        ("", None, 0),
    ],
    "blink val_Visual_Similarity_1": [
        ("(B)", "B", 1),
        ("B.", "B", 1),
        ("It differs.\n\nTherefore (B) the third image", "B", 1),
        ("(A) is not, so I choose:\n\n(B)", "B", 1),
        ("(A) or (B)", None, 0),
        ("The third image", "B", 1),
        ("\\boxed{A}", "A", 0),
        ("The correct answer is **B**", "B", 1),
        ("The answer is A. No, the answer is B", "B", 1),  # the last one counts
        ("Answer: B, not answer: (A)", "B", 1),
        ("The answer is B. Option A shows a cat.", "B", 1),
        ("Not (A), so it must be (B)", "B", 1),
        ("<think>(A)?</think><answer>B</answer>", "B", 1),
        ("<answer>A or B</answer>", None, 0),
        ("I cannot help", None, 0),
    ],
    "mmiu forensic_detection_blink/0": [
        ("B", "B", 1),
        ("b", "B", 1),
        ("B: the second image", "B", 1),
        ("Option A", "A", 0),
        ("Z", None, 0),
    ],
    "mathvista 0": [
        ("14", "14", 1),
        ("14.7 items", "14", 1),  # the published rule cuts an integer off
        ("There are 3 and 14", "14", 1),
        ("\\boxed{14}", "14", 1),
        ("none", None, 0),
        ("1e999", None, 0),
    ],
    "mathvista 1": [("1.24", "1.2", 1), ("about 1.25 kg", "1.2", 1), ("1.3", "1.3", 0)],
    "mathvista 2": [("Between [0] and [1, 2].", "[1, 2]", 1), ("1, 2", None, 0)],
    "mathvista 3": [
        ("(A) 145°", "145°", 1),
        ("A", "145°", 1),
        ("145°", "145°", 1),
        ("The angle is 145°.", "145°", 1),
        ("\\boxed{145}", "145°", 1),  # nearest by edit distance
        ("(B)", "3/11", 0),
        ("I do not know", None, 0),  # a whole text is not matched to the nearest
    ],
    "mathverse 1": [
        ("So L = 14.32, rounded: the answer is 14.", "14", 1),
        ("Therefore:\n\n14", "14", 1),
        ("\\boxed{14 \\text{ cm}}", "14 cm", 1),
        ("The answer: 13", "13", 0),
        ("", None, 0),
    ],
    "mathverse 2": [
        ("B", "B", 1),
        ("\\boxed{B}", "B", 1),
        ("2*\\sqrt{3}", "B", 1),
        ("A:8", "A", 0),
    ],
    "mathvision 4": [
        ("\\boxed{2\\pi}", "2\\pi", 1),  # to two digits
        ("\\boxed{6.3}", "6.3", 0),
        ("the answer is 6.28", "6.28", 1),
        ("\\boxed{}", None, 0),
    ],
    "mathvision 15": [
        ("\\boxed{B}", "B", 1),
        ("\\boxed{4}", "B", 1),
        ("\\boxed{\\frac{8}{2}}", "\\frac{8}{2}", 1),
        ("\\boxed{A}", "A", 0),
        ("\\boxed{B} no, \\boxed{C}", "C", 0),
    ],
    "remi EmojiAlgebra/0": [
        ('{"explanation": "x", "answer": 92}', "92", 1),
        ('Sure: {"explanation": "x", "answer": "92.5"}', "92.5", 1),
        ('{"explanation": "x", "answer": 94}', "94", 0),
        ("92", None, 0),
        ("\\boxed{92}", "92", 1),
        ("[" * 9999, None, 0),
    ],
    "remi RefCoco/1": [('{"answer": 3}', "3", 1), ('{"answer": 2}', "2", 0)],
    "remi Clocks/2": [('{"answer": 110}', "110", 1), ('{"answer": 111}', "111", 0)],
    "remi GeomShape/3": [('{"answer": 51.5}', "51.5", 1), ('{"answer": 52}', "52", 0)],
    "remi FuncRead/4": [('{"answer": "f(x)"}', "f(x)", 1), ('{"answer": "g"}', "g", 0)],
    "remi IQ/5": [('{"answer": "A"}', "A", 1), ('{"answer": "( a )"}', "( a )", 1)],
    "mv_math 1": [
        ("Step 1: fold.\nAnswer: {C}", "C", 1),
        ("\\boxed{C}", "C", 1),
        ("Answer: {A}", "A", 0),
        ("A and C", None, 0),
    ],
    "mv_math 3": [
        ("\\boxed{\\frac{15}{2} or \\frac{3}{2}}", "\\frac{15}{2} or \\frac{3}{2}", 1),
        ("Answer: $1.5$ or $7.5$", "$1.5$ or $7.5$", 1),
        ("Answer: 1.5", "1.5", 0),
    ],
    "mv_math 4": [
        ("(1) The answer is $(4,2)$.\n(2) Answer: a=1/2", "(1) $(4,2)$; (2) a=1/2", 1),
        ("\\boxed{(1) (4, 2); (2) 0.5}", "(1) (4, 2); (2) 0.5", 1),
        ("\\boxed{(1) (4, 2); (2) 0.6}", "(1) (4, 2); (2) 0.6", 0),
        ("\\boxed{(1) (4, 2)}", "(1) (4, 2)", 0),
        ("\\boxed{(1) A(2)=(4, 2); (2) 0.5}", "(1) A(2)=(4, 2); (2) 0.5", 0),
        ("(4,2), 1/2", None, 0),
    ],
}


@pytest.fixture(scope="module")
def items(root: Path) -> dict[str, dict[str, Items]]:
    """By instruction, by suite."""
    return {
        name: {s.name: open_items(s, root, think) for s in SUITES.values()}
        for name, think in (("official", ""), ("think", THINK))
    }


def examples(items: Items) -> list[Example]:
    return [items[i] for i in range(len(items))]


def find(items: Items, id: str) -> Example:
    return next(e for e in examples(items) if e.id == id)


@pytest.mark.parametrize("which", CASES)
def test_scores(which: str, items: dict[str, dict[str, Items]]) -> None:
    suite, id = which.split(" ", 1)
    example = find(items["official"][suite], id)
    for completion, answer, score in CASES[which]:
        judged = SUITES[suite].judge(example, example.answer, Reply.of(completion))
        assert (judged.answer, judged.score) == (answer, score), completion


@pytest.mark.parametrize("suite", SUITES)
def test_prompts_have_a_slot_for_every_picture(
    suite: str, items: dict[str, dict[str, Items]]
) -> None:
    for instruction, of_suite in items.items():
        for i, example in enumerate(examples(of_suite[suite])):
            text = "\n".join(message.content for message in example.messages)
            assert text.count(IMAGE_SLOT) == len(example.images) > 0
            assert text.endswith(THINK) == (instruction == "think")
            assert example.id == of_suite[suite].without_pixels(i).id


def test_official_prompts(items: dict[str, dict[str, Items]]) -> None:
    official = items["official"]
    mantis = find(official["mantis_eval"], "me_0").messages[0].content
    assert mantis.endswith(
        "\n (A) Image 1\n (B) Image 2\nAnswer with the option's letter from the given choices directly."
    )
    context, question = "You are a judge.", "Which is most likely"
    forensic = find(official["mmiu"], "forensic_detection_blink/0").messages[0].content
    differing = find(official["mmiu"], "spot_the_diff/1").messages[0].content
    assert forensic.index(context) < forensic.index(question)
    assert differing.index(question) < differing.index(context)
    assert differing.endswith("\nPlease answer the option directly like A,B,C,D...")
    art = find(official["blink"], "val_Art_Style_1").messages[0].content
    assert art.startswith("<image>Disclaimer: This is not")
    vision = find(official["mathvision"], "15").messages[0].content
    assert "<image1>\n(A) 3\n(B) $4$" in vision and 'in one "\\boxed{}"' in vision
    remi = find(official["remi"], "Clocks/2")
    assert remi.messages[0].content.startswith(
        "Question: Compute <image> by <image> of three Output only"
    )
    assert remi.images[0].getpixel((0, 0)) == (0, 128, 0)  # green, the second, is marked first
    system, user = find(official["mv_math"], "4").messages
    assert system.role == "system" and "Each problem is a multi-step problem" in system.content
    assert user.content.endswith("\nQuestion: <image>\n(1) Find A;\n(2) find a.")


def test_only_images_that_are_the_options_move(items: dict[str, dict[str, Items]]) -> None:
    kinds = {
        (name, e.id): e.kind
        for name, found in items["official"].items()
        for e in examples(found)
        if e.kind != "none"
    }
    assert kinds == {
        ("mantis_eval", "me_0"): "all",
        ("blink", "val_Visual_Similarity_1"): "last:2",
        ("mmiu", "forensic_detection_blink/0"): "all",
        ("mv_math", "1"): "all",  # not 2, whose letters stand behind their images
    }
    for instruction in items.values():
        for name, id in kinds:
            example = find(instruction[name], id)
            assert example.should_change
            variants = [permute(example, order) for order in all_orders(example, 24, 0)]
            first = 1 if name == "blink" else 0
            right = {v.order["ABCD".index(v.answer.strip("()")) + first] for v in variants}
            assert len(right) == 1 and len(variants) > 1


@pytest.mark.parametrize(
    ("question", "options", "count", "kind"),
    [
        ("Which is real?", ["the first image", "the second image"], 2, "all"),
        ("Which is like it?", ["(A) Image 2", "(B) Image 3"], 3, "last:2"),
        ("Which is like it?", ["(A) Image 3", "(B) Image 2"], 3, "none"),
        ("Which is like it?", ["the first image", "the second image"], 3, "none"),
        ("Which is like the first image?", ["the second image", "the third image"], 3, "last:2"),
        ("Is image 2 like the others?", ["the second image", "the third image"], 3, "none"),
        ("Which?", ["yes", "no"], 2, "none"),
        ("Which?", ["Image 1"], 1, "none"),
        ("Which?", [], 2, "none"),
        ("Which?", ["Image 1", "Image 2"], 1, "none"),
        ("Which?", ["Image 1", "Image 2"], 2, "all"),
        ("Which?", ["the eighth picture", "photo"], 2, "none"),
        (
            "Take the first image as reference: which one of the second or the third image is like it?",
            ["the second image", "the third image"],
            3,
            "last:2",
        ),
        (
            "Which one of the second image or the third image is missing from the first image?",
            ["the second image", "the third image"],
            3,
            "last:2",
        ),
        (
            "Is the second or the third image like the third image turned?",
            ["the second image", "the third image"],
            3,
            "none",
        ),
        (
            "Which one of the second or the third image is it?",
            ["the first image", "the second image", "the third image"],
            3,
            "none",
        ),
    ],
)
def test_image_kind(question: str, options: list[str], count: int, kind: str) -> None:
    assert image_kind(question, options, count) == kind


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Which image shows a cat?", "all"),
        ("<image> and <image> and <image> Which one shows three ?", "all"),
        ("Which image has more birds than the one to its left?", "none"),
        ("In which image does the ball first touch the ground?", "none"),
        ("Which image was taken after Image 1?", "none"),
        ("Quelle image montre un chat ?", "none"),
    ],
)
def test_questions_in_somebody_s_own_words(question: str, kind: str) -> None:
    options = "".join(f"\n ({letter}) Image {k}" for k, letter in enumerate("ABC", start=1))
    pictures = [Image.new("L", (1, 1), k) for k in range(3)]
    assert kind_by_rules(pictures, question + options, "B") == kind


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("B", "all"), ("(B)", "all"), ("A, B", "none"), ("E", "none"), ("yes", "none"), ("", "none")],
)
def test_images_move_only_with_an_answer_that_names_one(answer: str, kind: str) -> None:
    pictures = [Image.new("L", (1, 1))] * 3
    made = make_example("q", pictures, "<image> Which?", answer, "t", "all", own=7)
    assert (made.kind, made.should_change) == (kind, kind == "all")
    # Images without a slot stand before the text.
    assert (made.question, made.extra) == ("<image><image><image> Which?", {"own": 7})


@pytest.mark.parametrize(
    ("reply", "choices", "nearest"),
    [
        ("kat", ["k", "cat"], "cat"),  # one letter replaced against two left out
        ("kat", ["kats!", "caz"], "kats!"),  # two more against two replaced: the first
        ("kat", ["xkat", "cats"], "xkat"),  # one more against one replaced and one more
        ("flaw", ["lawn", "f"], "lawn"),  # one left out and one more against three left out
        ("x" * 100, ["y", "xx"], "xx"),
        ("x" * 101, ["y", "xx"], None),
    ],
)
def test_the_nearest_choice(reply: str, choices: list[str], nearest: str | None) -> None:
    extra = {"choices": choices, "answer_type": "text", "precision": None}
    found = judged("mathvista", rf"\boxed{{{reply}}}", choices[0], **extra)
    assert found == (nearest, float(nearest == choices[0]))


def judged(suite: str, reply: str, gold: str, task: str = "", **extra: Any) -> Any:
    asked = Example("q", (), "", gold, task=task, extra=extra)
    found = SUITES[suite].judge(asked, gold, Reply.of(reply))
    return found.answer, found.score


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("B. because it is", ["x", "y", "z"], "B"),
        ("[C] it is", ["x", "y", "z"], "C"),
        ("A) or B)", ["x", "y", "z"], None),
        ("A. and more", ["x", "y", "z"], None),
        ("I choose (B), as I said: (B)", ["x", "y", "z"], "B"),
        ("(A), not (B)", ["x", "y", "z"], "A"),
        ("The answers are (A) and (B).", ["x", "y", "z"], None),
        ("(A) first\n\nthen (B)", ["x", "y", "z"], "B"),
        ("(A) or (B)\n\nthen (B) or (C)", ["x", "y", "z"], None),
        ("Option: c", ["x", "y", "z"], "C"),
        ("Choice C", ["x", "y", "z"], "C"),
        ("answer = **B**", ["x", "y", "z"], "B"),
        ("Answer Bob", ["x", "y", "z"], None),
        ("Yes.", ["yes", "yes it is"], "A"),
        ("I say YES it is", ["yes", "yes it is"], None),
        ("I say no way", ["(A) no", "(B) yes"], "A"),
        ("I know", ["(A) no", "(B) yes"], None),
        ("yes", ["", "yes"], "B"),
    ],
)
def test_which_option_a_text_chooses(text: str, options: list[str], letter: str | None) -> None:
    assert option_letter(Reply(text, False), options) == letter


@pytest.mark.parametrize(
    ("reply", "kind", "precision", "answer"),
    [
        ("2.346", "float", 2.0, "2.35"),
        ("about 2.346", "float", None, "2.3"),
        ("2.346", "float", math.nan, "2.3"),
        ("-2.9", "integer", None, "-2"),
        ("from 7 to 1,234 or so", "integer", None, "1234"),
        ("it is .5", "float", None, "0.5"),
        ("nan", "float", None, None),
    ],
)
def test_numbers_of_mathvista(
    reply: str, kind: str, precision: float | None, answer: str | None
) -> None:
    extra = {"choices": [], "answer_type": kind, "precision": precision}
    assert judged("mathvista", reply, "1", **extra) == (answer, 0.0)
    assert judged("mathvista", reply, answer or "", **extra)[1] == float(answer is not None)


@pytest.mark.parametrize(
    ("task", "gold", "right", "wrong"),
    [
        ("Clocks", "100", ["90", "110", "100.0"], ["89", "111", "noon"]),
        ("GeomCost", "50", ["48.5", "51.5"], ["48", "52"]),
        ("GeomShape", "50", ["48.5", "51.5"], ["48", "52"]),
        ("EmojiAlgebra", "100", ["99", "101", "100 %", "100% sure"], ["98", "102", "51.5"]),
        ("EmojiAlgebra", "-100", ["-100", "-100.0"], ["-99.5", "-100.5"]),
        ("RefCoco", "1,3", ["1", "3"], ["1,3", "2", "0"]),
        ("Charts", "50\\%", ["50%", "50"], ["51"]),
        ("Maps", "a, b", ["a, b", "A,B", "(a, b)"], ["a b", "b,a"]),
        ("IQ", "(a)", ["a", "(A)", "( a )"], ["b", "(b)"]),
        ("FuncRead", "g", ["g", "g(x)", "(g)"], ["f(x)", "g(y)"]),
        ("FuncRead", "k", ["k"], ["k(x)"]),
    ],
)
def test_answers_of_remi(task: str, gold: str, right: list[str], wrong: list[str]) -> None:
    for score, answers in ((1.0, right), (0.0, wrong)):
        for answer in answers:
            reply = json.dumps({"explanation": "}{", "answer": answer})
            assert judged("remi", f"So: {reply} .", gold, task) == (answer, score), answer
    assert judged("remi", '{"explanation": 1}', gold, task) == (None, 0.0)


def test_options_that_the_data_do_not_list() -> None:
    """MathVerse has five then, MMIU any letter, MV-MATH always four."""
    for suite, last, beyond in (("mathverse", "E", "F"), ("mmiu", "Z", "1"), ("mv_math", "D", "E")):
        extra = {"options": [], "choice": True, "type": "choice"}
        assert judged(suite, f"({last})", last.lower() if suite != "mmiu" else last, **extra) == (
            last,
            1.0,
        )
        assert judged(suite, f"({beyond})", last, **extra) == (None, 0.0)


FORMS = [
    "{}",
    "({})",
    "{}.",
    "**{}**",
    "{{{}}}",
    "The answer is {}.",
    "Answer: {}",
    "({}) x",
    "{}: x y",
]


@given(st.integers(2, 8), st.data())
def test_a_letter_is_read_from_every_common_form(count: int, data: st.DataObject) -> None:
    letter = data.draw(st.sampled_from("ABCDEFGH"[:count]))
    form = data.draw(st.sampled_from(FORMS))
    assert option_letter(Reply(form.format(letter), False), (), count) == letter
    beyond = "ABCDEFGHI"[count]
    assert option_letter(Reply(form.format(beyond), False), (), count) is None


@settings(max_examples=40)
@given(st.text(max_size=80), st.text(max_size=40))
def test_any_text_is_judged_without_an_error(text: str, gold: str) -> None:
    reply = Reply.of(text)
    option_letter(reply, [gold, "b"])
    assert judge_value(reply, reply.value).score == bool(reply.value)
    assert judge_value(Reply("", True), gold).score == 0


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("0.5", r"\frac{1}{2}", 1),
        (r"2\sqrt{3}", r"$\sqrt{12}$", 1),
        ("So x = 3\n\nThe answer is 17 m.", "17", 1),
        ("<answer>2.5</answer>", r"2\frac{1}{2}", 1),
        ("<answer>10.5</answer>", r"2\frac{1}{2}", 0),
        (r"\boxed{[3, 4]}", "(3, 4)", 0),
        (r"\boxed{5 m}", "5 cm", 0),
        (r"\boxed{2, 1}", "1, 2", 0),
        (r"\boxed{50}", r"50\%", 0),
        ("3.14", r"\pi", 0),
        ("9^9^9^9", "3", 0),
        ("word " * 1000, "5", 0),
    ],
)
def test_values(given: str, gold: str, right: float) -> None:
    assert judge_value(Reply.of(given), gold).score == right


def test_values_to_two_digits() -> None:
    assert judge_value(Reply.of("3.14"), r"\pi", digits=2).score == 1


@pytest.mark.parametrize(
    ("text", "shown", "order"),
    [
        ("<image2> or <image1>?", "<image><image> or <image>?", (2, 1, 0)),
        ("<image1>, <image2>, <image1> <image3>", "<image>, <image>, image 1 <image>", (0, 1, 2)),
        ("<image9>", "<image><image><image><image9>", (0, 1, 2)),
        ("<image4> <image0>", "<image><image><image><image4> <image0>", (0, 1, 2)),
        ("<image3>", "<image><image><image>", (0, 1, 2)),
    ],
)
def test_numbered_slots(text: str, shown: str, order: tuple[int, ...]) -> None:
    assert numbered_slots(text, "<image([0-9])>", 3) == (shown, order)
