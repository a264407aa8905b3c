"""MMIU: 52 multi-image tasks, 11698 questions of multiple choice, 2 to 32 images each.

Format: the card of FanqingM/MMIU-Benchmark on the hub; all.parquet names pictures as ./FOLDER/TASK/NAME, from seven
archives. Prompt (for 23 tasks the question before the context, else after it) and the closing line: OpenGVLab/MMIU,
VLMEvalKit/test_*.py; the score is the mean over tasks of evaluate_correct.py. Not official: a reply that is more than a
letter is matched to an option by gpt-4o-mini in evaluate.py, here by rules (`option_letter`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from perl.evaluation.suites.base import Item, Suite, make_example
from perl.evaluation.suites.reading import Judgement, Reply, image_kind, judge_option
from perl.permutation import LETTERS
from perl.types import Example

_FOLDERS = (
    *("2D-spatial", "3D-spatial", "Continuous-temporal", "Discrete-temporal"),
    *("High-level-obj-semantic", "High-level-sub-semantic", "Low-level-semantic"),
)
_QUESTION_FIRST = {
    *("person_reid", "multiple_image_captioning", "spot_the_similarity", "face_retrieval"),
    *("sketch2image_retrieval", "handwritten_retrieval", "spot_the_diff", "image2image_retrieval"),
    *("vehicle_retrieval", "text2image_retrieval", "general_action_recognition"),
    *("video_captioning", "next_img_prediction", "temporal_ordering", "meme_vedio_understanding"),
    *("action_quality_assessment", "temporal_localization", "mevis", "ravens_progressive_matrices"),
    *("threed_indoor_recognition", "point_tracking", "threed_cad_recognition"),
    "single_object_tracking",
}
# In these the candidates are a set; the frames of a video, or steps of a recipe, would tell another story.
_CANDIDATES = {
    *("forensic_detection_blink", "forensic_detection_forgerynet", "person_reid", "face_retrieval"),
    *("sketch2image_retrieval", "handwritten_retrieval", "image2image_retrieval"),
    *("vehicle_retrieval", "text2image_retrieval", "next_img_prediction", "visual_cloze"),
}


def _paths(item: Item) -> Sequence[Path]:
    """Where pictures lie, whether an archive was unpacked beside all.parquet or into a folder of its name."""
    paths = [Path(name) for name in item.texts("input_image_path")]
    inside = [item.folder / path.parts[0] / path for path in paths]
    return [p if p.is_file() else item.folder / q for p, q in zip(inside, paths, strict=True)]


def _example(item: Item) -> Example:
    images = tuple(item.picture(path) for path in _paths(item))
    task, question, context = (item.text(c) for c in ("task", "question", "context"))
    first = task in _QUESTION_FIRST
    text = f"{question}\n{context}" if first else f"{context}\n{question}"
    text += (
        f"\n{item.think}" if item.think else "\nPlease answer the option directly like A,B,C,D..."
    )
    options = re.findall(r"^\s*[A-Z]\s*[:.)]\s*(.*?)\s*$", item.text("options"), re.MULTILINE)
    asked = text
    for option in options:
        asked = asked.replace(option, "")
    kind = image_kind(asked, options, len(images)) if task in _CANDIDATES else "none"
    name, answer = f"{task}/{item.index}", item.text("output").strip()
    return make_example(name, images, text, answer, task, kind, options=options)


def _judge(example: Example, gold: str, reply: Reply) -> Judgement:
    options = example.extra["options"]
    right = next((c.upper() for c in gold if c.isalpha()), None)
    return judge_option(reply, right, options, len(options) or len(LETTERS))


SUITE = Suite(
    name="mmiu",
    title="MMIU",
    home="https://huggingface.co/datasets/FanqingM/MMIU-Benchmark (unpack the seven archives)",
    expected=11698,
    files=("all.parquet",),
    folders=_FOLDERS,
    example=_example,
    judge=_judge,
    averaged="tasks",
    picture_files=_paths,
)
