"""A run of a policy over two tokens, whose every number can be worked out by hand: all but the model is the run's own."""

from __future__ import annotations

import json
import threading
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from perl.config import Config, ModelConfig
from perl.distributed import StopSignal
from perl.files import RunFolder
from perl.model.loading import compute_dtype
from perl.model.packed.pack import pack
from perl.model.sources import TENSORS, checkpoints_in
from perl.recipe import load_recipe
from perl.report.progress import Display
from perl.rollout.engine import Completion, SamplingParams
from perl.timing import Stopwatch
from perl.training.components import Components
from perl.training.parallel.balancing import ModelFlops
from perl.training.roofline.model import ModelFacts, Weights
from perl.training.session import Session
from perl.training.train import train
from perl.types import EncodedImage, EncodedPrompt, Example, Message, PackedBatch, Segment, Variant


class TwoTokens(nn.Module):
    """A policy that writes tokens 0 and 1, whatever it has read: logits = `head_weight` [2, 1] * `gain` [1].

    With gain 1 the gradient of -log p(y) is p - onehot(y) in the two weights of the head. Takes as many tokens as logits.
    """

    shares_prompts, compiled, sharding, device = True, False, None, torch.device("cpu")

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(torch.tensor(logits or (0.0, 0.0))[:, None])
        self.gain = nn.Parameter(torch.ones(1))
        # Every pass counts as an image.
        self.vision = SimpleNamespace(trained=False, encode=None, images_encoded=0, cleared=0)
        self.vision.encoded = Counter()
        self.vision.clear_cache = self._clear

    def _clear(self) -> None:
        self.vision.cleared += 1

    def forward(self, batch: PackedBatch, features: Any = None) -> torch.Tensor:
        self.vision.images_encoded += 1
        return self.gain.expand(batch.num_scored, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    def logprobs(self) -> torch.Tensor:
        """float32 [2]: of each token."""
        return (self.head_weight[:, 0] * self.gain).log_softmax(0).detach()

    def pack(self, segments: Sequence[Segment], budget: int, share: bool) -> list[PackedBatch]:
        return pack(segments, budget, share)

    def without_adapters(self) -> AbstractContextManager[None]:
        return nullcontext()

    def share_tower(self, other: TwoTokens) -> None:
        self.vision = other.vision

    def save_pretrained(
        self, folder: Path, dtype: torch.dtype | None = None, writes: bool = True
    ) -> None:
        if writes:
            weights = {n: p.detach().clone() for n, p in self.named_parameters()}
            save_file(weights, folder / "weights")

    @classmethod
    def load(
        cls,
        path: str,
        config: ModelConfig,
        device: torch.device,
        sharding: Any = None,
        trained: bool = True,
    ) -> TwoTokens:
        """Takes the place of `perl.model.loading.load_policy`: from a folder it was saved to, or new."""
        policy = cls().to(compute_dtype(config.dtype, device))
        if Path(path).exists():
            policy.load_state_dict(load_file(Path(path) / "weights"))
        return policy.requires_grad_(trained)


class OwnEngine:
    """Samples one to three tokens from such a policy; the most likely one at temperature 0."""

    asked: ClassVar[list[tuple[int, SamplingParams, int]]] = []
    """Of all engines: the seed, the parameters and how many prompts."""

    def __init__(self, policy: TwoTokens) -> None:
        self.policy = policy

    def serving(self, version: int) -> AbstractContextManager[None]:
        return nullcontext()

    def counts(self) -> dict[str, float]:
        return {}

    def begin(self, prompts: Any, params: SamplingParams, seed: int) -> Any:
        yield from enumerate(self.generate(prompts, params, seed))

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        self.asked.append((seed, params, len(prompts)))
        rng, logprobs = np.random.default_rng(seed), self.policy.logprobs().double().numpy()
        out = []
        for _ in range(len(prompts) * params.n):
            p = np.exp(logprobs)
            ids = rng.choice(len(p), rng.integers(1, 4), p=p / p.sum())
            if params.temperature == 0:
                ids = logprobs.argmax(keepdims=True)
            out.append(Completion(ids, logprobs[ids].astype(np.float32), finished=True))
        return [out[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]


class Letters:
    """A processor of tokens 0, 1, ... that are the letters A, B, ...; a prompt is as long as its question, and a picture
    adds one token."""

    pad_token_id = eos_token_id = image_token_id = -1
    encoder = None

    def encode(self, variant: Variant) -> EncodedPrompt:
        shown = tuple(EncodedImage(str(i), torch.zeros(1, 1), (1, 1, 1), 1) for i in variant.order)
        words = sum(len(m.content.split()) for m in variant.messages)
        ids = np.array([0] * (words - len(shown)) + [-1] * len(shown))
        return EncodedPrompt(ids, np.arange(words)[None], words, shown, -1)

    def unknown_words(self, messages: Sequence[Message]) -> list[str]:
        """It reads no words: an instruction is not for it."""
        return [m.content for m in messages]

    def encode_completion(self, text: str, where: str = "") -> np.ndarray:
        return np.array(["AB".index(word) for word in text.split()])

    def decode(self, ids: Sequence[int]) -> str:
        return f"\\boxed{{{' '.join('AB'[i] for i in ids)}}}"

    def unsampled_token_ids(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.long)

    demands = ""

    def check_texts(self, example: Example) -> None: ...

    check_shapes = check_texts

    def save(self, folder: Path) -> None:
        (folder / "letters").touch()


class Together:
    """The processes of one run, as threads: what torch and accelerate do between processes happens between them."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.here, self.barrier = count, threading.local(), threading.Barrier(count)
        self.lists: list[list[Any]] = [[] for _ in range(count)]
        self.policies: dict[int, TwoTokens] = {}
        self.stops: dict[int, StopSignal] = {}
        self.sent: defaultdict[tuple[int, int], Queue[Any]] = defaultdict(Queue)
        for name in ("all_reduce", "send_object_list", "recv_object_list"):
            monkeypatch.setattr(torch.distributed, name, getattr(self, name))
        # Processes share no object either.
        monkeypatch.setattr("accelerate.utils.gather_object", lambda x: deepcopy(self.gather(x)))

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each process returns, or the error that ends it."""
        out: list[Any] = [None] * self.count

        def thread(index: int) -> None:
            self.here.index = index
            try:
                out[index] = work(index)
            except BaseException as error:
                out[index] = error

        threads = [
            threading.Thread(target=thread, args=(i,), daemon=True) for i in range(self.count)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert not any(each.is_alive() for each in threads), "a process waits for ever"
        return out

    def stop(self) -> AbstractContextManager[StopSignal]:
        """Takes the place of `StopSignal`, which the main thread alone can install."""
        self.stops[self.here.index] = StopSignal()
        return nullcontext(self.stops[self.here.index])

    def gather(self, items: list[Any]) -> list[Any]:
        self.lists[self.here.index] = items
        self.barrier.wait(20)
        out = [item for own in self.lists for item in own]
        self.barrier.wait(20)
        return out

    def all_reduce(self, tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        every = torch.stack(self.gather([tensor.detach().clone()]))
        largest = op == torch.distributed.ReduceOp.MAX
        tensor.copy_(every.amax(0) if largest else every.sum(0))

    def send_object_list(self, objects: list[Any], target: int) -> None:
        self.sent[self.here.index, target].put(objects[0])

    def recv_object_list(self, box: list[Any], source: int) -> None:
        box[0] = self.sent[source, self.here.index].get(timeout=20)


class Accelerator:
    """accelerate's, as far as a run asks it, and its one tracker, which keeps what is logged."""

    name = "itself"
    device = torch.device("cpu")

    def __init__(self, together: Together | None = None) -> None:
        self.together = together
        self.num_processes = together.count if together else 1
        self.process_index = together.here.index if together else 0
        self.is_main_process = self.process_index == 0
        self.logged: list[tuple[dict[str, float], int]] = []
        self.trackers: list[Any] = []

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        assert self.together and reduction == "sum"
        self.together.all_reduce(values)
        return values

    def wait_for_everyone(self) -> None:
        if self.together:
            self.together.gather([])

    def init_trackers(self, project: str, init_kwargs: dict[str, Any]) -> None:
        self.began = project, init_kwargs
        self.trackers = [self]

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((numbers, step))

    def finish(self) -> None: ...


class Parts(Components):
    """The components of a run whose policy has two tokens; all else is the run's own."""

    together: ClassVar[Together | None] = None

    @classmethod
    def build(cls, config: Any, stage: Any, folder: Any) -> Parts:
        """Takes the place of `perl.training.components.build`."""
        accelerator = Accelerator(cls.together)
        policy: Any = TwoTokens.load("new", config.model, accelerator.device)
        processor: Any = Letters()
        if cls.together:
            cls.together.policies[accelerator.process_index] = policy
        return cls(stage, folder, accelerator, policy, processor, Stopwatch(), "initial")

    @cached_property
    def engine(self) -> Any:
        return OwnEngine(self.policy)  # type: ignore[arg-type]


def segment(
    completions: Sequence[Sequence[int]], advantages: Sequence[float], group: int = 0
) -> Segment:
    """A prompt of two tokens with these completions."""
    prompt = EncodedPrompt(np.zeros(2, int), np.arange(2)[None], 2, (), -1)
    return Segment(prompt, tuple(map(np.array, completions)), tuple(advantages), group)


def share_of_b(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward: how much of a completion is the letter B."""
    return [c.count("B") / (c.count("A") + c.count("B")) for c in completions]


RECIPE = {
    "run": {"trackers": [], "checkpoint_every": 1, "save_rollouts_every": 0},
    "model": {"path": "two-tokens"},
    "cold_start": {"steps": 0, "batch_size": 2},
    "permutation": {"orders": 2},
    "rollout": {"per_order": 2, "max_new_tokens": 4},
    "filter": {"zero_variance": False, "measure": "share_of_b"},
    "reward": {"functions": ["tests.training.two_tokens:share_of_b"], "weights": [1.0]},
    "train": {"steps": 2, "examples_per_step": 2, "lr": 0.01, "tokens_per_micro_batch": 600},
    "eval": {"examples": 0},
}


def config_of(folder: Path, more: str = "") -> Config:
    """A recipe over `data.jsonl`, six rows of two pictures in the folder, with these keys changed; `more.jsonl` has more."""
    rows = []
    for k in range(6):
        Image.new("L", (1, 1), k).save(folder / f"{k}.png")
        row = {"kind": "all", "id": f"row-{k}", "question": "A <image> B <image> Which is darker?"}
        row |= {"images": [f"{k}.png", f"{(k + 1) % 6}.png"], "answer": "AB"[k % 2]}
        rows.append(json.dumps(row | {"demonstration": "A B B"}) + "\n")
    for name in ("data.jsonl", "more.jsonl"):
        (folder / name).write_text("".join(rows).replace("row", name))
    values = {"data": {name: str(folder / "data.jsonl") for name in ("train", "eval")}, **RECIPE}
    for section, own in tomllib.loads(more).items():
        values[section] = values.get(section, {}) | own if isinstance(own, dict) else own
    (folder / "recipe.toml").write_text(tomli_w.dumps(values))
    return load_recipe(str(folder / "recipe.toml"))


SIZES: dict[str, Any] = {
    **{"layers": 1, "hidden": 1, "intermediate": 1, "heads": 1, "kv_heads": 1, "head_dim": 1},
    **{"vocab": 2, "weights": 3, "trained": 3, "trained_layers": 4, "tensors": 2, "features": 1},
    **{"tower": 4, "tower_trained_weights": 1, "head_trained": True, "tower_depth": 2},
    **{"tower_hidden": 3, "tower_intermediate": 1, "tower_spans": (0, 5), "patch": 1},
    **{
        "patches_per_token": 2,
        "itemsize": 4,
        "patch_values": 3,
        "tower_gated": False,
        "adapters_alone": False,
    },
    **dict.fromkeys(("in_layers", "around", "in_tower", "layer"), Weights.of(())),
}
FACTS = ModelFacts(ModelFlops(token=10.0, pair=0.0, scored=5.0, visual=20.0), **SIZES)
"""Sizes that a run of two tokens is taken to have."""


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """For the model of every run."""
    patch.setattr("perl.training.session.build", Parts.build)
    patch.setattr("perl.training.reinforce.load_policy", TwoTokens.load)
    patch.setattr("perl.training.accounting.facts_of", lambda *_: FACTS)
    patch.setattr("perl.evaluation.selection._draw", lambda *_: None)
    patch.setattr(OwnEngine, "asked", [])


def session_of(config: Config, root: Path) -> Session:
    """A session that begins in a new run folder."""
    folder = RunFolder(root)
    folder.create(overwrite=False)
    folder.make_parts()
    session = Session(config, folder, Display(enabled=False), StopSignal())
    session.start_trackers()
    return session


def train_in(root: Path, config: Config, resume: bool = False) -> dict[str, Any]:
    """The summary of a run, or of what is left of it."""
    if not resume:
        RunFolder(root).create(overwrite=False)
    return train(config, RunFolder(root), Display(enabled=False), resume)


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint that one process saved."""
    (file,) = (checkpoint / TENSORS).iterdir()
    return load_file(file)


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors_in(checkpoint).items() if "/" not in name}


def saved(root: Path) -> list[tuple[str, int]]:
    """The stage and the step of each checkpoint."""
    manifests = [
        json.loads((p / "manifest.json").read_text()) for p in checkpoints_in(root / "checkpoints")
    ]
    return [(m["progress"]["stage"], m["progress"]["step"]) for m in manifests]
