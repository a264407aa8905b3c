"""Videos as images: frames evenly spaced over a file, an animated picture, a folder or a list of pictures."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from perl.data.pictures import SUFFIXES, locate, open_image, open_stored, stored_image
from perl.data.rgb import to_rgb
from perl.types import IMAGE_SLOT, UserError, one_line

VIDEO_SLOT = "<video>"
VIDEOS = ("videos", "video")
_SLOT = re.compile(f"{IMAGE_SLOT}|{VIDEO_SLOT}")


@dataclass(frozen=True)
class Frame:
    """The k-th of `count` frames of a video, from 0; the video as the data hold it."""

    video: Any
    k: int
    count: int


def with_frames(
    row: Mapping[str, Any], question: str, frames: int, where: str
) -> Mapping[str, Any]:
    """The row with `frames` images for each of its videos, in the column `images` and in the text.

    Raises:
        UserError: there are videos and `frames` is 0, or not one `<video>` for each.
    """
    key = next((key for key in VIDEOS if row.get(key)), None)
    videos = [] if key is None else _listed(row[key]) if key == "videos" else [row[key]]
    shown: list[Any] = []
    asked = _replaced(row.get(question), frames, shown)
    if not videos and not any(one == VIDEO_SLOT or isinstance(one, Frame) for one in shown):
        return row
    if not frames:
        raise UserError(
            f"{where}: there is a video; leave the row out, or show videos as frames with data.frames = 8"
        )
    images = next((_listed(row[key]) for key in ("images", "image") if row.get(key)), [])
    if not shown:
        shown = [VIDEO_SLOT] * len(videos) + [IMAGE_SLOT] * len(images)
    slots = [shown.count(VIDEO_SLOT), shown.count(IMAGE_SLOT)]
    if slots != [len(videos), len(images)]:
        raise UserError(
            f"{where}: {len(videos)} videos and {len(images)} images but {slots[0]} {VIDEO_SLOT} and "
            f"{slots[1]} {IMAGE_SLOT} slots in the question; write one slot for each"
        )
    of_row = {VIDEO_SLOT: (Frame(v, 0, frames) for v in videos), IMAGE_SLOT: iter(images)}
    media = [next(of_row[one]) if one in (VIDEO_SLOT, IMAGE_SLOT) else one for one in shown]
    everything: list[Any] = []
    for one in media:
        whole = isinstance(one, Frame)
        everything += [Frame(one.video, k, frames) for k in range(frames)] if whole else [one]
    rest = {name: value for name, value in row.items() if name not in (*VIDEOS, "image")}
    return {**rest, question: asked, "images": everything}


def open_frame(frame: Frame, root: Path, where: str, *, decode: bool = True) -> Image.Image:
    """The picture that a frame is, as RGB; without `decode` what tells its size.

    Raises:
        UserError: the video is not there or cannot be read, or what decodes it is not installed.
    """
    video = stored_image(frame.video)
    if isinstance(video, (list, tuple)) and video:
        return open_stored(
            video[_spread(len(video), frame.count)[frame.k]], root, where, decode=decode
        )
    if isinstance(video, str):
        video = locate(video, root, where)
    if not isinstance(video, bytes | Path):
        raise UserError(f"{where}: a video is a {type(video).__name__}; give a path or a list")
    if isinstance(video, Path) and not video.exists():
        raise UserError(f"{where}: there is no video {video}; correct the path")
    if isinstance(video, Path) and video.is_dir():
        files = sorted(path for path in video.iterdir() if path.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{where}: the folder {video} holds no pictures; correct the path")
        chosen = files[_spread(len(files), frame.count)[frame.k]]
        return open_image(chosen, where, decode=decode)
    name = video if isinstance(video, Path) else "the embedded video"
    try:
        changed = video.stat().st_mtime_ns if isinstance(video, Path) else 0
        return _frames(video, changed, frame.count, decode)[frame.k]
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}: no decoder for {name} is installed; pip install av, or give a folder of frames"
        ) from error
    except Exception as error:  # The decoders raise many types for broken files.
        raise UserError(
            f"{where}: {name} cannot be read as a video ({one_line(error, 120)}); replace it"
        ) from error


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _replaced(value: Any, frames: int, shown: list[Any]) -> Any:
    """A text or a chat with its video slots as image slots.

    `shown` collects what the slots show: their own text, or what a part of the chat holds.
    """
    if isinstance(value, str):
        shown += _SLOT.findall(value)
        return value.replace(VIDEO_SLOT, IMAGE_SLOT * frames)
    if isinstance(value, (list, tuple)):
        return [new for part in value for new in _replaced_part(part, frames, shown)]
    if isinstance(value, Mapping):
        return {key: _replaced(held, frames, shown) for key, held in value.items()}
    return value


def _replaced_part(part: Any, frames: int, shown: list[Any]) -> list[Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("video", "image"):
        return [_replaced(part, frames, shown)]
    held = part.get(kind)
    if kind == "image":
        shown.append(IMAGE_SLOT if held is None else held)
        return [{"type": "image"}]
    shown.append(VIDEO_SLOT if held is None else Frame(held, 0, frames))
    return [{"type": "image"}] * frames


def _spread(length: int, count: int) -> list[int]:
    """`count` indices of `length` things, from the first to the last; some come twice where there are fewer."""
    return [k * (length - 1) // max(1, count - 1) for k in range(count)]


class _Header(Image.Image):
    """A frame that is not decoded, as Pillow leaves the images of files whose header alone it has read."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size, self.tile = "RGB", size, [None]


@functools.lru_cache(maxsize=1)  # The frames of a video are asked for one after the other.
def _frames(
    source: Path | bytes, changed: int, count: int, decode: bool
) -> tuple[Image.Image, ...]:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file) as image:
            if not decode:
                return tuple(_Header(image.size) for _ in range(count))
            return tuple(_frame_of(image, i) for i in _spread(getattr(image, "n_frames", 1), count))
    except UnidentifiedImageError:
        return _decoded(source, count, decode)


def _frame_of(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    return to_rgb(image)


def _decoded(source: Path | bytes, count: int, decode: bool) -> tuple[Image.Image, ...]:
    import av  # type: ignore[import-not-found]

    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        if not decode:
            return tuple(_Header((stream.width, stream.height)) for _ in range(count))
        # Containers often do not say how many frames they have; a packet is a frame.
        length = sum(packet.size > 0 for packet in container.demux(stream))
        container.seek(0)
        wanted, out = _spread(length, count), []
        for number, frame in enumerate(container.decode(stream)):
            out += [frame.to_image()] * wanted.count(number)
            if len(out) == count:
                break
    return tuple(out + out[-1:] * (count - len(out)))
