"""Collections of labelled pictures to make questions over, and the careful opening of images."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from perl.data.rgb import Unfit, black_and_white, to_rgb
from perl.permutation.alike import ENCODED
from perl.types import UserError, one_line

Split = Literal["train", "test"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FILE = "file"
MAX_SIDE = 32_768
MAX_PIXELS = 100_000_000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SIZE = 28
TEST_SHARE = 0.2
_ROOT = "the image root (data.image_root, or --image-root; empty: each data file's folder)"


@dataclass(frozen=True)
class PictureCollection:
    """Pictures by class, split once and for all into train and test.

    `labels` are the classes' words in their order, `ordered_by` says by what: "value" or "name".
    `keys[split][c]` are the keys of the pictures of class c, and `open(key)` gives the picture as
    RGB.
    """

    name: str
    labels: tuple[str, ...]
    ordered_by: str
    keys: dict[str, tuple[tuple[str, ...], ...]]
    open: Callable[[str], Image.Image]


@functools.cache
def load_collection(source: str) -> PictureCollection:
    """The collection `digits` (scikit-learn's 1,797 scanned digits) or `folder:PATH` (one
    sub-folder per class).

    Raises UserError for an unknown source or a folder that does not hold at least two classes of
    two pictures.
    """
    if source == "digits":
        return _digits()
    if source.startswith("folder:") and source != "folder:":
        return _folder(Path(source.removeprefix("folder:")))
    raise UserError(f"unknown picture collection '{source}'; use digits or folder:PATH")


def open_image(
    source: Path | bytes | Image.Image, where: str, *, decode: bool = True
) -> Image.Image:
    """The image as RGB with its EXIF orientation applied; with `decode=False` only its header is
    read and checked. `info[FILE]` has the path of one that was read from a file, `info[ENCODED]` the
    bytes of one that was not and has not been decoded.

    `where` names the place in the data for the UserError raised if the file is missing, broken or
    too large, or has values of which nothing says which is white.
    """
    shown = f"image file {source}" if isinstance(source, Path) else "the embedded image"
    try:
        # Pillow warns of and refuses large images at limits of its own; the check of the header
        # decides here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                _check_header(source)
                return to_rgb(source) if decode else source
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                _check_header(image)
                if not decode:
                    if isinstance(source, bytes):
                        image.info[ENCODED] = source
                    # What Pillow has not decoded has a tile, but for WebP.
                    image.tile = image.tile or [None]  # pyright: ignore
                    return image
                out = to_rgb(image)
        if isinstance(source, Path):
            out.info[FILE] = str(source)
        return out
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no image file {source}; correct the path") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: the image is too large ({error}); shrink it") from error
    except Unfit as error:
        raise UserError(f"{where}: {shown} {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: {shown} is no image that Pillow can read; replace it") from error
    except Exception as error:  # Pillow's decoders raise many types for broken files.
        raise UserError(f"{where}: {shown} is broken ({error}); replace it") from error


def stored_image(value: Any) -> Any:
    """An image as the data holds it, out of the objects that `datasets` and verl put around it."""
    while isinstance(value, dict):
        keys = ("bytes", "image", "video", "path", "url")
        value = next((value[key] for key in keys if value.get(key)), None)
    return value


def open_stored(value: Any, root: Path, where: str, *, decode: bool = True) -> Image.Image:
    """`open_image` of what a row holds: a path inside `root`, a `data:` address, bytes, or a PIL image."""
    image = stored_image(value)
    if isinstance(image, str):
        image = locate(image, root, where)
    elif not isinstance(image, bytes | Image.Image):
        raise UserError(
            f"{where}: an image is a {type(image).__name__}; give a path, "
            "bytes, or an object with bytes or path"
        )
    return open_image(image, where, decode=decode)


def locate(text: str, root: Path, where: str) -> Path | bytes:
    """The file inside `root` that a path of the data names, or the bytes of a `data:` address."""
    if text.startswith("data:"):
        try:
            return base64.b64decode(text.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise UserError(
                f"{where}: broken base64 in a data: image ({error}); replace it"
            ) from error
    if text.startswith(("http://", "https://")):
        raise UserError(
            f"{where}: {one_line(text, 80)} is not fetched; download the image and give its path"
        )
    if "\0" in text:
        raise UserError(f"{where}: the image path holds a NUL character; correct it")
    path = path_inside(text, root)
    if path is None:
        raise UserError(
            f"{where}: image path {one_line(text, 400)} leaves {root}; {_elsewhere(text) or f'move the image there or set {_ROOT}'}"
        )
    if not os.path.exists(path):  # Of bytes in base64 it is a path too long to ask Path for.
        raise UserError(
            f"{where}: there is no image file {one_line(path, 400)}; "
            f"{_elsewhere(text) or f'correct the path or {_ROOT}, which is {root}'}"
        ) from FileNotFoundError(path)
    return path


def _elsewhere(text: str) -> str:
    """What root would find the file that a path of the data names; empty if it is not there either."""
    path = Path(text.removeprefix("file://"))
    if not os.path.isfile(path):
        return ""
    if path.is_absolute():
        return (
            "it is there: set data.image_root, or --image-root, to a folder that all images lie in or below, as in "
            f'"{path.parent}"'
        )
    return 'it is there from the folder where the command runs: set data.image_root = ".", or --image-root .'


def path_inside(text: str, root: Path) -> Path | None:
    """Where a path of the data leads from the folder `root`; None if it leaves it.

    What is written decides, `..` taken at its word. A link inside the folder is followed wherever it leads, as those of
    the hub's cache are: whoever can put it there can put the file there.
    """
    path = os.path.normpath(os.path.join(root, text.removeprefix("file://")))
    if path.startswith(os.path.join(root, "")):
        return Path(path)
    # The same folder by another name.
    real = Path(path).resolve()
    return real if real.is_relative_to(root.resolve()) else None


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise Unfit(f"has no pixels ({width} x {height}); replace or remove it")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise Unfit(
            f"is too large, {width} x {height} pixels; "
            f"at most {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all are read, so shrink it"
        )
    black_and_white(image)


def _digits() -> PictureCollection:
    # Imported here, since scikit-learn takes seconds and only this collection needs it.
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    by_class: list[list[str]] = [[] for _ in DIGITS]
    for index, target in enumerate(data.target):
        by_class[int(target)].append(f"{index:04d}")

    @functools.cache
    def render(key: str) -> Image.Image:
        ink = data.images[int(key)] / 16  # 8 x 8, from 0 (paper) to 1 (ink)
        paper = Image.fromarray((255 - 255 * ink).round().astype("uint8"))
        return paper.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BILINEAR).convert("RGB")

    return PictureCollection("digits", DIGITS, "value", _split_keys(by_class), render)


def _folder(root: Path) -> PictureCollection:
    if not root.is_dir():
        raise UserError(f"picture folder {root} does not exist; correct the path after folder:")
    classes: dict[str, list[str]] = {}
    for folder in sorted(
        path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._"
    ):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        label = "_".join(folder.name.lower().split())
        if label in classes:
            raise UserError(
                f"picture folder {root}: two sub-folders are both the class '{label}'; rename one"
            )
        if len(files) < 2:
            raise UserError(
                f"picture folder {folder} holds {len(files)} images; each class needs two or more, "
                "one to train on and one to test on"
            )
        classes[label] = [f"{folder.name}/{path.name}" for path in files]
    if len(classes) < 2:
        raise UserError(
            f"picture folder {root} has {len(classes)} sub-folders with images; "
            "give each of two or more classes its own"
        )
    keys = _split_keys([classes[label] for label in sorted(classes)])
    return PictureCollection(
        root.name,
        tuple(sorted(classes)),
        "name",
        keys,
        lambda key: open_image(root / key, f"picture folder {root}"),
    )


def _split_keys(by_class: list[list[str]]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """A fifth of each class for the test, at least one, chosen by the hash of the key."""
    train, test = [], []
    for keys in by_class:
        ranked = sorted(keys, key=lambda key: hashlib.blake2b(key.encode()).digest())
        count = max(1, round(TEST_SHARE * len(ranked)))
        test.append(tuple(sorted(ranked[:count])))
        train.append(tuple(sorted(ranked[count:])))
    return {"train": tuple(train), "test": tuple(test)}
