"""Where something is: boxes, several boxes, and a box in one of several images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation import permute
from perl.rewards.boxes import boxes_in, iou
from perl.rewards.scorer import Scorer
from perl.types import Example, Rollout
from tests.messages import refused, tells
from tests.rewards.scoring import score, totals

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
    empty, turned = (a[0], a[1], a[0], a[3]), (a[2], a[3], a[0], a[1])
    assert iou(empty, empty) == iou(turned, a) == 0
    small, tiny = [tuple(v / 16 for v in box) for box in (a, b)]
    assert iou(small, tiny) == iou(a, b)


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
    assert score("box_iou(threshold=0.5)", text, answer="(0,0),(2,4)") == 1
    assert score("box_iou", "no box", answer="(1,0),(3,2)") == 0
    assert math.isnan(score("box_iou", text, answer=None))
    with refused("box_iou", "'B'", "0 boxes"):
        score("box_iou", text, answer="B")
    with refused("box_iou", "column 'bbox'", "answer", "options"):
        score("box_iou(column='bbox')", text, answer="B")


FORMS = [
    list, tuple, np.array, str, lambda b: np.array(b, dtype=np.float32), lambda b: list(np.array(b)),
    lambda b: {"bbox_2d": list(b)}, lambda b: {"label": "cat", "bbox_2d": tuple(b)},
]  # fmt: skip


@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=4), st.data())
def test_gold_boxes_in_every_form(gold: Any, others: Any, data: Any) -> None:
    """Detection is a share, and perfect for the gold boxes in any sequence."""
    one, mixed = data.draw(st.sampled_from(FORMS)), data.draw(st.booleans())
    wanted = [(data.draw(st.sampled_from(FORMS)) if mixed else one)(box) for box in gold]
    text, other = (" ".join(str(list(box)) for box in some) for some in (reversed(gold), others))
    assert score("detection(column='boxes')", text, boxes=wanted) == pytest.approx(1)
    assert 0 <= score("detection(column='boxes')", other, boxes=wanted) <= 1
    for box, value in zip(gold, wanted, strict=True):
        assert score("box_iou(column='box')", str(box), box=value) == 1
        assert score("box_iou(column='box')", str(box), box=[value]) == 1


@pytest.mark.parametrize(
    ("gold", "named"),
    [
        ([5, 5, 1, 1], "[5, 5, 1, 1]"),
        ("(0,5),(4,1)", "[0, 5, 4, 1]"),
        ([2, 2, 2, 4], "[2, 2, 2, 4]"),
        ([2, 2, 4, 2], "[2, 2, 4, 2]"),
        ([1, 2, 3], "[1, 2, 3]"),
        ([1, 2, 3, [4]], "[1, 2, 3, [4]]"),
        ([1, 2, 3, math.inf], "[1, 2, 3, inf]"),
    ],
)
@pytest.mark.parametrize("spec", ["box_iou", "detection", "grounding(box_column='answer')"])
def test_a_gold_box_that_nothing_fits_is_bad_data(
    spec: str, gold: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"answer": ["[0,0,4,4]", gold], "id": ["q1", "q2"], "image": [1, 1]}
    _, scores = totals(spec, ["image 1, [0,0,4,4]"] * 2, **columns)
    np.testing.assert_array_equal(scores, [1, math.nan])
    tells(caplog.text, f"'{spec.partition('(')[0]}'", named, "example 'q2'")


def test_detection() -> None:
    gold = [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert score("detection(column='boxes')", "[0,0,10,10] [20,0,30,10]", boxes=gold) == 1
    # A list of numbers as an answer has become a text.
    assert [
        score("detection", text, answer="0, 0, 10, 8.0") for text in ("[0,0,10,8]", "none")
    ] == [1, 0]
    # One found with IoU 0.8, one missed, one false: 0.7 * 0.4 + 0.3 * (1 - (1/2 + 1/2) / 2).
    text = "[0,0,10,8] [50,50,60,60]"
    assert score("detection(column='boxes')", text, boxes=gold) == pytest.approx(0.43)
    weights = "iou_weight=0, completeness_weight=2"
    assert score(f"detection({weights}, column='boxes')", text, boxes=gold) == pytest.approx(0.5)
    # Each box counts once, the largest overlap first: 0.7 * 0.9 / 2 + 0.3 / 2, 0.7 * 1 / 2 + 0.3 * (1 - 1/2 / 2).
    twice, both = "[0,0,10,6] [0,0,10,9]", [[0, 0, 10, 10], [0, 0, 10, 9]]
    assert score("detection(column='boxes')", twice, boxes=gold) == pytest.approx(0.465)
    assert score("detection(column='boxes')", "[0,0,10,9]", boxes=both) == pytest.approx(0.575)
    assert score("detection", "[0,0,10,5]", answer="[0,0,10,10]") == pytest.approx(0.65)
    assert score("detection(threshold=0)", "[50,50,60,60]", answer="[0,0,10,10]") == 0
    assert score("detection(threshold=0.9)", text, answer="[0,0,10,10]") == 0
    assert score("detection", "none", answer="[0,0,10,10]") == 0
    assert score("detection", "none", answer="there is none") == 1
    assert score("detection", "[0,0,1,1]", answer="there is none") == 0


def test_grounding_follows_the_image() -> None:
    """The gold image is the data's second; where it stands in the rollout is where the answer has to point."""
    extra = {"image": 2, "box": "(0,0),(4,4)"}
    example = Example("q", ("a", "b", "c"), "", "", should_change=False, extra=extra)  # type: ignore[arg-type]
    texts = [f"<answer>In image {k}, box (0,0),(4,2)</answer>" for k in (1, 2, 3)]

    def scores(spec: str, order: tuple[int, ...]) -> list[float]:
        shown: Any = (permute(example, order), None, np.zeros(1), np.zeros(1))
        rollouts = [Rollout(*shown, text, True) for text in texts]
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


def test_grounding_names_images_in_many_ways() -> None:
    box = {"box": "(0,0),(4,4)"}
    for name in (
        "Image 12",
        "picture #12",
        "frame=12",
        "image: 12",
        "image index 12",
        "image_id 12",
    ):
        for gold in (12, "12", " 12 ", "Picture 12", 12.0):
            assert score("grounding", f"{name} [0,0,4,4]", image=gold, **box) == 1
    assert score("grounding", "12 [0,0,4,4]", image=12, **box) == 0
    assert score("grounding", "image 2 [0,0,4,4]", image=1, order=np.array([1, 0]), **box) == 1
    with refused("'grounding'", "'a cat'"):
        score("grounding", "image 1 [0,0,4,4]", image="a cat", **box)
