"""Small benchmarks laid out as the published ones: a few items each, pictures of 28 pixels."""

import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from perl.evaluation.suites import SUITES
from perl.evaluation.suites.blink import TASKS

RED, GREEN, BLUE, GREY = PICTURES = tuple(
    Image.new("RGB", (28, 28), color) for color in ("red", "green", "blue", "grey")
)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of the published columns; a column that a row lacks is null there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def mantis_choice(images: int) -> dict[str, Any]:
    """An item of Mantis-Eval whose options are its images; B is right."""
    return {
        "id": "me_0",
        "question_type": "multi-choice",
        "question": " and ".join(["<image>"] * images) + " Which one shows three ?",
        "images": list(PICTURES[:images]),
        "options": [f"({letter}) Image {k}" for k, letter in enumerate("ABCD"[:images], start=1)],
        "answer": "B",
        "data_source": "human",
        "category": "retrieval",
    }


def mantis_eval(folder: Path, rows: list[dict[str, Any]] | None = None) -> None:
    short = {
        **mantis_choice(2),
        "id": "me_1",
        "question_type": "short-answer",
        "question": "How many show a four ?",
        "images": [RED, GREEN, BLUE],
        "options": [],
        "answer": "Two",
        "category": "counting",
    }
    path = folder / "mantis_eval" / "test-00000-of-00001.parquet"
    parquet(path, rows or [mantis_choice(2), short])


def blink(folder: Path) -> None:
    for task in TASKS:
        row = {
            "idx": f"val_{task}_1",
            "question": "Which shows three ?",
            "sub_task": task.replace("_", " "),
            "image_1": RED,
            "choices": ["yes", "no"],
            "answer": "(A)",
            "prompt": "Which shows three ?\nSelect from the following choices.\n(A) yes\n(B) no",
        }
        if task == "Visual_Similarity":
            row |= {"image_2": GREEN, "image_3": BLUE}
            row |= {"choices": ["the second image", "the third image"], "answer": "(B)"}
            row["prompt"] = "Which is like it?\n(A) the second image\n(B) the third image"
        parquet(folder / task / "val-00000-of-00001.parquet", [row])


def mmiu(folder: Path) -> None:
    objects, low_level = "High-level-obj-semantic", "Low-level-semantic"
    rows = []
    for task, name in (("forensic_detection_blink", objects), ("spot_the_diff", low_level)):
        paths = [f"./{name}/{task}/{task}_0_{k}.jpg" for k in range(2)]
        for path, picture in zip(paths, PICTURES, strict=False):
            # One archive unpacked in place, the other into a folder of its own name.
            inside = folder / name / path if task == "spot_the_diff" else folder / path
            inside.parent.mkdir(parents=True, exist_ok=True)
            picture.save(inside)
        options = "A: the first image\nB: the second image"
        rows.append(
            {
                "task": task,
                "visual_input_component": "natural image",
                "source": "blink",
                "options": options,
                "question": "Which is most likely to be a real photograph?",
                "context": f"You are a judge.\nSelect from the following choices.\n{options}\n",
                "input_image_path": paths,
                "output": "B",
            }
        )
    for name in SUITES["mmiu"].folders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    parquet(folder / "all.parquet", rows)


def mathvista(folder: Path) -> None:
    common = {"question": "How many ?", "image": "images/1.jpg", "decoded_image": RED, "unit": None}
    hint = "Question: How many ?\nHint: Please answer the question."
    kinds = [("integer", None, "14"), ("float", 1.0, "1.2"), ("list", None, "[1, 2]")]
    rows: list[dict[str, Any]] = [
        {
            **common,
            "pid": str(k),
            "choices": None,
            "precision": precision,
            "answer": answer,
            "question_type": "free_form",
            "answer_type": kind,
            "query": hint,
            "metadata": {"task": "figure question answering"},
        }
        for k, (kind, precision, answer) in enumerate(kinds)
    ]
    choice = {"choices": ["145°", "3/11"], "answer": "145°", "answer_type": "text", "pid": "3"}
    rows.append({**rows[0], **choice, "question_type": "multi_choice"})
    parquet(folder / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", rows)


def mathverse(folder: Path) -> None:
    free = {
        "sample_index": "1",
        "problem_index": "1",
        "problem_version": "Text Dominant",
        "question": "Find L.",
        "image": RED,
        "answer": "14",
        "question_type": "free-form",
        "metadata": {"subject": "Solid Geometry"},
        "query_wo": "Question: Find L.",
        "query_cot": "Please first conduct reasoning.\nQuestion: Find L.",
        "question_for_eval": "Find L.",
    }
    choice = {
        **free,
        "sample_index": "2",
        "problem_version": "Vision Only",
        "question": "",
        "question_type": "multi-choice",
        "question_for_eval": "Find L.\nChoices:\nA:8\nB:2*\\sqrt{3}",
        "answer": "B",
    }
    parquet(folder / "testmini.parquet", [free, choice])


def mathvision(folder: Path, *answers: str) -> None:
    """A free answer and one of five options; with `answers` options that have those as the right ones."""
    free = {
        "id": "4",
        "question": "How many different digits can you find in this picture?\n<image1>",
        "options": [],
        "image": "images/4.jpg",
        "decoded_image": RED,
        "answer": "6.28",
        "solution": None,
        "level": 1,
        "subject": "counting",
    }
    choice = {**free, "id": "15", "options": ["3", "$4$", "5", "6", "7"], "answer": "B"}
    rows = [{**choice, "id": str(k), "answer": answer} for k, answer in enumerate(answers)]
    path = folder / "data" / "test-00000-of-00001-3532b8d3f1b4047a.parquet"
    parquet(path, rows or [free, choice])


def remi(folder: Path) -> None:
    answers = {"EmojiAlgebra": "92", "RefCoco": "1,3", "Clocks": "100", "GeomShape": "50"}
    answers |= {"FuncRead": "f", "IQ": "(a)"}
    rows = [
        {
            "image_1": RED,
            "image_2": GREEN,
            "question": "Compute <image2> by <image1> of three",
            "label": label,
            "task": task,
        }
        for task, label in answers.items()
    ]
    parquet(folder / "test.parquet", rows)


def mv_math(folder: Path) -> None:
    names = [f"batch10_{k}.jpg" for k in range(4)]
    (folder / "images").mkdir(parents=True)
    for name, picture in zip(names, PICTURES, strict=True):
        picture.save(folder / "images" / name)
    options = "\n".join(f"{letter}.\n\n<image_{k}>" for k, letter in enumerate("ABCD", start=1))
    behind = "\n\n".join(f"<image_{k}>\n\n{letter}\n" for k, letter in enumerate("ABCD", start=1))
    steps = "(1) Find A;\n(2) find a."
    rows = [
        ("choice", f"Which can be folded?\n{options}", "C"),
        ("choice", f"Which are complementary? ( )\n\n{behind}", "A"),
        ("single-step", "Find m.\n<image_1>\n<image_2>", "$\\frac{3}{2}$ or $\\frac{15}{2}$."),
        ("multi-step", f"<image_1>\n{steps}", "(1) $(4,2)$ ；（2） $a=\\frac{1}{2}$"),
    ]
    data = [
        {
            "problem_id": k,
            "question": question,
            "input_image": names[: question.count("<image_")],
            "is_multi_img": True,
            "answer": answer,
            "answer_type": kind,
            "subject": "Solid Geometry",
            "analysis": "",
        }
        for k, (kind, question, answer) in enumerate(rows, start=1)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "MV-MATH.json").write_text(json.dumps(data))


MAKERS = (mantis_eval, blink, mmiu, mathvista, mathverse, mathvision, remi, mv_math)


def make_benchmarks(root: Path) -> Path:
    for maker in MAKERS:
        maker(root / maker.__name__)
    return root
