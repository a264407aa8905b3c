"""BLINK: 14 tasks of visual perception, the validation split with its answers, 1901 questions of multiple choice.

Format: the card of BLINK-Benchmark/BLINK on the hub. Prompt (the column of that name, and the disclaimer before three
tasks) and the rule for answers of one option: zeyofu/BLINK_Benchmark, eval/test_benchmark.py. Images stand before the text
as in VLMEvalKit, which the paper used; BLINK's own code sends them after it. Not official: where a reply names several
options or none, that code asks GPT-3.5 which is meant; here more rules do (`option_letter`).
"""

from __future__ import annotations

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import Judgement, Reply, image_kind, judge_option, labelled
from perl.types import Example

TASKS = (
    *("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test"),
    *("Jigsaw", "Multi-view_Reasoning", "Object_Localization", "Relative_Depth"),
    *("Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation"),
    *("Visual_Correspondence", "Visual_Similarity"),
)
_OPTIONS_ARE_IMAGES = ("Art_Style", "Forensic_Detection", "Jigsaw", "Visual_Similarity")
_DISCLAIMED = ("Art_Style", "Forensic_Detection", "Jigsaw")
_DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give "
    "your assessment on this question. You don't need to identify the real people. You just need to analyze based "
    "on the information I gave you.\n\n"
)
_IMAGES = ("image_1", "image_2", "image_3", "image_4")


def _example(item: Item) -> Example:
    images = item.pictures(_IMAGES)
    name = item.text("idx")
    # "val_Art_Style_1" is of the task Art_Style; the column sub_task writes it in several ways.
    task = name.split("_", 1)[-1].rpartition("_")[0]
    choices = item.texts("choices")
    text = item.text("prompt")
    if item.think:
        text = f"{item.text('question')}\n{labelled(choices)}\n{item.think}"
    if task in _DISCLAIMED:
        text = _DISCLAIMER + text
    candidates = task in _OPTIONS_ARE_IMAGES
    kind = image_kind(item.text("question"), choices, len(images)) if candidates else "none"
    return make_example(name, images, text, item.text("answer"), task, kind, options=choices)


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    return judge_option(reply, gold.strip("() \n")[:1], example.extra["options"])


SUITE = Suite(
    name="blink",
    title="BLINK",
    home="https://huggingface.co/datasets/BLINK-Benchmark/BLINK",
    expected=1901,
    files=tuple(f"{task}/val-*.parquet" for task in TASKS),
    example=_example,
    judge=_judge,
)
