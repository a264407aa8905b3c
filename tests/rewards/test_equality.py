"""Whether two answers are equal, by their form."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards.reading import canonical, equal, items
from tests.permutation.questions import ODD

ALIKE = (
    ("B", "b", "(B)", "(b).", "B.", "option B", "Option (B)", "B:", "B)", "B。", r"\boldsymbol{B}", r"\text{B}", "$B$", "{B}", "{{B}}", r"\{B\}", "**B**", "[B]", r"\(B\)", "Image B",
     "`B`", r"\textbf{(B)}"),
    ("2", "Image 2", "image2", "2.0", "option 2", "(2)", "Picture 2", "[2]", r"\{2\}", "Figure 2.", "$2$", "4/2"),
    ("1/2", "0.50", "0.5", r"\frac{1}{2}", "½", r"\frac12", ".5", "50%", r"50\%", "50 percent", r"\dfrac{2}{4}", r"$\tfrac{1}{2}$"),
    ("-.5", r"-\dfrac{1}{2}", r"\frac{-1}{2}", "-50%", "-1/2"),
    ("2 1/2", "2.5", r"2\frac{1}{2}", "2½", r"2 \frac12", r"$2\frac{1}{2}$", "5/2", "250%", "+2.5"),
    ("10.5", "21/2", r"10\frac{1}{2}", r"\frac{21}{2}"),
    ("-1 1/2", "-1.5", r"-1\frac{1}{2}", "-3/2", "\u22121½"),
    ("3", "+3", "3.", "3.00"),
    ("-3", "\u22123", "- 3"),
    ("1234", "1,234", "+1,234.0", "1{,}234", r"1\,234", r"1,\!234"),
    ("1234567.5", "1,234,567.5"),
    ("$45.50", r"\$45.50", r"\$45.5", "45.50 dollars", "$ 45.50", r"$\$45.50$", "45.50$", "US$45.50"),
    ("€1,200", "1200 €", "€ 1200.00", "1200 euros", "1,200 EUR"),
    ("-$6", "$-6", r"-\$6.00"),
    ("6 cm", "6cm", r"6\text{ cm}", "6.0 centimeters", r"6~\mathrm{cm}", "6 cm.", "6 CM", r"6\,\text{cm}", "$6$ cm"),
    ("6 cm^2", r"6\text{ cm}^2", "6 cm²", "6 square centimetres", "6 sq cm", r"6\ \mathrm{cm}^{2}"),
    ("6 m/s", "6 meters per second", r"6\text{ m/s}"),
    ("90°", r"90^\circ", "90 degrees", r"90^{\circ}", r"90\degree", "90 deg"),
    ("20 °C", "20°C", "20 degrees Celsius", r"20^\circ\text{C}"),
    ("(A) or (B)", "(a)  or (B)."),
    ("7", "007", "0" * 63 + "7"),
    ("0" * 64 + "7", "image " + "0" * 64 + "7"),
    ("C, A", "A,C", "(A), (C)", "(A, C)", "A and C", "C & A", r"\{A, C\}", "{A,C}", "[C, A]", "A; C", "Images A and C", "A, and C."),
    ("1,3,2", "[1, 3, 2]", "1 > 3 > 2", r"1 \to 3 \to 2", "Image 1, Image 3, Image 2", "(1, 3, 2)", "1; 3; 2", "images 1, 3 and 2"),
    ("[3, 4]", "[3,4]", "[3.0; 4]", r"\left[3, 4\right]"),
    ("(3, 4)", "(3,4)", r"$(3, 4)$", r"\left(3,\,4\right)"),
    ("(3, 4]", r"\left(3, 4\right]", "(3.0,4]"),
    (r"(-\infty, 5)", "(-∞, 5)", "(-inf, 5)", "(-infinity,5)"),
    (r"(-\infty,1)\cup[5,8)", "[5, 8) U (-inf, 1)", "[5,8)∪(-∞,1)"),
    (r"\{(1,2),(3,4)\}", "{(3,4), (1,2)}"),
    ("yes, no, yes", "Yes, No and Yes", "[yes; no; yes]"),
    ("A red car", "a  Red   car.", '"A red car"', "(a red car.)", "[A red car]", "$A red car.$"),
    ("x > 3", "x>3", "$x > 3$", r"x \gt 3"),
    (r"x \ge 3", "x >= 3", r"x\geq3", "x ≥ 3"),
    (r"10\sqrt{3}", r"10 \sqrt{3}"),
    ("2-3", "2 - 3", "2–3"),
    ("3:2", "3 : 2"),
    (r"2 \times 7", r"2\times 7"),
    ("E. coli", "e. coli"),
    (r"2\sqrt{3}", r"$2\sqrt{3}$", r"2\sqrt{3}.", r"(2 \sqrt{3})"),
)  # fmt: skip


@pytest.mark.parametrize("alike", ALIKE, ids=lambda alike: alike[0])
def test_what_is_equal_and_nothing_else(alike: tuple[str, ...]) -> None:
    for one, other in itertools.product(alike, alike):
        assert equal(one, other), (one, other)
        assert canonical(one) == canonical(other), (one, other)
    others = [answer for other in ALIKE if other is not alike for answer in other]
    for one, other in itertools.product(alike[:3], others):
        assert not equal(one, other), (one, other)
        assert canonical(one) != canonical(other), (one, other)


@pytest.mark.parametrize(
    ("given_", "gold", "right"),
    [
        (None, "B", 0), ("", "B", 0), ("A", "B", 0), ("BB", "B", 0), ("images", "s", 0), ("2", "3", 0), ("1/0", "1", 0),
        ("1/3", "0.333", 0), ("12", "1,2", 0), ("1e3", "1000", 0), ("9" * 100_000, "9" * 99_999, 0), ("x" * 9000, "X" * 9000, 1),
        # Mixed numbers and fractions.
        ("10.5", r"2\frac{1}{2}", 0), ("21/2", "2 1/2", 0), ("2.5", r"2\frac{1}{2}", 1), ("1", r"2\frac{1}{2}", 0),
        ("-0.5", "-1 1/2", 0), ("2 3/2", "3.5", 0), ("2 1/2", "-2 1/2", 0), (r"\frac{1}{2}2", "1/22", 0), ("1/2 2", "1/22", 0),
        # Intervals and points.
        ("[3,4]", "(3,4)", 0), ("(3,4]", "(3,4)", 0), ("[3,4)", "(3,4]", 0), ("(4,3)", "(3,4)", 0), ("[4,3]", "[3,4]", 0),
        ("3, 4", "(3,4)", 1), ("4, 3", "(3,4)", 0), ("(3,4)", "3, 4", 1), (r"(-\infty,3)", r"(\infty,3)", 0),
        (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,4]", 0), ("(1,2)", r"(1,2)\cup(3,4)", 0), (r"(1,2)\cup(3,4)", r"\{(1,2),(3,4)\}", 0),
        ("(1,2,3)", "(3,2,1)", 0), ("(4,5,6)", "(6,5,4)", 0), ("(0.5, 1)", "(1/2, 1.0)", 1), (r"(\sqrt{2}, 1)", r"(1, \sqrt{2})", 0),
        # Percent, currency, units.
        ("50", "50%", 0), ("50%", "50", 0), ("0.5", "50%", 1), ("0.5%", "50%", 0), ("$50", "50%", 1 - 1), ("45.50", "$45.50", 1),
        ("€45.50", "$45.50", 0), ("$45.5", "$45.05", 0), ("$1,000", r"\$1000", 1), ("5 m", "5 cm", 0), ("5", "5 cm", 1),
        ("5 cm", "5", 1), ("6", "5 cm", 0), ("0.05 m", "5 cm", 0), ("5 cm^2", "5 cm", 0), ("5 m/s", "5 m", 0), ("5 km/h", "5 m/s", 0),
        ("5 apples", "5", 0), ("5 apples", "5 apples", 1), ("5 million", "5", 0), ("5n", "5", 0), ("5 N", "5", 1), ("5k", "5", 0), ("25 cm2", r"25\text{ cm}^2", 1), (r"25\pi cm^2", r"25\pi", 1),
        (r"25\pi cm^2", r"25\pi m^2", 0), ("120 km / h", "120 km/h", 1), ("20 mph", "20 km/h", 0), ("5!", "5", 0), ("5 cm by 6 cm", "5 cm", 0), ("5x", "5", 0), ("5 or 6", "5", 0),
        (r"5\sqrt{2}\text{ m}", r"5\sqrt{2}\text{ cm}", 0), (r"5\sqrt{2} cm", r"5\sqrt{2}\text{ cm}", 1), ("$5$", "$5", 1),
        ("90", r"90^\circ", 1), ("$5, $10", "$10, $5", 1), ("5 cm, 6 cm", "6 cm, 5 m", 0),
        # Signs.
        ("> 5", "5", 0), ("< 5", "> 5", 0), ("5 >", "5", 0), ("> A", "A", 0), (r"\le 5", r"\ge 5", 0), (r"(1,2)\cup", "(1,2)", 0), ("A'", "A", 0), ('5"', "5 in", 1), ("5'", '5"', 0),
        ("0,123", "123", 0), ("1, 2, ...", "1, 2", 0), ("0.3...", "0.3", 0), ("1. 2", "1.2", 0), ("3-2", "2-3", 0), ('"5"', "5", 1), ("['A', 'C']", "A, C", 1),
        # An image by its place: numbers may count from 0 where the gold is one.
        ("second picture", "the second image", 1), ("2nd image", "the second image", 1), ("Image 2", "the second image", 1), ("2", "2nd image", 1),
        ("the second image", "2", 0), ("the second image", "Image 2", 0), ("third image", "the second image", 0),
        # Letters.
        ("B. a dog", "B", 1), ("B", "B) a dog", 1), ("(B) a dog", "(B) a cat", 0), ("A. Lincoln", "A. Smith", 0), ("A or B", "A", 0),
        ("A, B", "A", 0), ("A cat", "A", 0), ("not B", "B", 0), ("A", "A, C", 0), ("B is", "B", 0), ("The answer is B", "B", 1), ("Answer: **2.5**", "2 1/2", 1), ("answer is not B", "B", 0), ("Option B: the dog", "B", 1), ("B - the dog", "B", 1), ("A - B", "A", 0), ("(A) or (B)", "A", 0), ("（B）", "B", 1), ("Bob", "B", 0), ("B", "2", 0),
        # Lists that nothing says anything of.
        ("1, 3", "3, 1", 1), ("2,1,3", "1,2,3", 0), ("B, A", "A, B", 0), ("2, 1", "1, 2", 0), ("C, A", "A, C", 1), ("AC", "C, A", 1),
        ("A, C", "AC", 1), ("CAB", "C, A, B", 1), ("CAB", "A, B, C", 0), ("1, 3, 3", "1, 3", 0), ("1, 3, 3", "3, 1, 1", 0),
        ("yes, no, yes", "yes, yes, no", 0), ("cat, dog", "dog and cat", 1), ("cat, dog", "cat, bird", 0), ("0, 2", "2, 0", 1),
        (r"\{2,1\}", r"\{1,2\}", 1), (r"\{2,1\}", "1, 2", 0), ("1, 2", r"\{2, 1\}", 1), ("[1, 3]", "3, 1", 1), ("3 > 1", "1 > 3", 0),
        ("A > B", "A < B", 0), ("x < 3", "x > 3", 0), ("100, 200", "100,200", 1), ("200, 100", "100,200", 1), ("1, 234", "1234", 0), ("1,000", "(1, 0)", 0), ("€5 cm", "5 cm", 0), ("A) dog, B) cat", "B) cat, A) dog", 1), ("(0, 1)", "$1,000", 0), ("1,00", "1,000", 0),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}", 0), ("f(1,2)", "f(2,1)", 0), ("3, 4", "3", 0), ("((1,2))", "(1,2)", 1), ("(1, 2), (3, 4)", "(3,4),(1,2)", 1), ("(1, 2), (3, 4)", "(2,1),(3,4)", 0),
        ("[10, 20, 40, 30]", "[10, 20, 30, 40]", 0), (r"(3, +\infty)", r"(3,\infty)", 1), ("B、C", "C, B", 1), ("1，3", "3, 1", 1), ("1,", "1", 1),
    ],
)  # fmt: skip
def test_equal(given_: str | None, gold: str, right: int) -> None:
    assert equal(given_, gold) == bool(right)


@pytest.mark.parametrize(
    ("form", "given_", "gold", "right"),
    [
        ("set", "2, 1", "1, 2", 1), ("set", "B and A", "A, B", 1), ("set", "2, 1, 1", "1, 2", 0), ("set", "1, 1, 2", "1, 2, 2", 0), ("set", "A", "A, B", 0),
        ("set", "100,200", "200, 100", 1), ("set", "[3, 1]", "(1, 3)", 1), ("set", "(3,4]", "(4,3]", 0), ("set", "C > A", "A, C", 1),
        ("sequence", "1, 3", "3, 1", 0), ("sequence", "C > A > B", "C, A, B", 1), ("sequence", "CAB", "C, A, B", 1),
        ("sequence", r"\{3, 1\}", "1, 3", 0), ("sequence", "[3; 1]", "3, 1", 1), ("sequence", "B → A", "B, A", 1),
        ("values", "2, 3, 2", "2, 3, 2", 1), ("values", "3, 2, 2", "2, 3, 2", 0), ("values", "4, 7", "7, 4", 0),
        ("values", "100,200", "100, 200", 1), ("set", "B", "(b)", 1), ("set", "2.5", "2 1/2", 1),
    ],
)  # fmt: skip
def test_lists_of_a_known_form(form: Any, given_: str, gold: str, right: int) -> None:
    assert equal(given_, gold, form) == bool(right)
    assert (canonical(given_, form) == canonical(gold, form)) == bool(right)


def test_what_only_two_answers_together_tell() -> None:
    """A number in thousands where a list is known, and which way a ranking goes."""
    assert equal("1,234", "1234", "values") and equal("1234", "1,234", "values")
    assert not equal("1234", "1,235", "values") and not equal("A > B", "A < B", "sequence")


def test_items_of_a_list() -> None:
    for text in ("A, c and 02", "[a; C; 2.]", "(A) > (C) > (2)", "a→c->2", "A<C&2", "A,, C AND 2,"):
        assert items(text) == ["a", "c", "2"]
    assert items("CAB") == ["c", "a", "b"] and items("") == [] and items("B") == ["b"]


def test_numbers_with_a_point_to_some_digits() -> None:
    never = pytest.fail
    for one, other, right in (
        *(("0.333333", "1/3", True), ("0.33333", "1/3", False), ("1/3", "333333/1000000", False)),
        *(
            ("0.0000001", "0.0000002", False),
            ("3.1415926", "3.1415942", False),
            ("0.3333334", "0.3333331", True),
        ),
    ):
        assert equal(one, other, same=never, digits=6) == right  # type: ignore[arg-type]


@given(ODD | st.text(alphabet="\\{}[]()$%,;.<>→∪-/ 012ABab½^°", max_size=40), ODD)
def test_any_text_has_a_form(one: str, other: str) -> None:
    assert equal(one, one) and canonical(one) == canonical(one)
    equal(one, other), equal(other, one, "set"), items(one)
    assert equal(one, other) in (True, False)


LOOPS = ("(", "{", "[1,", "1,", "A and ", "\\text{", "\\frac{1}{2}", "$", "9", " ", "1 ", "-", "*", "a=", "U ", "(A) or ", "\\left", "½", "%", "image ")  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_a_looping_answer_takes_no_time(loop: str) -> None:
    text = loop * (100_000 // len(loop))
    start = time.perf_counter()
    equal(text, "A, C"), equal(text, text + "x"), canonical(text, "set")
    assert time.perf_counter() - start < 1
