"""The parts of decoding: attention to a span of cached keys, and a step that a CUDA graph may replay."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.decode.counts import Tally
from perl.rollout.decoding import attention, graph, slots
from perl.rollout.decoding.attention import Span
from perl.rollout.decoding.cache import slots_and_rows
from perl.rollout.engine import SamplingParams
from tests.messages import refused
from tests.rollout.test_engine import PROMPTS, SmallPolicy, engine_of, ids_of


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[b, heads, d] queries over the first of the keys [b, T, kv_heads, d], and [b, heads] log-sum-exp."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bhd,bthd->bht", q, k) * scale
    gone = torch.arange(k.shape[1]) >= lengths[:, None, None]
    scores = scores.masked_fill(gone, -torch.inf)
    return torch.einsum("bht,bthd->bhd", scores.softmax(-1), v), scores.logsumexp(-1)


def with_kvcache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor,
    softmax_scale: float,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """flash-attn's: queries [b, 1, heads, d], log-sum-exp [b, heads, 1]."""
    assert return_softmax_lse and q.shape[1] == 1 and cache_seqlens.dtype == torch.int32
    out, lse = dense(q[:, 0], k, v, cache_seqlens, softmax_scale)
    return out[:, None], lse[..., None]


def of_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """PyTorch's: queries [tokens, heads, d], log-sum-exp [heads, tokens], as mha_varlen_fwd gives it."""
    assert cu_q.tolist() == list(range(len(q) + 1)) and max_q == 1
    assert cu_k.tolist() == [max_k * i for i in range(len(q) + 1)] and options["enable_gqa"]
    assert cu_q.dtype == cu_k.dtype == options["seqused_k"].dtype == torch.int32
    k, v = (x.unflatten(0, (len(q), max_k)) for x in (k, v))
    out, lse = dense(q, k, v, options["seqused_k"], options["scale"])
    return out, lse.t()


@pytest.mark.parametrize("name", ["on_cpu", "plain", "flash_attention_2", "varlen"])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 1, 4]])
def test_attention_to_a_span(
    name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two key heads of three queries, keys and values side by side in memory; room for more tokens than there are."""
    from torch.nn.attention import varlen

    flash = SimpleNamespace(flash_attn_with_kvcache=with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(varlen, "varlen_attn", of_varlen)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 3, 8, dtype=torch.float64, generator=draw)
    both = torch.randn(3, 9, 2, 2, 8, dtype=torch.float64, generator=draw)
    span = Span(torch.tensor(lengths, dtype=torch.int32), min(lengths), max(lengths))
    key, value = both.unbind(2)
    out, lse = getattr(attention, name)(query, key, value, span, 0.3)
    expected, of_all = dense(query.flatten(1, 2), key, value, span.lengths, 0.3)
    torch.testing.assert_close(out, expected.view(query.shape), rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, of_all.view(3, 2, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("capability", "dtype", "problem", "takes_spans", "name", "captured"),
    [
        ((8, 0), torch.bfloat16, "", True, "flash_attention_2", True),
        ((9, 0), torch.float16, "none", True, "varlen", True),
        ((9, 0), torch.bfloat16, "none", False, "plain", False),
        ((9, 0), torch.float32, "", True, "plain", False),
        ((7, 5), torch.float16, "", True, "plain", False),
    ],
)
def test_which_kernel_serves(
    capability: tuple[int, int],
    dtype: torch.dtype,
    problem: str,
    takes_spans: bool,
    name: str,
    captured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "flash_attn_problem", lambda: problem)
    monkeypatch.setattr(attention, "varlen_serves", lambda: takes_spans)
    device = torch.device("cuda")
    chosen = attention.choose(device, dtype)
    assert chosen is getattr(attention, name)
    assert slots.may_be_captured(device, chosen) == captured


class Watched(TorchDispatchMode):
    """What an operator reads that none before it has written: where it is in memory. The host reads nothing."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "equal",
        "_to_copy.cpu",
    )

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.read: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function.__name__.split(".")[0] not in self.WAITS, function
        for x in tensors((args, kwargs)):
            if x.untyped_storage().data_ptr() not in self.made:
                self.read.add((x.data_ptr(), x.shape, x.stride(), x.dtype))
        out = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        self.made |= {x.untyped_storage().data_ptr() for x in tensors(out)} - old
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class FakeGraph:
    """Captures nothing: a replay runs the step again and sees that it reads what it read when it was captured."""

    step: Callable[[], Tensor]
    out: Tensor
    read: set[tuple[Any, ...]]

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with Watched() as now:
            out = self.step()
        assert now.read == self.read
        self.out.copy_(out)


class FakeStream:
    waited: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append((self.name, other.name))


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """CUDA graphs where there is no GPU, and a kernel that takes lengths from the device."""
    made: list[FakeGraph] = []

    class Captured(graph.Graphed):
        def _capture(self, step: Callable[[], Tensor]) -> None:
            super()._capture(step)
            assert self.graph is not None and self.out is not None
            made[-1].step, made[-1].out = step, self.out

    @contextmanager
    def capture(fake: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        # Other threads may pin memory meanwhile.
        assert capture_error_mode == "thread_local"
        made.append(fake)
        with Watched() as then:
            yield
        fake.read = then.read

    def lengths_of_the_device(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float) -> Any:
        out, lse = dense(q.flatten(1, 2), k, v, span.lengths, scale)
        return out.view(q.shape), lse.view(q.shape[:3])

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream("main"))
    monkeypatch.setattr(FakeStream, "waited", [])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(slots, "Graphed", Captured)
    monkeypatch.setattr(slots, "choose", lambda *_: lengths_of_the_device)
    monkeypatch.setattr(slots, "may_be_captured", lambda *_: True)
    return made


@pytest.mark.parametrize("tokens", [2**14, 400])
def test_a_captured_step_finds_everything_where_it_was(
    tokens: int, fake_graphs: list[FakeGraph]
) -> None:
    """While slots are filled again; for fewer rows there is another graph."""
    asked = (PROMPTS, SamplingParams(6, 0.7, 30), 1)
    replayed = engine_of(SmallPolicy(), tokens).generate(*asked)
    assert sum(g.replays for g in fake_graphs) > 12
    assert tokens == 400 or len(fake_graphs) > 1
    assert FakeStream.waited == [("side", "main"), ("main", "side")] * len(fake_graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "may_be_captured", lambda *_: False)
        eager = engine_of(SmallPolicy(), tokens).generate(*asked)
    assert ids_of(replayed) == ids_of(eager)


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    fake_graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(slots, "Graphed", graph.Graphed)
    monkeypatch.setattr(graph, "_said", False)
    out = engine_of(SmallPolicy()).generate(PROMPTS, SamplingParams(2, 0.0, 4), 1)
    monkeypatch.setattr(slots, "may_be_captured", lambda *_: False)
    again = engine_of(SmallPolicy()).generate(PROMPTS, SamplingParams(2, 0.0, 4), 1)
    assert ids_of(out) == ids_of(again)
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "decoding without CUDA graphs: operation not permitted"
    ]


def test_nothing_is_read_by_the_host_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, sampling, ending."""
    watched: dict[str, Callable[..., Any]] = {}

    def watch(name: str) -> None:
        watched[name] = getattr(slots.Slots, name)

        def run(self: Any, *args: Any) -> Any:
            with Watched():
                return watched[name](self, *args)

        monkeypatch.setattr(slots.Slots, name, run)

    for name in ("logits", "put"):
        watch(name)
    from perl.rollout import engine

    sample = engine.sample

    def drawn(*args: Any) -> Any:
        with Watched():
            return sample(*args)

    monkeypatch.setattr(engine, "sample", drawn)
    engine_of(SmallPolicy(), 64).generate(PROMPTS, SamplingParams(3, 0.7, 9, 0.9, 5), 1)


def test_stop_texts_are_looked_for_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many slots there are."""
    looks, waits = [], []
    look = slots.Slots.look
    monkeypatch.setattr(slots.Slots, "look", lambda self: looks.append(0) or look(self))
    for stop in ((), ("z",)):
        with Tally() as counted:
            asked = SamplingParams(3, 0.0, 9, stop=stop)
            engine_of(SmallPolicy(), looks=3).generate(PROMPTS, asked, 1)
        waits.append(counted.waits.total())
    assert waits[1] - waits[0] == len(looks) / 2 > 1


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        (10**6, (8, 6)),
        # 100 + 6 * 50 are 400.
        (3199, (7, 6)),
        (400, (1, 6)),
        # Two slots of three.
        (399, (1, 3)),
        (250, (1, 3)),
        (249, (1, 2)),
        (150, (1, 1)),
    ],
)
def test_how_many_go_on_at_a_time(budget: int, found: tuple[int, int]) -> None:
    assert slots_and_rows(budget, 8, 100, 6, 50) == found


def test_a_budget_without_room_for_one() -> None:
    with refused("rollout.kv_cache_tokens", 149, 150, 100, "rollout.max_new_tokens", 50):
        slots_and_rows(149, 8, 100, 6, 50)
