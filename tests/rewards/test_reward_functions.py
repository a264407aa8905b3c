"""The built-in reward functions: what counts as right, and the formulas against other ways to compute them."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from perl.config import Config, RewardConfig
from perl.permutation import permute
from perl.recipe import check_config
from perl.rewards import math as reward_math
from perl.rewards.boxes import boxes_in, iou
from perl.rewards.scorer import Scorer
from perl.rewards.sequences import kendall_tau
from perl.rollout.advantages import group_mean, group_weight
from perl.types import Example, Rollout, UserError

NAN = float("nan")


def score(spec: str, text: str | list[str], **columns: Any) -> Any:
    """What one function gives for a completion, or for several with the same columns."""
    texts = [text] if isinstance(text, str) else text
    every = {key: [value] * len(texts) for key, value in columns.items()}
    values = Scorer((spec,), (1.0,)).score(["q"] * len(texts), texts, every)[0].tolist()
    return values[0] if isinstance(text, str) else values


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("A or C? <answer> (b) </answer>", "B"),
        ("<answer>B. A dog</answer>", "B"),
        ("<answer>B) dog</answer>", "B"),
        ("<answer>Option B</answer>", "B"),
        ("<answer>option b.</answer>", "B"),
        ("<answer>The answer is (C)</answer>", "C"),
        ("<answer>**D**</answer>", "D"),
        ("<answer>It shows A dog, so B</answer>", "B"),
        ("<answer>C</answer> <answer>B</answer>", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{B}", "B"),
        ("<think>A is wrong</think> B", "B"),
        ("B.", "B"),
        ("Maybe (A). No: the answer is B", "B"),
        ("I think that (C) fits", "C"),
        ("<answer>e.g. B</answer>", "B"),
        ("<answer>i.e., the second: (B)</answer>", "B"),
        ("<answer>E.G. option B</answer>", "B"),
        ("<answer>B.Dog</answer>", "B"),
        ("<answer>a.m.</answer>", None),
        ("A cat is to be seen.", None),
        ("<answer>a dog</answer>", None),
        ("<answer></answer>", None),
        ("", None),
    ],
)
def test_choice_finds_the_letter(text: str, letter: str | None) -> None:
    scores = {gold: score("choice", text, answer=gold) for gold in "ABCD"}
    assert {gold for gold, value in scores.items() if value == 1} == ({letter} - {None})
    if letter:
        assert score("choice", text, answer=f"({letter}) a thing") == 1


@pytest.mark.parametrize(
    "text",
    ["A, C", "C and A", "A and C", "(c), (a)", "AC", "C; A.", "e.g. A and C", "(a), i.e. (c)"],
)
def test_choice_of_several(text: str) -> None:
    tagged = f"<answer>{text}</answer>"
    assert score("choice(unordered=True)", tagged, answer="A, C") == 1
    assert score("choice(unordered=True)", tagged, answer="A, B, C") == 0


def test_choice_without_gold_and_with_a_gold_that_is_none(caplog: Any) -> None:
    scorer = Scorer(("choice",), (1.0,))
    gold = {"answer": ["A", None, "12"], "id": ["q1", "q2", "q3"]}
    totals, _ = scorer.score(["q"] * 3, ["A"] * 3, gold)
    np.testing.assert_array_equal(totals, [1, NAN, NAN])  # nothing else scores the other two
    assert scorer.faults == {"choice": 0} and not caplog.text


corners, sides = st.integers(0, 8), st.integers(1, 5)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corners, corners, sides, sides)


def pixels(box: tuple[int, ...]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@given(boxes, boxes)
def test_iou_is_a_count_of_pixels(a: Any, b: Any) -> None:
    both, either = pixels(a) & pixels(b), pixels(a) | pixels(b)
    assert iou(a, b) == pytest.approx(len(both) / len(either))
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


def test_boxes_without_area_overlap_nothing() -> None:
    assert iou((1, 1, 1, 5), (1, 1, 1, 5)) == 0
    assert iou((5, 5, 1, 1), (1, 1, 5, 5)) == 0


@given(boxes)
def test_boxes_are_read_as_they_are_written(box: Any) -> None:
    x1, y1, x2, y2 = box
    for text in (
        f"({x1},{y1}),({x2},{y2})",
        f"[{x1}, {y1}, {x2}, {y2}]",
        f'{{"bbox_2d": [{x1}.0, {y1}, {x2}, {y2}], "label": "cat"}}',
        f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        f"(({x1}, {y1}), ({x2}, {y2}))",
    ):
        assert boxes_in(f"1, 2 (3) {text} [4]") == [box]


def test_box_iou() -> None:
    text = "<think>(9,9),(10,10)</think><answer>(0,0),(2,2)</answer>"
    assert score("box_iou", text, answer="[1, 0, 3, 2]") == pytest.approx(1 / 3)
    assert score("box_iou(column='bbox')", text, bbox=[0, 0, 2, 2]) == 1
    assert score("box_iou(threshold=0.5)", text, answer="(1,0),(3,2)") == 0
    assert score("box_iou(threshold=0.3)", text, answer="(1,0),(3,2)") == 1
    assert score("box_iou", "no box", answer="(1,0),(3,2)") == 0
    assert math.isnan(score("box_iou", text, answer=None))
    with pytest.raises(UserError, match="has 0 boxes, and one is needed"):
        score("box_iou", text, answer="B")
    with pytest.raises(UserError, match="no column 'bbox'; there are answer; name"):
        score("box_iou(column='bbox')", text, answer="B")


@given(st.lists(boxes, max_size=5), st.data())
def test_gold_boxes_in_every_form(gold: Any, data: Any) -> None:
    forms = [
        list,
        tuple,
        np.array,
        lambda b: np.array(b, dtype=np.float32),
        lambda b: {"bbox_2d": list(b)},
    ]
    forms += [str, lambda b: list(np.array(b)), lambda b: {"label": "cat", "bbox_2d": tuple(b)}]
    one, mixed = data.draw(st.sampled_from(forms)), data.draw(st.booleans())
    wanted = [(data.draw(st.sampled_from(forms)) if mixed else one)(box) for box in gold]
    text = " ".join(str(list(box)) for box in gold)
    assert score("detection(column='boxes')", text, boxes=wanted) == pytest.approx(1)
    for box, value in zip(gold, wanted, strict=True):
        assert score("box_iou(column='box')", str(box), box=value) == 1
        assert score("box_iou(column='box')", str(box), box=[value]) == 1


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ([5, 5, 1, 1], "the gold box [5, 5, 1, 1] has no area"),
        ("(0,5),(4,1)", "the gold box [0, 5, 4, 1] has no area"),
        ([2, 2, 2, 4], "the gold box [2, 2, 2, 4] has no area"),
        ([1, 2, 3], "is no box of four numbers"),
        ([1, 2, 3, [4]], "is no box of four numbers"),
    ],
)
@pytest.mark.parametrize("spec", ["box_iou", "detection", "grounding(box_column='answer')"])
def test_a_gold_box_that_nothing_fits_is_bad_data(
    spec: str, gold: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Scorer((spec,), (1.0,))
    columns = {"answer": ["[0,0,4,4]", gold], "id": ["q1", "q2"], "image": [1, 1]}
    totals, _ = scorer.score(["q"] * 2, ["image 1, [0,0,4,4]"] * 2, columns)
    np.testing.assert_array_equal(totals, [1, NAN])
    assert reason in caplog.text and "on example 'q2'" in caplog.text


def test_detection() -> None:
    gold = [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert score("detection(column='boxes')", "[0,0,10,10] [20,0,30,10]", boxes=gold) == 1
    # One found with IoU 0.8, one missed, one false: 0.7 * 0.4 + 0.3 * (1 - (1/2 + 1/2) / 2).
    text = "[0,0,10,8] [50,50,60,60]"
    assert score("detection(column='boxes')", text, boxes=gold) == pytest.approx(0.43)
    weights = "iou_weight=0, completeness_weight=2"
    assert score(f"detection({weights}, column='boxes')", text, boxes=gold) == pytest.approx(0.5)
    assert score("detection(threshold=0.9)", text, answer="[0,0,10,10]") == 0.3 * (1 - 2 / 2)
    assert score("detection", "none", answer="[0,0,10,10]") == 0
    assert score("detection", "none", answer="there is none") == 1
    assert score("detection", "[0,0,1,1]", answer="there is none") == 0


@given(st.lists(boxes, max_size=4), st.lists(boxes, max_size=4))
def test_detection_is_a_share_and_perfect_for_the_gold_boxes(found: Any, wanted: Any) -> None:
    text = " ".join(str(list(box)) for box in found)
    value = score("detection(column='boxes')", f"<answer>{text}</answer>", boxes=wanted)
    assert 0 <= value <= 1
    same = " ".join(str(list(box)) for box in reversed(wanted))
    assert score("detection(column='boxes')", same, boxes=wanted) == pytest.approx(1)


def test_grounding_follows_the_image() -> None:
    """The gold image is the data's second; where it stands in the rollout is where the answer has to point."""
    extra = {"image": 2, "box": "(0,0),(4,4)"}
    example = Example("q", ("a", "b", "c"), "", "", should_change=False, extra=extra)  # type: ignore[arg-type]
    texts = [f"<answer>In image {k}, box (0,0),(4,2)</answer>" for k in (1, 2, 3)]

    def scores(spec: str, order: tuple[int, ...]) -> list[float]:
        rollouts = [
            Rollout(permute(example, order), None, np.zeros(1), np.zeros(1), text, True)  # type: ignore[arg-type]
            for text in texts
        ]
        return Scorer((spec,), (1.0,)).score_rollouts(rollouts)[0].tolist()

    assert scores("grounding", (0, 1, 2)) == [0, 0.5, 0]
    assert scores("grounding", (1, 2, 0)) == [0.5, 0, 0]
    assert scores("grounding(image_weight=0.5)", (2, 0, 1)) == [0, 0, 0.75]
    assert scores("grounding(threshold=0.5)", (1, 0, 2)) == [1, 0, 0]


def test_grounding_reads_the_answer_in_the_order_it_is_in() -> None:
    spec = "grounding(image_column='answer')"
    columns = {"answer": "Image 3", "box": [0, 0, 4, 4], "order": [2, 1, 0]}
    for name in ('"image": 3', '"image": "image_3"', '"image_3"', '"image_index": 3'):
        assert score(spec, f'{{{name}, "bbox_2d": [0, 0, 4, 4]}}', **columns) == 1
    assert score(spec, "image_2 [0, 0, 4, 4]", **columns) == 0
    assert score(spec, "image 3 [0, 0, 4, 4]", **{**columns, "answer": "image_3"}) == 1


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("<answer>[2.0, 6]</answer>", "[4, 8]", 1 / 3),
        ("from 0:02 to 0:06", [4, 8], 1 / 3),
        ("<answer>1:00:01-1:00:03</answer>", (3601, 3603), 1),
        ("<answer>5 to 7 s</answer>", "8 to 9", 0),
        ("<answer>7 to 5 s</answer>", "5 to 7", 0),
        ("<answer>7 s</answer>", "5 to 7", 0),
        ("none", "5 to 7", 0),
    ],
)
def test_temporal_iou(text: str, gold: Any, value: float) -> None:
    assert score("temporal_iou(column='span')", text, span=gold) == pytest.approx(value)


def test_temporal_iou_of_timestamps() -> None:
    """Time-R1: the overlap times 1 - |distance| / duration of either end."""
    spec = "temporal_iou(duration='length')"
    assert score(spec, "2 to 6", answer=[4, 8], length=10) == pytest.approx(1 / 3 * 0.8 * 0.8)
    assert score(spec, "4 to 8", answer=[4, 8], length="0:10") == 1
    assert score(spec, "4 to 80", answer=[4, 8], length=10) == 0
    for length in (0, NAN):
        with pytest.raises(UserError, match="is not above 0 s"):
            score(spec, "2 to 6", answer=[4, 8], length=length)
    with pytest.raises(UserError, match="no column 'length'; set its option duration"):
        score(spec, "2 to 6", answer=[4, 8])


def test_ordering() -> None:
    texts = ["<answer>C, A, B</answer>", "[c; a; b]", "C > A > B", "CAB", "C, A", "A, C, B", ""]
    assert score("ordering", texts, answer="C, A, B") == [1, 1, 1, 1, 0, 0, 0]
    shares = score("ordering(kendall=True)", texts, answer="CAB")
    assert shares == pytest.approx([1, 1, 1, 1, 0, 2 / 3, 0])
    assert score("ordering(kendall=True)", "B, A, C", answer="C, A, B") == 0
    with pytest.raises(UserError, match="names an item twice"):
        score("ordering(kendall=True)", "A", answer="A, A")


@given(st.permutations(range(6)))
def test_kendall_tau_is_scipys(ranks: list[int]) -> None:
    assert kendall_tau(ranks) == pytest.approx(kendalltau(range(6), ranks)[0])
    text = ", ".join("ABCDEF"[r] for r in ranks)
    value = score("ordering(kendall=True)", text, answer="A, B, C, D, E, F")
    assert value == pytest.approx((1 + kendall_tau(ranks)) / 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<index>1, 3</index>", 1),
        ("<index>[3 1]</index>", 1),
        ("<index>1, 1</index>", 0),
        ("<index>1</index>", 0),
        ("<index>1, 2, 3</index>", 0),
        ("<index>0, 1</index>", 0),
        ("<index>3, 4</index>", 0),
        ("1, 3", 0),
    ],
)
def test_frame_index(text: str, value: float) -> None:
    assert score("frame_index(count=2)", text, order=[2, 0, 1]) == value
    assert score("frame_index(count=2, frames=3)", text) == value
    with pytest.raises(UserError, match="set frames"):
        score("frame_index(count=2)", text)


def test_frames_may_count_from_zero() -> None:
    texts = ["<index>0, 2</index>", "<index>1, 3</index>"]
    assert score("frame_index(count=2, frames=3, first=0)", texts) == [1, 0]


def test_length_penalty_is_dapos() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 1000]
    columns = {"completion_length": lengths}
    spec = "length_penalty(longest=100, buffer=20)"
    values = Scorer((spec,), (1.0,)).score(["q"] * 7, [""] * 7, columns)[0]
    np.testing.assert_allclose(values, [0, 0, -0.05, -0.5, -1, -1, -1])
    words = "length_penalty(longest=4, buffer=2, unit='words')"
    assert score(words, ["a b", "a b c", "a b c d", "a b c d e"]) == [0, -0.5, -1, -1]
    assert score("length_penalty(longest=4, buffer=2, unit='characters')", "a b") == -0.5
    for options, match in (
        ("longest=4, buffer=0", "buffer = 0 must be above 0"),
        ("longest=4, buffer=2, unit='lines'", "choose tokens, words, characters"),
        ("longest=4, buffer=2", "no column completion_length"),
    ):
        with pytest.raises(UserError, match=match):
            score(f"length_penalty({options})", "a")


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_counts_what_was_there_before(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    value = score(f"repetition(n={n})", " ".join(words))
    assert value == pytest.approx(before / len(grams) if grams else 0)
    assert 0 <= value <= 1


def test_math() -> None:
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac{2}{4}}", "<answer>0.5</answer>", r"so $\frac12$", r"\boxed{2}", "((("]
    assert score("math", texts, answer="1/2") == [1, 1, 1, 0, 0]
    assert score("math", r"\boxed{x = 3}", answer="3") == 1
    assert score("math", r"\boxed{\{2, 1\}}", answer=r"\{1, 2\}") == 1


def test_math_that_takes_too_long_is_one_fault() -> None:
    """A power that Python computes in one operation, which no thread can be freed from."""
    pytest.importorskip("math_verify")
    scorer = Scorer(("math(seconds=0.5)",), (1.0,))
    texts = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"]
    start = time.perf_counter()
    totals, _ = scorer.score(["q"] * 2, texts, {"answer": ["4"] * 2})
    np.testing.assert_array_equal(totals, [NAN, 1])
    assert scorer.faults == {"math": 1} and time.perf_counter() - start < 10


_NOISY = """
import os, time
def parse(text, **options):
    return [text]
def verify(gold, given, **options):
    print("a stray line")
    os.write(1, b"another\\n")
    time.sleep("slow" in given[0] and 1)
    return gold == given
"""


@pytest.fixture
def noisy_math(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scorer:
    """The reward `math` with a package that prints, compares texts, and takes 1 s over "slow"."""
    (tmp_path / "math_verify.py").write_text(_NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reward_math, "_WORKER", reward_math._Worker())  # Not one that others use.
    return Scorer(("math",), (1.0,))


def test_math_is_not_misled_by_what_its_package_prints(noisy_math: Scorer) -> None:
    totals, _ = noisy_math.score(["q"] * 4, ["1", "2", "3", "4"], {"answer": ["1", "0", "3", "0"]})
    assert totals.tolist() == [1, 0, 1, 0]


def test_math_after_an_interrupt_answers_the_question_that_is_asked(noisy_math: Scorer) -> None:
    assert noisy_math.score(["q"], ["1"], {"answer": ["1"]})[0].tolist() == [1]
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        noisy_math.score(["q"], ["slow"], {"answer": ["slow"]})
    totals, _ = noisy_math.score(["q"] * 3, ["1", "2", "3"], {"answer": ["0", "2", "0"]})
    assert totals.tolist() == [0, 1, 0]


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs math-verify; pip install 'perl-rl\[rewards\]'"):
        Scorer(("math",), (1.0,))


@given(
    st.sampled_from(["<answer>", "</answer>", "(", "1,", " ", "A", "box ", "image 2", "[1,2"]),
    st.integers(0, 9),
)
def test_any_text_has_a_score(part: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [part, "<index>", "</index>", "\n", "and", "->", "-3.5", "B", r"\boxed{", "}", "1:02"]
    text = "".join(rng.choice(pieces, 40))
    columns = {"answer": "A", "image": 1, "box": "(0,0),(1,1)", "span": "1-2", "order": [0, 1]}
    specs = (
        "accuracy(tags=True, unordered=True)", "choice", "choice(unordered=True)", "format_tags",
        "box_iou(column='box')", "detection(column='box')", "grounding", "temporal_iou(column='span')",
        "ordering(kendall=True)", "frame_index(count=1)", "repetition",
    )  # fmt: skip
    for spec in specs:
        assert 0 <= score(spec, text, **columns) <= 1


@pytest.mark.parametrize("piece", ["(1,", "<answer>", "A, ", " ", "1:", "image ", "[", "option "])
def test_a_looping_model_costs_no_time(piece: str) -> None:
    text = piece * 50_000
    columns = {"answer": "A", "image": 1, "box": "(0,0),(1,1)", "span": "1-2", "order": [0, 1]}
    start = time.perf_counter()
    for spec in ("choice", "grounding", "temporal_iou(column='span')", "ordering", "format_tags"):
        score(spec, text, **columns)
        score(spec, f"<answer>{text}</answer>", **columns)
    assert time.perf_counter() - start < 3


@given(st.floats(0, 1), st.floats(0, 1))
def test_group_weights_are_the_papers_and_fall(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert group_weight(a, "none") == 1
    assert group_weight(a, "exp") == pytest.approx(math.exp(1 - a))
    assert group_weight(a, "power", 2) == pytest.approx((1.05 - a) ** 2)
    assert group_weight(a, "log") == pytest.approx(max(0, -math.log(0.02 + a)))
    for kind in ("exp", "power", "log"):
        assert group_weight(low, kind) >= group_weight(high, kind) >= 0


def test_a_group_without_scores_weighs_one() -> None:
    assert group_mean(np.array([0.0, NAN, 1.0])) == 0.5
    assert group_weight(group_mean(np.array([NAN])), "exp") == 1
    assert group_weight(7.0, "power") == pytest.approx(0.05)


def test_group_weights_name_a_reward_that_there_is() -> None:
    def wrong(**keys: Any) -> str:
        try:
            check_config(Config(reward=RewardConfig(**keys)))
        except UserError as error:
            return str(error)
        return ""

    functions = ("box_iou(column='a:b')", "mine.py:f(scale=2)")
    for of in ("box_iou", "f"):
        assert wrong(functions=functions, group_weight="exp", group_weight_of=of) == ""
    said = wrong(functions=functions, group_weight="exp", group_weight_of="accuracy")
    assert "'accuracy' is none of reward.functions (box_iou, f)" in said
    assert wrong(timeout=-1.0).startswith("reward.timeout = -1.0: must be")
