"""What a list in an answer is, by what its question asks for."""

import pytest

from perl.permutation import answer_form, permute
from tests.messages import refused
from tests.permutation.questions import ask


@pytest.mark.parametrize(
    ("question", "form"),
    [
        *((text, "set") for text in (
            "Which images show a dog?", "Which of these pictures contain water?", "Which two images show the same building?",
            "Select all images that show a boat.", "Which ones are outdoors? Select all that apply.", "What pictures show a cat?",
            "Which of them show a cat?", "Which of the following images were taken at night?", "Identify both photos with snow.",
        )),
        *((text, "values") for text in (
            "For each image in turn, state the number of dogs.", "How many circles are in each image?",
            "How many circles does each image show?", "What colour is the shape in each image?", "Give for every picture its title.",
            "Count the birds in each of the images.", "What animals do the images show, respectively?",
            "How many circles are in each image? Answer with a list of three numbers.",
        )),
        *((text, "sequence") for text in (
            "In which order were the photos taken?", "Sort the images from smallest to largest.",
            "Name the colours of the images from left to right.", "What are the digits in images 1, 2 and 3?",
            "What do the first and the second image show?", "What are the scores of the left and the right team?",
            "What colours are in the first, second and third image?", "State the number of dogs in image 1, image 2 and image 3.",
            "Which images show circles? List them from most to fewest.", "Which two images, first the one with more circles?",
            "Which images show the largest and the smallest dog?", "Count the dogs from left to right.",
        )),
        *((text, None) for text in (
            "Rank the images by size.", "Give the rank of each image.", "What is in the basket?", "Solve x^2 - 4x + 3 = 0.",
            "Name the animals in the picture.",
        )),
    ],
)  # fmt: skip
def test_what_a_question_asks_for(question: str, form: str | None) -> None:
    assert answer_form(ask(f"<image><image><image> {question}", "2, 1", kind="none")) == form


def test_a_value_of_each_image_moves_with_it() -> None:
    asked = ask("<image><image><image> How many circles are in each image?", "1, 1, 3")
    assert permute(asked, (2, 1, 0)).answer == "3, 1, 1"
    assert permute(ask(asked.question, "1, 2, 3"), (2, 0, 1)).answer == "3, 1, 2"


def test_what_names_its_members_cannot_follow() -> None:
    asked = ask("<image><image> Name the images with a dog from left to right.", "1, 2")
    with refused("'q'", "kind"):
        permute(asked, (1, 0))


def test_the_data_may_say_what_a_list_is() -> None:
    asked = ask("<image><image> How many?", "1, 2", extra={"answer_form": "values"})
    assert answer_form(asked) == "values" and permute(asked, (1, 0)).answer == "2, 1"
    with refused("'q'", "answer_form", "'ranks'", "values"):
        answer_form(ask("<image><image> How many?", extra={"answer_form": "ranks"}))
