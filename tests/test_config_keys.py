"""Each key of a recipe changes what it should, to the value: a table with a row for every one of them."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from perl.config import INSTRUCTIONS, Config, StageConfig
from perl.data.resample import PAPER
from perl.evaluation import selection
from perl.files import RunFolder
from perl.model import layers
from perl.model.layers import choose_layers
from perl.model.loading import check_kernels, load_policy, load_processor
from perl.model.sources import step_of
from perl.permutation import permute
from perl.recipe import check_config, to_toml
from perl.report.trackers import usable_trackers
from perl.rewards.scorer import rollout_columns
from perl.rollout.collect import Collector, drawn_orders
from perl.rollout.decoding.slots import Slots
from perl.rollout.engine import SamplingParams
from perl.rollout.engines import check_sampling, on_servers
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.rollout.vllm.serve import Launch, launch
from perl.timing import Stopwatch
from perl.training.checks import check_setup
from perl.training.commands import Train
from perl.training.components import Components, model_folder
from perl.training.optimizer import Optimizer
from perl.training.parallel import mesh
from perl.training.reinforce import PolicyStep
from perl.training.session import Session
from perl.types import Group, Message, UserError
from perl_kernels import PolicyLoss
from tests.command_line import json_lines
from tests.messages import tells
from tests.stand_ins import example, processes
from tests.training.two_tokens import (
    Accelerator,
    Letters,
    OwnEngine,
    TwoTokens,
    session_of,
    share_of_b,
    stand_in,
    train_in,
)

HERE = "tests.test_config_keys"
TEMPLATE = """{%- for m in messages -%}{{ m.role | upper }}: {% for p in m.content -%}
{%- if p.type == 'image' %} <|image_pad|>{% else %} {{ p.text }}{% endif -%}
{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""
STAIRS = (0.0, 1.0, 3.0, 5.0)
QUESTION = "A <image> B <image> C <image> Which is darkest?"
CPU = torch.device("cpu")


def ones(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def where_told(completions: list[str], signal: list[int], **_: Any) -> list[float]:
    """Differs within a question whose row has `signal`: 0, 1, 0, 1."""
    return [i % 2 * s for i, s in enumerate(signal)]


def stairs(completions: list[str], **_: Any) -> list[float]:
    """Of each question 0 and 1 in its first order, 3 and 5 in its second."""
    return [STAIRS[i % 4] for i in range(len(completions))]


def slow(completions: list[str], **_: Any) -> list[float]:
    import time

    time.sleep(0.1)
    return share_of_b(completions)


def shuffled(seed: int) -> list[int]:
    """The sequence in which the six rows of a data set come."""
    order = list(range(6))
    random.Random(f"{seed}/0").shuffle(order)
    return order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows of three grey pictures; row 5 has a long question, and one of those of the first step no signal."""
    root = tmp_path_factory.mktemp("keys")
    (root / "lighter").mkdir()
    rows = []
    for k in range(6):
        Image.new("L", (1, 1), k).save(root / f"{k}.png")
        Image.new("L", (1, 1), 100 + k).save(root / "lighter" / f"{k}.png")
        question = QUESTION + " please" * 20 * (k == 5)
        row = {"kind": "all", "id": f"row-{k}", "question": question, "answer": "ABC"[k % 3]}
        row |= {"images": [f"{(k + i) % 6}.png" for i in range(3)], "demonstration": "A B B"}
        rows.append(row | {"signal": int(k != shuffled(1)[0])})
    (root / "template.jinja").write_text(TEMPLATE)
    both = {"prompt": "<image> or <image>?", "reward_model": {"ground_truth": "A"}}
    both |= {
        "kind": "all",
        "question": "A <image> B <image> ?",
        "answer": "B",
        "images": ["0.png", "1.png"],
    }
    mentions = "A <image> B <image> C <image> Is image 1 darker than image 2?"
    asked = {**rows[0], "question": mentions, "answer": "yes", "should_change": False}
    signal = [{**row, "signal": 1} for row in rows]
    both["other"] = "A"
    (root / "cut.png").touch()
    cut = [rows[0], {**rows[0], "images": ["0.png", "cut.png", "1.png"]}]
    film = {**both, "question": "<video> ?", "images": [], "videos": ["lighter"]}
    files = {
        "film": [film],
        "cut": cut,
        "data": rows,
        "both": [both],
        "asked": [asked] * 6,
        "signal": signal,
    }
    for name, lines in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    datasets.Dataset.from_list(rows).to_parquet(root / "data.parquet")
    return root


BASE = {
    **{"run.dir": "runs/recipe", "run.trackers": (), "run.checkpoint_every": 1},
    **{"run.save_rollouts_every": 0, "data.train": "data.jsonl", "data.eval": "data.jsonl"},
    **{"cold_start.batch_size": 2, "rollout.per_order": 2, "train.steps": 2, "train.lr": 0.01},
    **{"reward.functions": (f"{share_of_b.__module__}:share_of_b",), "reward.weights": (1.0,)},
    **{"train.examples_per_step": 2, "train.tokens_per_micro_batch": 600, "eval.examples": 0},
}
"""Keys of every row's recipe: two steps on two groups each."""


class Lab:
    """A config, and what comes of it: each part is made when it is first looked at."""

    root: Path
    model: Path

    def __init__(self, config: Config, number: int) -> None:
        self.config, self.folder = config, self.root / f"run-{number}"

    @cached_property
    def run(self) -> dict[str, list[Any]]:
        """What the parts of a whole run of the policy over two tokens were asked and gave, and `rows` of its metrics."""
        seen: defaultdict[str, list[Any]] = defaultdict(list)
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, seen)
            train_in(self.folder, self.config)
        metrics = self.folder / "metrics.jsonl"
        seen["rows"] = json_lines(metrics) if metrics.exists() else []
        return seen

    def left(self, pattern: str) -> list[Path]:
        """Files and folders that the run left."""
        assert self.run
        return sorted(self.folder.glob(pattern))

    @property
    def groups(self) -> list[Group]:
        """Of the first step, all that were rolled out."""
        return self.run["collected"][0].seen

    @cached_property
    def session(self) -> Session:
        """In its RL stage, which has not begun."""
        session = session_of(self.config, self.folder.with_suffix(".begun"))
        session.enter_stage(session.stages[-1])
        session.begin(session.stage)
        return session

    @cached_property
    def policy(self) -> Any:
        return load_policy(str(self.model), self.config.model, CPU)

    def examples(self, count: int) -> list[Any]:
        """The first of the RL stage's stream."""
        return [drawn.example for drawn in self.session.components.stream().draw(count)]


def watch(patch: pytest.MonkeyPatch, seen: defaultdict[str, list[Any]]) -> None:
    def keep(key: str, owner: Any, name: str, what: Callable[..., Any]) -> None:
        """Of each call what `what` makes of its result and arguments."""
        original = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            seen[key].append(what(out, *args))
            return out

        patch.setattr(owner, name, called)

    keep("optimizer", Optimizer, "__init__", lambda _, optimizer, *__: optimizer)
    keep("limit", torch.nn.utils, "clip_grads_with_norm_", lambda _, __, limit, ___: limit)
    keep("collected", Collector, "collect", lambda collected, *_: collected)
    keep("replay", Collector, "collect", lambda _, collector, *__: collector.replay)
    keep("prompts", OwnEngine, "generate", lambda _, __, prompts, *___: len(prompts))
    keep("params", OwnEngine, "generate", lambda _, __, ___, params, ____: params)
    keep("seed", OwnEngine, "generate", lambda *given: given[-1])
    keep(
        "deterministic",
        OwnEngine,
        "generate",
        lambda *_: torch.are_deterministic_algorithms_enabled(),
    )
    keep("packed", TwoTokens, "pack", lambda batches, _, segments, *__: (batches, segments))
    keep("histogram", selection, "resample", lambda _, __, histogram, *___: list(histogram))


@pytest.fixture(scope="module")
def lab_of(
    folder: Path, tiny_folder: Callable[[str], Path]
) -> Iterator[Callable[[dict[str, Any]], Lab]]:
    """What comes of a recipe with these keys changed; the same one is not run twice."""
    labs: dict[str, Lab] = {}
    Lab.root, Lab.model = folder, tiny_folder("tiny-qwen2.5-vl")

    def of(changes: dict[str, Any]) -> Lab:
        config = Config()
        for key, value in {**BASE, **changes}.items():
            section, name = key.split(".")
            changed = replace(getattr(config, section), **{name: value}) if name else value
            config = replace(config, **{section: changed})
        check_config(config)
        return labs.setdefault(to_toml(config), Lab(config, len(labs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stand_in(patch)
        yield of


def run_folder(lab: Lab) -> list[str]:
    """Where `perl-rl train` begins a run."""
    shutil.rmtree(lab.root / "runs", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perl.training.checks.check_run", lambda _: None)
        patch.setattr("perl.training.commands._go", lambda *_, **__: None)
        patch.setattr(RunFolder, "settle", lambda _: None)
        model = replace(lab.config.model, path=str(lab.model))
        Train(config=replace(lab.config, model=model)).execute()
    return [str(path.relative_to(lab.root)) for path in lab.root.glob("runs/*/config.toml")]


def tracked(lab: Lab) -> tuple[str, str]:
    """The project and the name of a run that begins."""
    lab.session.start_trackers()
    project, options = lab.session.components.accelerator.began
    name = options["wandb"]["name"]
    return project, "the folder's" if name == lab.session.folder.root.name else name


def dtypes(lab: Lab) -> set[torch.dtype]:
    return {parameter.dtype for parameter in lab.policy.parameters()}


def initial_model(lab: Lab) -> str:
    """The model that a run makes for itself, and its seed."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "perl.training.components.make_tiny_model",
            lambda name, words, folder, seed: made.append(f"{name} {seed}"),
        )
        stage, accelerator = lab.session.stage, Accelerator()
        model_folder(lab.config, stage, RunFolder(lab.folder / "new"), accelerator)
    return made[0]


def fillings(lab: Lab) -> int:
    """How often three prompts with two completions each of a token are read."""
    read = []
    processor: Any = load_processor(str(lab.model), lab.config.model)
    parts = Components(
        lab.session.stage,
        RunFolder(lab.root),
        Accelerator(),
        lab.policy,
        processor,
        Stopwatch(),
        "",
    )
    prompts = [processor.encode(permute(e, (0, 1, 2))) for e in lab.examples(3)]
    with pytest.MonkeyPatch.context() as patch:
        fill = Slots.fill
        patch.setattr(
            Slots, "fill", lambda self, slots, jobs: read.append(jobs) or fill(self, slots, jobs)
        )
        parts.engine.generate(prompts, SamplingParams(2, 1.0, 1), 0)
    return len(read)


def visual_tokens(side: int) -> Callable[[Lab], int]:
    """Of a square picture of so many pixels a side; a token stands for 28 x 28 pixels."""

    def look(lab: Lab) -> int:
        processor = load_processor(str(lab.model), lab.config.model)
        example = replace(lab.examples(1)[0], images=(Image.new("RGB", (side, side)),) * 3)
        return processor.encode(permute(example, (0, 1, 2))).images[0].tokens

    return look


def attention(lab: Lab) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return check_kernels(lab.config.model, CPU)[0]


def lora(lab: Lab) -> tuple[set[int], set[float]]:
    """Ranks and scales of the adapters."""
    modules = [m for m in lab.policy.modules() if hasattr(m, "lora_A")]
    return {m.lora_A["default"].weight.shape[0] for m in modules}, {
        m.scaling["default"] for m in modules
    }


def adapted(lab: Lab) -> set[str]:
    """Names of the layers that have adapters."""
    return {n.rpartition(".")[2] for n, m in lab.policy.named_modules() if hasattr(m, "lora_A")}


def dropout(lab: Lab) -> set[float]:
    return {
        getattr(m.lora_dropout["default"], "p", 0.0)
        for m in lab.policy.modules()
        if hasattr(m, "lora_A")
    }


def noisy(lab: Lab) -> int:
    """How many of the first ten demonstrations are trained on as they are."""
    from perl.training.cold_start import _segment

    texts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Letters, "encode_completion", lambda _, text, __: texts.append(text) or np.zeros(1, int)
        )
        examples = lab.examples(10)
        for example in examples:
            _segment(lab.session, example)
    return sum(t == e.demonstration for t, e in zip(texts, examples, strict=True))


def loss_of(lab: Lab) -> PolicyLoss:
    return PolicyStep(lab.session).loss


def axis(name: str) -> Callable[[Lab], Any]:
    """Of the loss."""
    return lambda lab: getattr(loss_of(lab), name)


def drawn_for_replay(lab: Lab) -> list[int]:
    """Of two groups, one with three times the other's advantages, which one each of twenty seeds draws."""
    from perl.rollout.replay import Replay

    replay = Replay(lab.config.filter)
    replay.buffer = [SimpleNamespace(priority=p, key=k, orders=()) for k, p in ((0, 1.0), (1, 3.0))]  # type: ignore[misc]
    found: list[Any] = []
    for seed in range(20):
        replay.draw(1, seed, lambda key, _: found.append(key) or [])
    return found


def by_chance(p: float) -> list[int]:
    """What twenty seeds draw of two where the second has the probability p."""
    return [
        int(np.random.default_rng(seed).choice(2, 1, replace=False, p=[1 - p, p])[0])
        for seed in range(20)
    ]


def filtered(lab: Lab, name: str) -> list[dict[str, Any]]:
    return json_lines(lab.left(f"filtered/sift{name}.jsonl")[0])


def or_refusal(look: Callable[[Lab], Any]) -> Callable[[Lab], Any]:
    """What is seen, or the key that the refusal names."""

    def refused(lab: Lab) -> Any:
        try:
            return look(lab)
        except UserError as error:
            return error

    return refused


@dataclass(frozen=True)
class Row:
    """A key: what is looked at, what it is without and with this value of the key, and keys that hold in both."""

    key: str
    value: Any
    look: Callable[[Lab], Any]
    before: Any
    after: Any
    given: dict[str, Any] = field(default_factory=dict)


def of(stage: str, name: str) -> Callable[[Lab], list[Any]]:
    """A column of metrics.jsonl."""
    return lambda lab: [row[name] for row in lab.run["rows"] if row["stage"] == stage]


def each(key: str, look: Callable[[Any], Any] = lambda found: found) -> Callable[[Lab], list[Any]]:
    """Of all that was seen of a part of the run."""
    return lambda lab: [look(found) for found in lab.run[key]]


def last(key: str, look: Callable[[Any], Any]) -> Callable[[Lab], Any]:
    return lambda lab: look(lab.run[key][-1])


def checkpoints(lab: Lab) -> list[int]:
    """Steps that were saved."""
    return [step_of(path) for path in lab.left("checkpoints/step-*")]


def pushed(lab: Lab) -> list[str]:
    """The repositories that somebody has to be logged in for."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perl.training.checks.check_push", lambda repo: asked.append(repo))
        model = replace(lab.config.model, path=str(lab.model))
        check_setup(replace(lab.config, model=model))
    return [repo for repo in asked if repo]


def sampler(look: Callable[[VLLMEngine], Any]) -> Callable[[Lab], Any]:
    """What would ask servers."""

    def seen(lab: Lab) -> Any:
        processor = lab.session.components.processor
        engine = on_servers(lab.config.rollout, lab.policy, processor, processes())
        return look(engine) if engine else []

    return seen


def sampling_is_checked(lab: Lab) -> str:
    check_sampling(lab.config)
    return "fine"


servers = sampler(lambda engine: [*engine.servers])


def launched(look: Callable[[Launch], Any]) -> Callable[[Lab], Any]:
    """How a server would be started: with GPUs where one is named."""

    def seen(lab: Lab) -> Any:
        cuda = bool(lab.config.rollout.devices)
        return look(launch(lab.config, str(lab.model), "float32", "files", cuda))

    return seen


def argument(flag: str) -> Callable[[Launch], str]:
    """What stands behind a flag."""
    return lambda launched: launched.command[launched.command.index(flag) + 1]


def served(lab: Lab) -> list[str]:
    return [server.url for server in servers(lab)]


def of_server(look: Callable[[Server], Any]) -> Callable[[Lab], Any]:
    return lambda lab: look(servers(lab)[0])


def compiled(lab: Lab) -> tuple[bool, bool]:
    with pytest.MonkeyPatch.context() as patch:  # Its import takes seconds.
        patch.setattr(torch, "compile", lambda forward, **_: forward)
        layer = lab.policy.core.language_model.layers[0]
    return lab.policy.compiled, "forward" in vars(layer)


def checkpointed(lab: Lab) -> list[bool]:
    """Of each decoder layer."""
    return [layer.gradient_checkpointing for layer in lab.policy.core.language_model.layers]


def on_a_gpu(lab: Lab) -> str:
    """What makes the decoder layers faster where liger-kernel and a compiler are."""
    model = lab.config.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_compiler", lambda *_: True)
        patch.setattr(layers.importlib.util, "find_spec", lambda name: name)
        *_, said = choose_layers(model.liger, model.compile, torch.device("cuda"))
    return said.partition(" (")[0]


def sharing(lab: Lab) -> str:
    """How often prompts stand in the rows that the model reads."""
    batches, segments = lab.run["packed"][0]
    lengths = [(len(s.prompt.input_ids), [len(c) for c in s.completions]) for s in segments]
    once = sum(prompt + sum(own) for prompt, own in lengths)
    each = sum(prompt * len(own) + sum(own) for prompt, own in lengths)
    return {once: "once", each: "for each completion"}[sum(b.num_tokens for b in batches)]


def kept(lab: Lab) -> list[int]:
    return sorted({row["step"] for row in json_lines(lab.left("rollouts.jsonl")[0])})


def sources(lab: Lab) -> set[str]:
    return {example.id.partition("-")[0] for example in lab.examples(40)}


def counts(lab: Lab) -> tuple[int, int]:
    """Fewest and most images of a question."""
    found = [len(example.images) for example in lab.examples(60)]
    return min(found), max(found)


def held_out(lab: Lab) -> list[str]:
    data = lab.session.components.held_out()
    return [data[i].id for i in range(len(data))]


def one_order(lab: Lab) -> bool:
    """Whether all questions have the second order that the paper's code draws for three images."""
    return {group.variants[1].order for group in lab.groups} == {(1, 0, 2)}


def asked(lab: Lab) -> str:
    """What is asked of a rollout of row 0, as its rewards read it."""
    rollouts = [r for c in lab.run["collected"] for g in c.seen for r in g.rollouts]
    (row, *_) = [r for r in rollouts if r.variant.example.id != "row-5"]
    return rollout_columns([row])[0][0]


def rendered(lab: Lab) -> str:
    return load_processor(str(lab.model), lab.config.model).render([Message("user", "Which ?")])


def escaped(lab: Lab) -> str:
    processor = load_processor(str(lab.model), lab.config.model)
    components = replace(lab.session.components, processor=processor)
    one = example("q", 0, question="<image> <|im_end|> ?")
    return components.encoder.encode([permute(one, (0,))])[0][0].messages[0].content


def images_of(lab: Lab) -> int:
    return lab.examples(1)[0].images[0].getpixel((0, 0))[0]


def mentions_follow(lab: Lab) -> bool:
    """Whether "Is image 1 darker than image 2?" goes on naming the same pictures."""
    variants = [v for group in lab.groups for v in group.variants]
    asked = [v.messages[0].content.rpartition(">")[2] for v in variants]
    places = [(v.order.index(0) + 1, v.order.index(1) + 1) for v in variants]
    return asked == [f" Is image {one} darker than image {two}?" for one, two in places]


BUNDLED = {"data.train": "bundled:digits"}
ONES = {"reward.functions": (f"{HERE}:ones",)}
TOLD = {"reward.functions": (f"{HERE}:where_told",)}
UP = {"reward.functions": (f"{HERE}:stairs",)}
GPU = {"rollout.vllm": "true", "rollout.devices": "5"}
SERVER = {"rollout.url": ("http://127.0.0.1:1",)}
VLLM = {**SERVER, "rollout.engine": "vllm"}
SLOW = {"reward.functions": (f"{HERE}:slow",), "train.steps": 1, "train.examples_per_step": 1}
# Half of them are right, all of them are.
TRUNCATED = {"loss.correction": "token_truncate"}
TWO = {"reward.functions": (f"{HERE}:where_told", f"{HERE}:ones"), "reward.weights": (1.0, 0.0)}
HALF = {**TWO, "reward.group_weight_of": "where_told", "data.train": "signal.jsonl"}
BAND = {**TWO, "filter.measure": "where_told", "data.train": "signal.jsonl"}
WARM = {"cold_start.steps": 4, "cold_start.lr": 1.0, "cold_start.warmup_steps": 0}
WARM |= {"cold_start.schedule": "constant"}
ALL = {"train.examples_per_step": 6, "filter.max_tries": 1}
MEASURED = {"eval.examples": 3}
SIFT = {"stages.": (StageConfig(name="sift", kind="filter"), StageConfig(name="rl", kind="rl"))}
SIFT |= {"resample.histogram": "uniform", "resample.size": 1}
FSDP = {"train.sharding": "fsdp"}
MIB = 2**20
TINY = {**BUNDLED, "model.path": "tiny-qwen2.5-vl"}

variants = each("collected", lambda c: len(c.seen[0].variants))
dropped = each("collected", lambda c: c.dropped)
too_hard = each("collected", lambda c: c.counts["too_hard"])
too_easy = each("collected", lambda c: c.counts["too_easy"])


def advantages(lab: Lab) -> list[float]:
    return lab.groups[0].advantages.tolist()


def setting(name: str) -> Callable[[Lab], Any]:
    """Of AdamW, for its weights of two dimensions."""
    return last("optimizer", lambda optimizer: optimizer.adamw.param_groups[0][name])


def z_scores(*rewards: float) -> list[float]:
    mean, n = sum(rewards) / len(rewards), len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1))
    return [(r - mean) / std for r in rewards]


def sharded(processes: int, look: Callable[[Any], Any]) -> Callable[[Lab], Any]:
    """How so many processes spread the weights; the mesh is its shape."""

    def made(lab: Lab) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh, "init_device_mesh", lambda _, shape, mesh_dim_names: shape)
            patch.delenv("LOCAL_WORLD_SIZE", raising=False)
            model = replace(lab.config.model, path=str(lab.model))
            return look(mesh.make_sharding(replace(lab.config, model=model), CPU, processes))

    return made


ROWS = [
    Row("run.dir", "runs/other", run_folder, ["runs/recipe/config.toml"], ["runs/other/config.toml"]),
    # Each step, try and process has a seed: (run.seed * 1,000,003 + step) * filter.max_tries + try.
    Row("run.seed", 7, lambda lab: lab.run["seed"][0], 0, 7 * 1_000_003 * 4),
    Row("run.seed", 7, lambda lab: [e.id for e in lab.examples(6)],
        [f"row-{k}" for k in shuffled(1)], [f"row-{k}" for k in shuffled(15)]),
    Row("run.seed", 7, initial_model, "tiny-qwen2.5-vl 0", "tiny-qwen2.5-vl 7", TINY),
    Row("run.seed", 7, lambda lab: drawn_orders(
        lab.session.components.collector.stage, example("q", 10, 20, 30, 40), 1.0, 0)[1],
        (3, 1, 2, 0), (0, 1, 3, 2), {"permutation.orders": 2}),
    Row("run.seeds", (3, 5), lambda lab: [p.name for p in lab.left("seed-*")], [], ["seed-3", "seed-5"]),
    Row("run.deterministic", True, lambda lab: set(lab.run["deterministic"]), {False}, {True}),
    Row("run.log_every", 2, of("rl", "step"), [1, 2], [2]),
    Row("run.checkpoint_every", 2, checkpoints, [1, 2], [2], {"run.keep_checkpoints": 9}),
    Row("run.checkpoint_every", 0, checkpoints, [1, 2], [2], {"run.keep_checkpoints": 9}),
    Row("run.keep_checkpoints", 1, lambda lab: len(lab.left("checkpoints/*")), 2, 1),
    Row("run.keep_best", "greedy_reward", lambda lab: len(lab.left("checkpoints/best")), 0, 1, {**MEASURED, "eval.every": 1}),
    Row("run.push_to_hub", "me/mine", pushed, [], ["me/mine"]),
    Row("run.save_rollouts_every", 1, kept, [1], [1, 2], {"run.save_rollouts_every": 2}),
    Row("run.trackers", ("tensorboard",), lambda lab: list(map(str, usable_trackers(lab.config))),
        [], ["tensorboard"]),
    Row("run.project", "team", lambda lab: tracked(lab)[0], "perl-rl", "team"),
    Row("run.name", "first", lambda lab: tracked(lab)[1], "the folder's", "first"),

    Row("model.path", "tiny-qwen3-vl", initial_model, "tiny-qwen2.5-vl 0", "tiny-qwen3-vl 0", TINY),
    Row("model.chat_template", "template.jinja", lambda lab: rendered(lab)[:6], "<|im_s", "USER: "),
    Row("model.dtype", "bfloat16", dtypes, {torch.float32}, {torch.bfloat16}, {"model.dtype": "float32"}),
    Row("model.attention", "flex", attention, "sdpa", "flex"),
    Row("model.freeze_vision", True, lambda lab: lab.policy.vision.trained, True, False),
    Row("model.lora_rank", 4, lora, (set(), set()), ({4}, {8.0})),
    Row("model.lora_alpha", 8.0, lora, ({4}, {8.0}), ({4}, {2.0}), {"model.lora_rank": 4}),
    Row("model.lora_targets", ("v_proj", "up_proj"), adapted,
        {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}, {"v_proj", "up_proj"},
        {"model.lora_rank": 4}),
    Row("model.lora_dropout", 0.25, dropout, {0.0}, {0.25}, {"model.lora_rank": 4}),
    Row("model.gradient_checkpointing", 0.5, checkpointed, [False] * 4, [False, True, False, True]),
    Row("model.feature_cache_mb", 5, lambda lab: lab.policy.vision.cache_bytes, 1024 * MIB, 5 * MIB),
    Row("model.compile", True, compiled, (False, False), (True, True)),
    Row("model.compile", False, on_a_gpu, "compiled", "transformers' own", {"model.liger": False}),
    Row("model.liger", True, or_refusal(attention), "sdpa", "model.liger"),
    Row("model.liger", False, on_a_gpu, "Liger's kernels", "compiled"),
    Row("model.min_pixels", 56 * 56, visual_tokens(28), 1, 4),
    Row("model.max_pixels", 56 * 56, visual_tokens(112), 16, 4),

    Row("data.train", "bundled:digits", sources, {"row"}, {"digits"}),
    Row("data.eval", "bundled:digits", held_out, ["row-0", "row-1"],
        [f"digits-test-which-{k:06d}" for k in range(2)], {"eval.examples": 2}),
    Row("data.columns", "perl", lambda lab: lab.examples(1)[0].answer, "A", "B", {"data.train": "both.jsonl"}),
    Row("data.map", ("answer=other",), lambda lab: lab.examples(1)[0].answer, "B", "A",
        {"data.train": "both.jsonl", "data.columns": "perl"}),
    Row("data.frames", 2, or_refusal(lambda lab: [i.getpixel((0, 0))[0] for i in lab.examples(1)[0].images]),
        "data.frames", [100, 105], {"data.train": "film.jsonl", "data.columns": "perl"}),
    Row("data.image_root", "lighter", images_of, shuffled(1)[0], 100 + shuffled(1)[0]),
    Row("data.mix", ("bundled:digits*3",), sources, {"row"}, {"row", "digits"}),
    Row("data.tasks", ("odd",), lambda lab: lab.examples(1)[0].task, "which", "odd", BUNDLED),
    Row("data.min_images", 3, counts, (2, 4), (3, 4), BUNDLED),
    Row("data.max_images", 3, counts, (2, 4), (2, 3), BUNDLED),
    Row("data.first_slot", 1.0, lambda lab: {e.answer for e in lab.examples(40)}, set("ABCD"), {"A"}, BUNDLED),
    Row("data.instruction", "box", asked, QUESTION, f"{QUESTION}\n{INSTRUCTIONS['box']}"),
    Row("data.instruction_in", "system", asked, f"{QUESTION}\nAnswer briefly.", f"Answer briefly.\n{QUESTION}",
        {"data.instruction": "Answer briefly."}),
    Row("data.system", "Look closely.", asked, QUESTION, f"Look closely.\n{QUESTION}"),
    Row("data.streaming", True, lambda lab: type(lab.session.components.stream()).__name__, "ExampleStream",
        "StreamedExamples", {"data.train": "data.parquet"}),
    Row("data.on_error", "skip", or_refusal(lambda lab: [e.id for e in lab.examples(2)]), "cut.png", ["row-0", "row-0"],
        {"data.train": "cut.jsonl"}),
    Row("data.workers", 2, lambda lab: [a and a.workers for a in [lab.session.components.read_ahead()]], [None], [2]),
    Row("data.max_prompt_tokens", 10, dropped, [0, 0], [1, 1], {"data.overlong": "drop", **ALL}),
    Row("data.overlong", "drop", or_refusal(dropped), "data.max_prompt_tokens = 10", [1, 1],
        {"data.max_prompt_tokens": 10, **ALL}),
    Row("data.control_tokens", "escape", or_refusal(escaped), "<|im_end|>", "<image> < |im_end|> ?"),

    Row("cold_start.steps", 3, of("cold_start", "step"), [], [1, 2, 3]),
    Row("cold_start.batch_size", 4, of("cold_start", "tokens"), [6] * 4, [12] * 4, WARM),
    Row("cold_start.lr", 0.5, of("cold_start", "lr"), [1.0] * 4, [0.5] * 4, WARM),
    Row("cold_start.warmup_steps", 2, of("cold_start", "lr"), [1.0] * 4, [0.5, 1.0, 1.0, 1.0], WARM),
    Row("cold_start.schedule", "linear", of("cold_start", "lr"), [1.0] * 4, [1.0, 0.75, 0.5, 0.25], WARM),
    Row("cold_start.noise", 1.0, noisy, 10, 0, BUNDLED),

    Row("permutation.orders", 4, variants, [2, 2], [4, 4]),
    Row("permutation.text", "references", or_refusal(mentions_follow), "permutation.text", True,
        {"data.train": "asked.jsonl"}),
    Row("permutation.rate", 0.0, variants, [2, 2], [1, 1]),
    Row("permutation.rate_schedule", "linear", each("collected", lambda c: c.rate), [1.0, 1.0], [1.0, 0.5]),
    Row("permutation.draw", "released", one_order, False, True, ALL),
    Row("permutation.condition", "original", each("packed", lambda p: len(p[1])), [4, 4], [2, 2]),

    Row("rollout.engine", "vllm", served, [], ["http://127.0.0.1:1"], SERVER),
    Row("rollout.url", ("http://127.0.0.1:1", "http://127.0.0.1:2"), served, ["http://127.0.0.1:1"],
        ["http://127.0.0.1:1", "http://127.0.0.1:2"], VLLM),
    Row("rollout.vllm", "true", or_refusal(launched(lambda l: Path(l.command[0]).name)), "rollout.vllm", "true"),
    Row("rollout.gpu_memory", 0.4, launched(argument("--gpu-memory-utilization")), "0.85", "0.4", GPU),
    Row("rollout.devices", "6,7", launched(lambda l: l.environment["CUDA_VISIBLE_DEVICES"]), "5", "6,7", GPU),
    Row("rollout.serve_args", ("--seed", "7"), launched(lambda l: [*l.command][-1]), "--enforce-eager", "7", {"rollout.vllm": "true"}),
    Row("rollout.requests", 3, of_server(lambda s: s.requests), 256, 3, VLLM),
    Row("rollout.timeout", 5.0, of_server(lambda s: s.timeout), 600.0, 5.0, VLLM),
    Row("rollout.per_order", 3, last("params", lambda p: p.n), 2, 3),
    Row("rollout.temperature", 0.5, last("params", lambda p: p.temperature), 1.0, 0.5),
    Row("rollout.temperature", 0.5, lambda lab: lab.session.components.head.temperature, 1.0, 0.5),
    Row("rollout.top_p", 0.9, last("params", lambda p: p.top_p), 1.0, 0.9),
    Row("rollout.top_k", 20, last("params", lambda p: p.top_k), 0, 20),
    Row("rollout.stop", ("</answer>",), last("params", lambda p: p.stop), (), ("</answer>",)),
    Row("rollout.max_new_tokens", 64, last("params", lambda p: p.max_new_tokens), 512, 64),
    Row("rollout.max_new_tokens", 64, lambda lab: loss_of(lab).max_completion_length, 512, 64,
        {"loss.preset": "dr_grpo"}),
    Row("rollout.kv_cache_tokens", 40, fillings, 1, 3),
    Row("rollout.placement", "colocated", sampler(lambda e: e.sleeps), False, True, VLLM),
    Row("rollout.transfer", "ipc", or_refusal(sampler(lambda e: type(e.transfer).__name__)), "FileTransfer",
        "rollout.transfer", VLLM),
    Row("rollout.ahead", 1, sampler(lambda e: e.keeps), False, True, VLLM),
    Row("rollout.surplus", 0.5, or_refusal(sampling_is_checked), "fine", "rollout.surplus"),
    Row("rollout.tolerance", 0.5, sampler(lambda e: e.probe.tolerance), 1e-4, 0.5, VLLM),

    Row("reward.functions", ("format",), lambda lab: set(lab.groups[0].reward_parts), {"share_of_b"}, {"format"}),
    Row("reward.weights", (2.0,), lambda lab: lab.groups[0].rewards.tolist(),
        [0.0, 1.0, 3.0, 5.0], [0.0, 2.0, 6.0, 10.0], UP),
    Row("reward.timeout", 0.02, or_refusal(each("collected", lambda c: len(c.groups))), [1], "reward.timeout", SLOW),
    # Half of a group's rollouts are right: z-scores of 0, 1, 0, 1 times the weight.
    Row("reward.group_weight", "exp", advantages, z_scores(0, 1, 0, 1),
        [math.exp(0.5) * z for z in z_scores(0, 1, 0, 1)], HALF),
    Row("reward.group_weight_of", "ones", advantages, [math.exp(0.5) * z for z in z_scores(0, 1, 0, 1)],
        z_scores(0, 1, 0, 1), {**HALF, "reward.group_weight": "exp"}),
    Row("reward.group_weight_power", 2.0, advantages, [0.55 * z for z in z_scores(0, 1, 0, 1)],
        [0.55**2 * z for z in z_scores(0, 1, 0, 1)], {**HALF, "reward.group_weight": "power"}),

    Row("filter.zero_variance", False, each("collected", lambda c: (c.tries, len(c.groups))),
        [(4, 0)] * 2, [(1, 2)] * 2, ONES),
    Row("filter.max_tries", 3, each("collected", lambda c: c.tries), [4, 4], [3, 3], ONES),
    Row("filter.min_accuracy", 0.6, too_hard, [0, 0], [8, 8], BAND),
    Row("filter.max_accuracy", 0.4, too_easy, [0, 0], [8, 8], BAND),
    Row("filter.measure", "ones", too_hard, [8, 8], [0, 0], {**BAND, "filter.min_accuracy": 0.6}),
    Row("filter.reuse_overflow", True, of("rl", "groups/reused"), [0, 0], [0, 1], TOLD),
    Row("filter.replay", 1, of("rl", "groups/replayed"), [0, 0], [0, 1]),
    Row("filter.replay_size", 3, last("replay", lambda r: len(r.buffer)), 4, 3, {"filter.replay": 1}),
    Row("filter.replay_power", 0.0, drawn_for_replay, by_chance(0.75), by_chance(0.5), {"filter.replay": 1}),

    Row("advantage.over", "order", advantages, z_scores(*STAIRS), z_scores(0, 1) + z_scores(3, 5), UP),
    Row("advantage.over", "order+group", advantages, z_scores(*STAIRS),
        [a + b for a, b in zip(z_scores(*STAIRS), z_scores(0, 1) + z_scores(3, 5), strict=True)], UP),
    Row("advantage.scale", "batch", advantages, z_scores(*STAIRS), z_scores(*STAIRS, *STAIRS)[:4], UP),
    Row("advantage.scale", "none", advantages, z_scores(*STAIRS), [-2.25, -1.25, 0.75, 2.75], UP),
    Row("advantage.baseline", "leave_one_out", advantages, [-2.25, -1.25, 0.75, 2.75],
        [-3.0, -5 / 3, 1.0, 11 / 3], UP | {"advantage.scale": "none"}),

    Row("loss.preset", "dapo", loss_of, PolicyLoss.preset("perl"), PolicyLoss.preset("dapo")),
    Row("loss.surrogate", "reinforce", axis("surrogate"), "clip", "reinforce", {"loss.dual_clip": 0.0}),
    Row("loss.ratio", "sequence", axis("ratio"), "token", "sequence"),
    Row("loss.clip_low", 0.1, axis("clip_low"), 0.2, 0.1),
    Row("loss.clip_high", 0.4, axis("clip_high"), 0.2, 0.4),
    Row("loss.dual_clip", 0.0, axis("dual_clip"), 3.0, None),
    Row("loss.delta", 4.0, axis("delta"), None, 4.0, {"loss.preset": "dapo"}),
    Row("loss.sapo_tau_pos", 2.0, axis("sapo_tau_pos"), 1.0, 2.0),
    Row("loss.sapo_tau_neg", 2.0, axis("sapo_tau_neg"), 1.05, 2.0),
    Row("loss.vespo_k_pos", 1.0, axis("vespo_k_pos"), 2.0, 1.0),
    Row("loss.vespo_lambda_pos", 1.0, axis("vespo_lambda_pos"), 3.0, 1.0),
    Row("loss.vespo_k_neg", 1.0, axis("vespo_k_neg"), 3.0, 1.0),
    Row("loss.vespo_lambda_neg", 1.0, axis("vespo_lambda_neg"), 2.0, 1.0),
    Row("loss.dppo_ratio_cap", 9.0, axis("dppo_ratio_cap"), 20.0, 9.0),
    Row("loss.kl", "k1+", axis("kl"), "k3", "k1+"),
    Row("loss.kl_coef", 0.5, axis("kl_coef"), 0.01, 0.5),
    Row("loss.kl_bias_correction", True, axis("kl_bias_correction"), False, True),
    Row("loss.entropy_coef", 0.25, axis("entropy_coef"), 0.0, 0.25),
    Row("loss.aggregation", "seq-mean-token-mean", axis("aggregation"), "token-mean", "seq-mean-token-mean"),
    Row("loss.max_completion_length", 9, axis("max_completion_length"), 512, 9, {"loss.preset": "dr_grpo"}),
    Row("loss.correction", "token_mask", of("rl", "correction_mean"), [1.0] * 2, [0.0] * 2,
        {"loss.correction_low": 1.5}),
    Row("loss.correction_low", 1.5, of("rl", "correction_mean"), [1.0] * 2, [1.5] * 2, TRUNCATED),
    Row("loss.correction_high", 0.5, of("rl", "correction_mean"), [1.0] * 2, [0.5] * 2, TRUNCATED),

    Row("resample.rollouts", 4, lambda lab: {r["rollouts"] for r in filtered(lab, ".accuracies")}, {10}, {4}, SIFT),
    Row("resample.orders", 2, lambda lab: lab.run["prompts"][0], 6, 12, SIFT),
    Row("resample.examples", 3, lambda lab: len(filtered(lab, ".accuracies")), 6, 3, SIFT),
    Row("resample.histogram", "paper", lambda lab: lab.run["histogram"][0],
        [1 / 11] * 11, [share / sum(PAPER) for share in PAPER], SIFT),
    Row("resample.size", 2, lambda lab: len(filtered(lab, "")), 1, 2, SIFT),

    Row("train.steps", 3, of("rl", "step"), [1, 2], [1, 2, 3]),
    Row("train.epochs", 0.5, of("rl", "step"), [], [1, 2], {"train.steps": 0}),
    Row("train.examples_per_step", 4, of("rl", "groups/seen"), [2, 2], [4, 4]),
    Row("train.updates_per_batch", 2, last("optimizer", lambda o: o.updates), 2, 4),
    Row("train.tokens_per_micro_batch", 20, each("packed", lambda p: len(p[0])), [1, 1], [4, 4],
        {"rollout.max_new_tokens": 3}),
    Row("train.share_prompts", False, sharing, "once", "for each completion"),
    Row("train.lr", 0.5, of("rl", "lr"), [0.01] * 2, [0.5] * 2),
    Row("train.schedule", "linear", of("rl", "lr"), [0.01] * 2, [0.01, 0.005]),
    Row("train.warmup_steps", 2, of("rl", "lr"), [0.01] * 2, [0.005, 0.01]),
    Row("train.optimizer", "adamw_8bit", or_refusal(last("optimizer", lambda o: type(o.adamw).__name__)), "AdamW",
        "AdamW8bit" if importlib.util.find_spec("torchao") else "train.optimizer"),
    Row("train.weight_decay", 0.5, setting("weight_decay"), 0.01, 0.5),
    Row("train.betas", (0.5, 0.75), setting("betas"), (0.9, 0.999), (0.5, 0.75)),
    Row("train.max_grad_norm", 0.125, each("limit"), [1.0] * 2, [0.125] * 2),
    Row("train.max_grad_norm", 0.0, each("limit"), [1.0] * 2, [math.inf] * 2),
    Row("train.sharding", "fsdp", sharded(4, lambda s: s and s.mesh), None, (4,)),
    Row("train.shards", 2, sharded(4, lambda s: s.mesh), (4,), (2, 2), FSDP),
    Row("train.reshard_after_forward", False, sharded(2, lambda s: s.reshard_after_forward), True, False, FSDP),
    Row("train.reduce_dtype", "bfloat16", sharded(2, lambda s: s.reduce_dtype), torch.float32, torch.bfloat16, FSDP),
    Row("train.shard_vision", True, sharded(2, lambda s: s.vision), False, True, FSDP),
    Row("train.cpu_offload", True, or_refusal(sharded(2, lambda s: s.cpu_offload)), False, "train.cpu_offload", FSDP),

    Row("eval.examples", 3, of("evaluate", "examples"), [], [3, 3]),
    Row("eval.max_orders", 4, of("evaluate", "orders"), [6.0] * 2, [4.0] * 2, MEASURED),
    Row("eval.samples", 3, lambda lab: [(p.n, p.temperature) for p in lab.run["params"][:2]],
        [(1, 1.0), (1, 0.0)], [(3, 1.0), (1, 0.0)], MEASURED),
    Row("eval.every", 1, of("evaluate", "at"), ["before", "after"], ["before", "step", "after"], MEASURED),
    Row("eval.patience", 1, of("rl", "step"), [1, 2], [1],
        {**MEASURED, **ONES, "eval.every": 1, "run.keep_best": "greedy_reward"}),
]  # fmt: skip


def test_every_key_has_a_row() -> None:
    config = Config()
    sections = [f.name for f in fields(config) if f.name != "stages"]
    keys = [f"{s}.{f.name}" for s in sections for f in fields(getattr(config, s))]
    rows = list(dict.fromkeys(row.key for row in ROWS))
    assert not {*keys} - {*rows}, "add a Row to ROWS for each: what does the key change?"
    assert rows == keys, "rows stand in the sequence of the fields"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.key}={row.value}")
def test_each_key_changes_what_it_should(row: Row, lab_of: Callable[[dict[str, Any]], Lab]) -> None:
    for given, seen in ((row.given, row.before), (row.given | {row.key: row.value}, row.after)):
        found = row.look(lab_of(given))
        if isinstance(found, UserError):
            tells(found, seen)
        else:
            numbers = isinstance(seen, list) and all(isinstance(value, float) for value in seen)
            assert found == (pytest.approx(seen, rel=1e-5) if numbers else seen)
