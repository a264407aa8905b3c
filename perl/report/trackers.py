"""TensorBoard, wandb, trackio and whatever else accelerate knows: the metrics of a run and some of its rollouts.

A run that goes on is the same run there: `trackers.json` in its folder keeps what wandb and trackio know it by, and
TensorBoard forgets what was written behind the checkpoint.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from perl.config import Config
from perl.files import RunFolder, write_json
from perl.report.gallery import Rows
from perl.types import UserError, one_line

logger = logging.getLogger(__name__)

_PROJECT = re.compile(r"[^/\\#?%:]{1,128}")
"""What wandb takes. TensorBoard makes a folder of it."""
_STRIP_HEIGHT = 224
_GAP = 4


def usable_trackers(config: Config) -> list[Any]:
    """The trackers that are asked for, as accelerate takes them.

    Raises:
        UserError: one that is unknown or not installed, or a project that trackers refuse.
    """
    from accelerate.tracking import filter_trackers

    from perl.distributed import process_state

    process_state()  # The logger that filter_trackers uses needs it.
    usable: list[Any] = []
    for tracker in filter(None, config.run.trackers):
        try:
            found = filter_trackers([tracker], config.run.dir)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UserError(f"run.trackers: {tracker} is unknown ({error})") from error
        if not found:
            raise UserError(
                f"run.trackers: {tracker} is not installed; pip install {tracker} or leave it out"
            )
        usable += found
    project = project_of(config)
    if usable and (not _PROJECT.fullmatch(project) or not project.strip(". ")):
        raise UserError(
            f"run.project = {project!r} cannot be the name of a project: 1 to 128 characters, none of / \\ # ? % :"
        )
    return usable


def project_of(config: Config) -> str:
    """`run.project`, or WANDB_PROJECT, or perl-rl."""
    return config.run.project or os.environ.get("WANDB_PROJECT", "") or "perl-rl"


class Trackers:
    """Those of one run, in its main process; `accelerator` was made with them."""

    def __init__(self, accelerator: Any, config: Config, folder: RunFolder) -> None:
        self.accelerator, self.config, self.folder = accelerator, config, folder
        self._known_as = folder.root / "trackers.json"

    def start(self, again_from: int | None = None) -> None:
        """Begin, or go on with a run whose steps from `again_from` on are written again.

        Raises:
            UserError: a tracker does not start.
        """
        resumed = again_from is not None
        known = self._known() if resumed else {}
        name, group = self._names()
        wandb = known.get("wandb") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        trackio, goes_on = known.get("trackio") or name, "allow" if "trackio" in known else "never"
        shared = {"config": asdict(self.config), "group": group}
        options = {
            "tensorboard": {"purge_step": again_from},
            "wandb": {**shared, "name": name, "id": wandb, "resume": "allow"},
            "trackio": {**shared, "name": trackio, "resume": goes_on},
        }
        try:
            self.accelerator.init_trackers(project_of(self.config), init_kwargs=options)
        except Exception as error:  # Without a network, a login or a right trackers raise anything.
            raise UserError(
                f"run.trackers = {list(self.config.run.trackers)}: one does not start ({one_line(error)}); "
                "log in, work offline (WANDB_MODE=offline), or leave it out"
            ) from error
        if self.accelerator.is_main_process:
            used = {tracker.name for tracker in self.accelerator.trackers}
            ids = {"wandb": wandb, "trackio": trackio}
            if ids := {key: value for key, value in ids.items() if key in used}:
                write_json(self._known_as, ids)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a step, counted over all stages."""
        self._each(lambda tracker: tracker.log(dict(numbers), step=step))

    def show(self, rows: Rows, step: int) -> None:
        """Lines of rollouts.jsonl with all their pictures: a table where there are tables, else strips and texts."""

        def show(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                self._show_strips(tracker.tracker, rows, step)
            elif tracker.name in ("wandb", "trackio"):
                tracker.log({f"{rows[0]['stage']}/rollouts": self._table(tracker.name, rows)}, step)

        if rows:
            self._each(show)

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, use: Callable[[Any], None]) -> None:
        """One that fails, as without its server or on a full disk, is left out from then on: no run ends for it."""
        for tracker in list(self.accelerator.trackers):
            try:
                use(tracker)
            except Exception as error:
                self.accelerator.trackers.remove(tracker)
                logger.warning(
                    "%s fails (%s: %s) and is left out from now on; metrics.jsonl has everything",
                    *(tracker.name, type(error).__name__, one_line(error)),
                )

    def _names(self) -> tuple[str, str | None]:
        """`run.name`, or WANDB_NAME, or the folder's; of a seed with its number, and the name that all seeds share."""
        root = self.folder.root.resolve()
        seed = root.name if re.fullmatch(r"seed-\d+", root.name) else ""
        whole = self.config.run.name or os.environ.get("WANDB_NAME", "")
        whole = whole or (root.parent if seed else root).name
        return (f"{whole}-{seed}", whole) if seed else (whole, None)

    def _known(self) -> dict[str, Any]:
        try:
            found = json.loads(self._known_as.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _table(self, package: str, rows: Rows) -> Any:
        """wandb's and trackio's tables and images are made alike."""
        module = importlib.import_module(package)
        parts = list(rows[0]["rewards"])
        data = [
            [
                *(str(row[key]) for key in _TEXTS),
                [
                    module.Image(str(self.folder.root / name), caption=f"slot {slot}")
                    for slot, name in enumerate(row["images"], 1)
                ],
                row["reward"],
                *(row["rewards"].get(name) for name in parts),
            ]
            for row in rows
        ]
        columns = [*_TEXTS, "images", "reward", *(f"reward/{name}" for name in parts)]
        return module.Table(columns=columns, data=data)

    def _show_strips(self, writer: Any, rows: Rows, step: int) -> None:
        for number, row in enumerate(rows, 1):
            tag = f"{row['stage']}_rollouts/{number:02}"
            if row["images"]:
                strip = _strip([self.folder.root / name for name in row["images"]])
                writer.file_writer.add_summary(_summary(tag, strip), step)
            said = {key: row[key] for key in (*_TEXTS, "reward", "rewards")}
            writer.add_text(tag, "\n\n".join(f"**{k}** {v}" for k, v in said.items()), step)
        writer.flush()


_TEXTS = ("example", "order", "question", "answer", "text")


def _strip(paths: Sequence[Path]) -> Image.Image:
    """Pictures side by side, brought to one height, in their sequence."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    height = min(_STRIP_HEIGHT, max(picture.height for picture in pictures))
    widths = [max(1, round(p.width * height / p.height)) for p in pictures]
    strip = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), height), "white")
    left = 0
    for picture, width in zip(pictures, widths, strict=True):
        strip.paste(picture.resize((width, height)), (left, 0))
        left += width + _GAP
    return strip


def _summary(tag: str, image: Image.Image) -> Any:
    """TensorBoard's record of a picture, as JPEG: `add_image` would write PNG, which of photos is most of a run folder."""
    from tensorboard.compat.proto import summary_pb2

    proto: Any = summary_pb2
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    content = proto.Summary.Image(
        height=image.height, width=image.width, colorspace=3, encoded_image_string=file.getvalue()
    )
    return proto.Summary(value=[proto.Summary.Value(tag=tag, image=content)])
