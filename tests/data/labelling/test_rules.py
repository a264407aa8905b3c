"""Labels by rules: a table of questions of the types that multi-image data hold, and what every label must satisfy."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perl.data.labelling.label import Label, checked
from perl.data.labelling.rules import label_by_rules
from perl.permutation import (
    Consistency,
    all_orders,
    check_answer,
    num_orders,
    original_answer,
    permute,
)
from perl.rewards.reading import equal
from perl.types import IMAGE_SLOT, Example, Message

UNSURE = ("none", False, "unsure")
MODES: tuple[Consistency, ...] = ("slots", "references")


def example(question: str, answer: str) -> Example:
    """`#` stands for a slot."""
    text = question.replace("#", IMAGE_SLOT)
    images = tuple(Image.new("RGB", (2, 2), (k, 0, 0)) for k in range(text.count(IMAGE_SLOT)))
    return Example("x", images, (Message("user", text),), answer, "none", False)


def labelled(question: str, answer: str, text: Consistency) -> tuple[Label, Example]:
    """The label by rules, and the example with it, which loads."""
    asked = example(question, answer)
    label = label_by_rules(asked, text)
    with_label = replace(asked, kind=label.kind, should_change=label.should_change)
    check_answer(with_label)
    return label, with_label


# question, answer, the label with the text as it is, and with mentions that follow where it differs
TABLE: list[tuple[str, str, tuple, tuple | None]] = [
    # Letters label all images.
    ("A # B # Which image shows a kettle?", "B", ("all", True), None),
    ("Which of these is a violin? A. # B. # C. #", "C", ("all", True), None),
    ("(A) # (B) # (C) # (D) #\nPick the picture with the red umbrella.", "A", ("all", True), None),
    ("A: # B: # C: #\nWhich images contain water?", "A, C", ("all", True), None),
    ("A. # B. # Do both images show the same building?", "No", ("all", False), None),
    # The options are images, the question has its own.
    ("# What stands behind the sofa? A. # B. # C. #", "C", ("first_fixed", True), None),
    ("##\nWhich option completes the pattern?\nA. # B. # C. # D. #", "D", ("last:4", True), None),
    ("###\nWhich image shows what happens next? A. # B. #", "A", ("last:2", True), None),
    ("# This is a floor plan. Which of the pictures shows that flat? # #", "B", ("first_fixed", True), None),
    ("### In which image is there a boat?", "2", ("all", True), None),
    ("### Which image best represents happiness?", "2", ("all", True), None),
    ("### In which image does the man wear glasses?", "2", ("all", True), None),
    ("### Which image shows a dog? You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
     "The final answer MUST BE put in \\boxed{}.", "2", ("all", True), None),
    ("### Which image shows a dog? Output the thinking process in <think> </think> and final answer in <answer> </answer> tags.", "2",
     ("all", True), None),
    ("## What comes next? A. # B. # C. #", "B", ("last:3", True), None),
    ("# Which option is the missing part in the lower right corner? A. # B. #", "B", ("first_fixed", True), None),
    # One reference image, named in the text.
    ("### The first image is the reference. Which image is most like it? A. Image 2 B. Image 3",
     "B", ("first_fixed", True), None),
    ("#### Which picture shows the same person as image 1?\nA. Image 2\nB. Image 3\nC. Image 4",
     "A", ("first_fixed", True), None),
    ("### Which of the images resembles Image 2?", "Image 3", ("blocks:1,3", True), ("all", True)),
    ("### Which of the pictures is painted like the last picture?", "1", ("blocks:1,2", True), ("all", True)),
    ("#### Does any other image show the bridge of the first image?", "Yes", ("first_fixed", False), ("all", False)),
    # Images named as options or answer.
    ("## Which image shows more apples?\nA. Image 1\nB. Image 2", "A", ("all", True), None),
    ("## Which picture is brighter? (A) the first picture (B) the second picture", "B", ("all", True), None),
    ("### Which photo was taken at night?", "Image 2", ("all", True), None),
    ("### Which photo was taken at night?", "the third photo", ("all", True), None),
    ("#### Which image does not belong with the others?", "4", ("all", True), None),
    ("#### Which images show a bicycle?", "1, 3", ("all", True), None),
    ("## Which image has a larger crowd?\nA. Image 1\nB. Image 2\nC. Neither", "A", ("all", True), ("all", False)),
    ("## Which image has a larger crowd?\nA. Image 1\nB. Image 2\nC. Neither", "C", ("all", False), ("all", False)),
    ("## Between image 1 and image 2, which image is sharper?\nA. Image 1\nB. Image 2", "B", ("none", False), ("all", True)),
    ("### Choose the image that shows a harbour.", "B", ("all", True), None),
    ("### Given the first picture, which of the second and third picture is alike? (A) the second image (B) the third image",
     "(A)", ("none", False), ("first_fixed", True)),
    ("A. # B. # C. # Which image is most like image B?", "C", ("blocks:1,3", True), ("all", True)),
    # Sequences of images as options or answer.
    ("### In which order were they taken?\nA. 2, 1, 3\nB. 1, 3, 2\nC. 3, 2, 1", "B", ("ordering", True), None),
    ("#### Arrange the steps.\nA. 4-3-2-1\nB. 1-3-2-4\nC. 2-1-4-3", "A", ("ordering", True), None),
    ("### Put these pictures in chronological order.", "3, 1, 2", ("all", True), None),
    ("A. # B. # C. # Sort the images from the youngest tree to the oldest.", "C, A, B", ("all", True), None),
    # Sequences in the question.
    ("### What happens next?", "The glass falls", ("none", False), None),
    ("#### These frames are from a video. How many people enter?", "2", ("none", False), None),
    ("## What was removed from the table?", "a cup", ("none", False), None),
    ("## Did the person sit down before the dog came in? A. Yes B. No", "A", ("none", False), None),
    ("## Which way does the camera move between both images? A. to the left B. to the right", "B", ("none", False), None),
    ("### The story runs from first to last. What is its moral?", "Patience pays", ("none", False), None),
    # Places.
    ("## The left image shows twice as many dogs as the right image. True or false?", "True", ("none", False), None),
    ("## Is the cat in the picture on the left asleep?", "Yes", ("none", False), None),
    ("## Does the first show a bus and the second a tram?", "No", ("none", False), None),
    ("## What stands in image one and not in image two? A. a lamp B. a chair", "A", UNSURE, None),
    ("## In which city was the latter taken?", "Rome", ("none", False), None),
    # Particular images.
    ("## Is the dog in image 1 larger than the dog in image 2?", "Yes", ("none", False), ("all", False)),
    ("## How many more windows has the second picture than the first picture?", "3", ("none", False), ("all", False)),
    ("### What is the colour of the car in Image 2? A. red B. blue", "A", ("blocks:1,3", False), ("all", False)),
    ("## Which is true? A. Image 1 is brighter than Image 2. B. Image 2 is brighter than Image 1.", "B",
     ("none", False), ("all", False)),
    ("#### Which pair shows the same place? A. Images 1 and 2 B. Images 1 and 3 C. Images 2 and 4", "C",
     UNSURE, ("all", True)),
    # Answers that stay.
    ("### How many images show a bus?", "2", ("all", False), None),
    ("## How many candles are there in both pictures together?", "11", ("all", False), None),
    ("## Do the images show the same species?", "yes", ("all", False), None),
    ("### What do all pictures have in common? A. snow B. sand C. grass", "C", ("all", False), None),
    ("## Which fruit is in both images?\n(A) pear\n(B) plum", "(B)", ("all", False), None),
    ("## One image shows a closed door while the other shows an open one. Is this true of the two images?",
     "False", ("all", False), None),
    ("## Which animal is in both images?", "a heron", ("all", False), None),
    ("### How many dogs are there in the images altogether? A. 4 B. 5", "A", ("all", False), None),
    ("### In how many of the images is a bus?", "2", ("all", False), None),
    ("## Is it true of the two images that at least one shows a fence?", "True", ("all", False), None),
    ("### Are all images of the same person?", "No", ("all", False), None),
    ("### Does any of the images show a train?", "Yes", ("all", False), None),
    ("## Of the two images, which is darker?", "the first", ("all", True), None),
    ("## Of the two images, which is darker? A. First B. Second", "A", ("all", True), None),
    ("### How many of the images show the animal of sketch 1?", "2", ("first_fixed", False), None),
    ("View A: # View B: # Which view shows the front door?", "View A", ("all", True), None),
    ("#### Which of the last three images shows the same bird as the first image?", "Image 3", ("first_fixed", True), ("first_fixed", True)),
    ("### Which images show the same landmark?\nA. Images 1 and 2\nB. Images 1 and 3\nC. Images 2 and 3", "A", ("all", True), None),
    ("#### Which pair shows the same place? A. Images 1 and 2 B. Images 3 and 4", "A", UNSURE, ("all", True)),
    ("## Which picture is brighter?", "Image 2", ("all", True), None),
    # What counts from 0, and what is labelled out of order.
    ("### Which image has the most people? Answer 0, 1 or 2.", "1", ("all", True), None),
    ("### In which image is nobody smiling? Give the index, counting from 0.", "1", ("all", True), None),
    ("Image 2: # Image 1: # Image 3: # Which image shows a fox?", "Image 1", ("all", True), None),
    ("Query: # Image 1: # Image 2: # Which image shows the same product as the query?", "Image 2", ("first_fixed", True), None),
    # A value for each image.
    ("### For each image in turn, state the number of people.", "3, 1, 2", ("all", True), None),
    ("### Rank the images by size, smallest first: give for each image in turn its rank.", "2, 3, 1", ("all", True), None),
    ("### Rank the images by size.", "2, 3, 1", UNSURE, None),
    ("### For each image in turn, give its rank by number of circles.", "2, 3, 1", ("all", True), None),
    ("### For each image in turn, how many circles does it show?", "2, 3, 1", ("all", True), None),
    ("### Which image shows a cat? Answer 1, 2 or 3.", "2", ("all", True), None),
    ("### Which image shows a cat? Start counting at 2.", "2", ("all", True), None),
    ("### Which image shows a cat? Answer A, B or D.", "B", UNSURE, None),
    ("### Which image shows a cat? Answer 1 or 2.", "2", UNSURE, None),
    ("### For each image, state how many cats it shows.", "2, 0, 1", ("all", True), None),
    ("### State for every image whether it shows a dog.", "yes, no, yes", ("all", True), None),
    # Captions and odd ones.
    ('### Which image matches the caption "a dog on the left of a cat"?', "2", ("all", True), None),
    ("#### Which image is the odd one out?", "3", ("all", True), None),
    ("#### Which two images show the same building?", "1, 3", ("all", True), None),
    ("## Which image has the larger crowd?\nA. Image 1\nB. Image 2\nC. They are the same", "B", ("all", True), ("all", False)),
    ("#, the front view of the solid is ( )\nA. # B. # C. # D. #", "C", ("first_fixed", True), None),
    # Statements of both images alike.
    ("## There are exactly five penguins.", "True", ("all", False), None),
    ("## Is the following statement true? One image shows a cat and the other image shows a dog.", "False", ("all", False), None),
    # By another noun: that image stays.
    ("### Which image shows the same data as chart 1?", "3", ("first_fixed", True), None),
    ("### Which picture matches Fig 1?", "3", ("first_fixed", True), ("all", True)),
    # One image or none.
    ("# How many birds are there?", "4", ("none", False), None),
    ("What is the capital of Peru?", "Lima", ("none", False), None),
    # Where the text leaves it open.
    ("## What is it?", "a lamp", UNSURE, None),
    ("## What relation have the people of both pictures? A. mother and child B. child and mother", "A", UNSURE, None),
    ("### What animal do these photos show?", "a heron", UNSURE, None),
    ("## What do these photos show?", "a boat and a bridge", UNSURE, None),
    ("### Join the letters of all images. Which word is it?", "owl", UNSURE, None),
    ("## Subtract the numbers of both images.", "5", UNSURE, None),
    ("### Which image has the style of the reference?", "B", UNSURE, None),
    ("## What colour is the car in the image?", "red", UNSURE, None),
    ("## Describe both images.", "A dog runs on a beach while a child builds a castle of sand", UNSURE, None),
    ("## Which image is older?", "the one with the carriage", UNSURE, None),
    ("## How do the two images differ?", "a missing button", UNSURE, None),
    ("# This is the floor plan. Which room is it? # #", "B", UNSURE, None),
    ("## What is the total of the numbers in the images?", "2", UNSURE, None),
    ("A cat: # A dog: # Which image shows a pet that barks?", "2", UNSURE, None),
    ("# is a map, # is a photo, # is a sketch. Do they show one place?", "Yes", UNSURE, None),
    ("### The first image is the reference. Which image is most like it?", "B", UNSURE, None),
    ("## What do these photos show? A. a heron B. a stork", "E", UNSURE, None),
    ("# This is the original. Candidates: # # # Which candidate matches?", "2", UNSURE, None),
    ("#### Which images match? A. 1 and 2 B. 3 and 4", "A", UNSURE, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("question", "answer", "wanted", "text"),
    [(q, a, w, "slots") for q, a, w, _ in TABLE]
    + [(q, a, r or w, "references") for q, a, w, r in TABLE],
)
def test_the_table(question: str, answer: str, wanted: tuple, text: Consistency) -> None:
    label = label_by_rules(example(question, answer), text)
    assert (label.kind, label.should_change) == wanted[:2], label.reason
    assert label.sure == (wanted[2:] != ("unsure",)), label.reason


# Questions over images of which the sequence tells the answer, though nothing in the text names one.
MAY_NOT_MOVE = [
    tuple(line.replace(r"\n", "\n").rsplit(" | ", 1))
    for line in Path(__file__).with_name("may_not_move.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("%")
]


@pytest.mark.parametrize("text", MODES)
@pytest.mark.parametrize(("question", "answer"), MAY_NOT_MOVE)
def test_what_the_sequence_may_tell_stays(question: str, answer: str, text: Consistency) -> None:
    label = label_by_rules(example(question, answer), text)
    assert (label.kind, label.should_change) == ("none", False), label.reason


@pytest.mark.parametrize("text", MODES)
def test_labels_hold_in_every_order(text: Consistency) -> None:
    for question, answer, _, _ in TABLE:
        holds_in_every_order(question, answer, text)


def holds_in_every_order(question: str, answer: str, text: Consistency) -> None:
    """The answer goes on naming the same pictures, or stays; where the images stay there is one order."""
    label, asked = labelled(question, answer, text)
    assert label.sure or (label.kind, label.should_change) == ("none", False)
    assert (num_orders(asked) > 1) == (label.kind != "none")
    for order in all_orders(asked, 24, 0):
        variant = permute(asked, order, text)
        if not label.should_change:
            assert variant.answer == answer
        elif label.kind != "ordering":
            back = original_answer(variant, variant.answer)
            assert back is not None and equal(back, answer), (question, order)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Image A: # Image B: #\nIn which image is it raining?", "B"),
        ("Image 1: # Image 2: # Which image has the taller tower?", "Image 2"),
        ("Picture 1 # Picture 2 # Picture 3 # Is picture 2 in colour?", "Yes"),
    ],
)
def test_the_names_of_slots_stay_with_the_slots(question: str, answer: str) -> None:
    assert label_by_rules(example(question, answer), "slots").sure
    _, asked = labelled(question, answer, "references")
    for order in all_orders(asked, 24, 0):
        text = permute(asked, order, "references").messages[0].content
        assert text.split(IMAGE_SLOT)[:-1] == asked.messages[0].content.split(IMAGE_SLOT)[:-1]


def test_a_label_under_which_the_names_of_slots_would_move_does_not_hold() -> None:
    label = Label("all", False, "given")
    for one, two, holds in (("1", "2", True), ("one", "two", False)):
        asked = example(f"Image {one}: # Image {two}: # Do both images show a dog?", "Yes")
        assert checked(asked, label, "references").sure == holds


def test_a_conversation_and_instructions() -> None:
    system = Message("system", "First think, then give the final answer.")
    asked = Message(
        "user",
        f"{IMAGE_SLOT}{IMAGE_SLOT} Which image shows a fox? Answer with the option's letter.",
    )
    images = example("##", "").images
    assert label_by_rules(Example("x", images, (system, asked), "A")).kind == "all"
    turns = (asked, Message("assistant", "A"), Message("user", "Are you sure of both images?"))
    assert not label_by_rules(Example("x", images, turns, "Yes")).sure


ASKED = [question.replace("#", "") for question, *_ in (*TABLE, *MAY_NOT_MOVE)]
ANSWERS = ("A", "B", "C", "2", "Image 2", "the first image", "A, C", "2, 1", "Yes", "red", "a dog")


@given(
    st.sampled_from(["", "#", "##", "###", "####", "A # B #", "A. # B. # C. #", "# A. # B. #"]),
    st.sampled_from(ASKED),
    st.just("") | st.sampled_from(ASKED) | st.text(max_size=8).filter(lambda text: "#" not in text),
    st.one_of(st.sampled_from(ANSWERS), st.text(min_size=1, max_size=8)),
    st.sampled_from(MODES),
)
def test_any_text_gets_a_label_that_holds(
    slots: str, asked: str, more: str, answer: str, text: Consistency
) -> None:
    """Sentences of the table behind other slots and with other answers, which mostly say something else there."""
    holds_in_every_order(f"{slots} {asked}{more}", answer, text)
