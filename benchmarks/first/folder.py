"""A model folder of the size of Qwen2.5-VL-3B, with random bfloat16 weights: 7.5 GB in a minute.

    python -m benchmarks.first.folder runs/true-size-3b

Its tokenizer knows the words of the bundled tasks, unless `--tokenizer` names a tokenizer.json of Qwen2.5.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.options import Parser, exit_code
from perl.data.tasks import vocabulary
from perl.model.tiny import CHAT_TEMPLATE, make_image_processor, save_processor, tiny_tokenizer
from perl.training.roofline.model import CONFIGS
from perl.types import UserError

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description="Make a model folder of true size with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json of Qwen2.5"
    )

    def run() -> int:
        given = parser.parse_args(arguments)
        if given.tokenizer and not given.tokenizer.is_file():
            raise UserError(f"--tokenizer {given.tokenizer}: there is no such file")
        make(CONFIGS[MODEL], given.folder, given.tokenizer)
        return 0

    return exit_code(run)


def make(sizes: dict[str, Any], folder: Path, file: Path | None = None) -> None:
    """Write the model.

    Args:
        sizes: a config.json of Qwen2.5-VL, without the ids of tokens.
        folder: where it goes.
        file: a tokenizer.json with Qwen's special tokens.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

    tokenizer: Any = tiny_tokenizer("tiny-qwen2.5-vl", vocabulary())
    if file:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(file), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        tokenizer.chat_template = CHAT_TEMPLATE
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    start, end, image, video = tokenizer.convert_tokens_to_ids([f"<|{n}|>" for n in names])
    config = AutoConfig.for_model(
        **sizes,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    # On a GPU in seconds; on a CPU a minute.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_processor(tokenizer, make_image_processor(config.vision_config), folder)


if __name__ == "__main__":
    sys.exit(main())
