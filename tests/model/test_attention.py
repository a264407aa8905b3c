"""Attention over packed rows, on bare tensors: what a dense mask gives, and nothing of a neighbour."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.attention import varlen as torch_varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from perl.model.packed import flash
from perl.model.packed.attention import IMPLEMENTATIONS, attention_function, use_packed_attention
from perl.model.packed.flash import flash_attn_problem
from perl.model.packed.flex import block_mask, run_compiled
from perl.model.packed.gather import gather_rows
from perl.model.packed.layout import PackedLayout
from perl.training.components import deterministic
from tests.messages import refused

DIM = 8

Segments = Sequence[tuple[int, Sequence[int]]]
"""The length of each prompt, and those of its completions."""

ROWS: dict[str, Segments] = {
    "one piece": [(4, [3])],
    "one piece of one token": [(1, [])],
    "even pieces": [(3, [2]), (4, [1]), (1, [4])],
    "no prefix": [(3, [4]), (1, [1]), (2, [9])],
    "several completions": [(5, [3, 2, 7]), (4, [1]), (6, [2, 2])],
    "one-token completions": [(3, [1, 1, 1]), (2, [1, 4])],
    "prompts of one token": [(1, [2, 3]), (1, [1, 1])],
    "completions of no token": [(3, [0, 2, 0]), (2, [0]), (4, [2, 0, 1])],
    # Tokens of the second and third block see the last one of the first, and only that.
    "more than a block": [(127, []), (150, [20, 60]), (40, [30, 1])],
}


def packed(segments: Segments, device: str = "cpu") -> tuple[PackedLayout, Tensor]:
    """The layout of a row and which tokens see which, bool [T, T], written down token by token."""
    starts, prefixes, owners = [0], [], []
    for number, (prompt, completions) in enumerate(segments):
        begin = starts[-1]
        owners += [(number, 0)] * prompt
        lengths = [n for n in completions if n]
        starts.append(begin + prompt + sum(lengths[:1]))
        prefixes.append((0, 0))
        for n in lengths[1:]:
            starts.append(starts[-1] + n)
            prefixes.append((begin, prompt))
        for which, n in enumerate(lengths, 1):
            owners += [(number, which)] * n
    layout = PackedLayout(
        torch.tensor(starts), *torch.tensor(prefixes).T, device=torch.device(device)
    )
    sees = [
        [
            key <= query and owner[0] == other[0] and other[1] in (0, owner[1])
            for key, other in enumerate(owners)
        ]
        for query, owner in enumerate(owners)
    ]
    return layout, torch.tensor(sees, device=device)


def inputs(
    tokens: int, groups: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu", dim=DIM
) -> list[Tensor]:
    heads = (4, 4 // groups, 4 // groups)
    return [
        torch.randn(1, h, tokens, dim, dtype=torch.float64).to(device, dtype).requires_grad_()
        for h in heads
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attend(name: str, qkv: Sequence[Tensor], scale: float | None = 0.4, **how: Any) -> Tensor:
    module = nn.Module()
    module.is_causal = "packed_layout" in how
    out, weights = attention_function(name)(module, *qkv, None, scaling=scale, **how)
    assert weights is None
    return out


def with_gradients(out: Tensor, qkv: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream)]


def check(
    run: Callable[[Sequence[Tensor]], Tensor], qkv: list[Tensor], sees: Tensor, scale: float = 0.4
) -> None:
    """Output and gradients are those of a dense mask."""
    upstream = torch.randn(1, len(sees), 4, DIM, dtype=torch.float64)
    got = with_gradients(run(qkv), qkv, upstream)
    want = with_gradients(dense(*qkv, sees, scale), qkv, upstream)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def check_row(name: str, segments: Segments, groups: int) -> None:
    layout, sees = packed(segments)
    check(lambda x: attend(name, x, packed_layout=layout), inputs(layout.tokens, groups), sees)


def check_poison(
    run: Callable[[Sequence[Tensor]], Tensor], qkv: list[Tensor], layout, sees
) -> None:
    """Change one piece after the other: outputs differ where its tokens are seen, and nowhere else."""
    with torch.no_grad():
        before = run(qkv)
        for start, length in zip(layout.starts, layout.lengths, strict=False):
            changed = slice(start, start + length)
            poisoned = [x.clone() for x in qkv]
            for x in poisoned:
                x[:, :, changed] += 5 * torch.randn_like(x[:, :, changed])
            differs = (run(poisoned) != before).flatten(2).any(2)[0]
            assert torch.equal(differs, sees[:, changed].any(1))


# Stand-ins for the flash kernels, which a CPU does not have: their parameters, their meaning, and any dtype.


def segment_by_segment(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """[T, h, d], [K, kv, d] -> [T, h, d]; causal: the last query of a segment sees its last key."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    outputs = []
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    for q_s, k_s, v_s in zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True
    ):
        sees = torch.ones(len(q_s), len(k_s), dtype=torch.bool)
        if causal:
            sees = sees.tril(len(k_s) - len(q_s))
        batched = (x.transpose(0, 1)[None] for x in (q_s, k_s, v_s))
        outputs.append(dense(*batched, sees, scale or q.shape[2] ** -0.5)[0])
    return torch.cat(outputs)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    deterministic=False,
):
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert dropout_p == 0
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return segment_by_segment(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size in ((-1, -1), (-1, 0))
    return segment_by_segment(query, key, value, cu_seq_q, cu_seq_k, window_size[1] == 0, scale)


def varlen_attn_of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


@pytest.fixture(params=["sdpa", "flex", "flash_attention_2", "varlen", "varlen of torch 2.11"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation that runs on this CPU, by a stand-in where it must."""
    monkeypatch.setattr(flash, "_flash_attn_kernel", lambda: flash_attn_varlen_func)
    old = request.param.endswith("2.11")
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn_of_2_11 if old else varlen_attn)
    return request.param.split()[0]


REAL_VARLEN = torch_varlen.varlen_attn


def test_stand_ins_have_the_parameters_of_the_kernels() -> None:
    pairs = [(varlen_attn, REAL_VARLEN)]
    if not flash_attn_problem():
        import flash_attn  # pyright: ignore[reportMissingImports]

        pairs.append((flash_attn_varlen_func, flash_attn.flash_attn_varlen_func))
    for stand_in, kernel in pairs:
        real = inspect.signature(kernel).parameters
        for parameter in inspect.signature(stand_in).parameters.values():
            if parameter.name == "enable_gqa" and "enable_gqa" not in real:
                continue
            assert parameter.kind == real[parameter.name].kind
            assert parameter.default == real[parameter.name].default


@pytest.mark.parametrize("wanted", [False, True])
def test_flash_attn_is_told_to_be_deterministic(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in compares what it is told with PyTorch's switch."""
    monkeypatch.setattr(flash, "_flash_attn_kernel", lambda: flash_attn_varlen_func)
    with deterministic(wanted):
        assert torch.are_deterministic_algorithms_enabled() == wanted
        check_row("flash_attention_2", ROWS["several completions"], 2)


@pytest.mark.parametrize("row", ROWS)
def test_values_and_gradients_are_those_of_a_dense_mask(name: str, row: str) -> None:
    for groups in (1, 2, 4):
        check_row(name, ROWS[row], groups)


SEGMENTS = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=80)
@given(st.sampled_from(["sdpa", "sdpa", "sdpa", "flex"]), SEGMENTS, st.sampled_from([1, 2, 4]))
def test_any_row(name: str, segments: Segments, groups: int) -> None:
    check_row(name, segments, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ["even pieces", "several completions"])
def test_nobody_sees_a_neighbour(name: str, row: str, dtype: torch.dtype) -> None:
    layout, sees = packed(ROWS[row])
    qkv = inputs(layout.tokens, dtype=dtype)
    check_poison(lambda qkv: attend(name, qkv, packed_layout=layout), qkv, layout, sees)


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 1, 7, 0, 2]], ids=str)
def test_segments_of_a_vision_tower(name: str, lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    sees = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    qkv = inputs(sum(lengths), groups=1)
    how = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max(lengths)}
    # A scale that is not given is 1 / sqrt(d).
    check(lambda x: attend(name, x, None, **how), qkv, sees, DIM**-0.5)
    layout = PackedLayout.from_cu_seqlens(cu_seqlens)
    check_poison(lambda qkv: attend(name, qkv, **how), qkv, layout, sees)


@pytest.mark.parametrize(
    ("segments", "shapes"),
    [
        ([(100, []), (100, [])], [(2, 100, 100)]),
        ([(128, []), (1, [])], [(2, 128, 128)]),
        ([(96, []), (129, [])], [(2, 129, 129)]),
        ([(95, []), (129, [])], [(1, 129, 129), (1, 95, 95)]),
        ([(80, []), (129, []), (100, [])], [(2, 129, 129), (1, 80, 80)]),
        ([(512, []), (384, [])], [(2, 512, 512)]),
        ([(512, []), (383, [])], [(1, 512, 512), (1, 383, 383)]),
        ([(513, []), (480, [])], [(2, 513, 513)]),
        ([(513, []), (479, [])], [(1, 513, 513), (1, 479, 479)]),
        # With a prefix apart from without, by the keys: 60 and 9 or 8 of their own.
        ([(60, [2, 9, 8]), (70, [1])], [(2, 71, 71), (2, 9, 69)]),
        ([(127, [1, 30, 4, 1]), (127, [1])], [(2, 128, 128), (3, 30, 157)]),
    ],
    ids=str,
)
def test_sequences_of_like_length_share_a_call_of_sdpa(
    segments: Segments, shapes: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding costs up to 16/9 of a call from 128 keys on, 256/225 from 512 on. Without a prefix SDPA masks itself."""
    called = []
    real = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        called.append((q.shape[0], q.shape[2], k.shape[2]))
        assert (how["attn_mask"] is None) == how["is_causal"] == (q.shape[2] == k.shape[2])
        return real(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    layout, _ = packed(segments)
    attend("sdpa", [torch.ones(1, 1, layout.tokens, 1)] * 3, packed_layout=layout)
    assert called == shapes


def test_a_batch_with_a_mask_is_transformers_own(name: str) -> None:
    qkv = [x[..., :3, :].repeat(2, 1, 1, 1) for x in inputs(4, groups=1)]
    mask = (
        torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()[:, None, None] & torch.ones(3, 3).tril().bool()
    )
    mask[0, 0, 0, 0] = True
    out, _ = attention_function(name)(nn.Module(), *qkv, mask, scaling=0.4, sliding_window=2)
    torch.testing.assert_close(out, dense(*qkv, mask, 0.4))


def test_a_sliding_window_is_refused() -> None:
    layout, _ = packed(ROWS["no prefix"])
    with refused("sliding window", "8 tokens", error=ValueError):
        attend("sdpa", inputs(layout.tokens), packed_layout=layout, sliding_window=8)


def test_sdpa_drops_out() -> None:
    layout, _ = packed(ROWS["several completions"])
    q, k, v = inputs(layout.tokens)
    kept = attend("sdpa", [q, k, torch.ones_like(v)], packed_layout=layout, dropout=0.5)
    assert kept.min() < 0.9 and kept.max() > 1.1 and abs(kept.mean() - 1) < 0.3


def test_flash_attn_is_told_to_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(
        flash, "_flash_attn_kernel", lambda: lambda q, *_, **how: told.append(how) or q
    )
    layout, _ = packed(ROWS["no prefix"])
    attend("flash_attention_2", inputs(layout.tokens), packed_layout=layout, dropout=0.25)
    assert [how["dropout_p"] for how in told] == [0.25]


def test_what_a_layout_needs_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, _ = packed(ROWS["several completions"])
    assert layout.once(block_mask, True) is layout.once(block_mask, True)
    assert layout.once(block_mask, False) is not layout.once(block_mask, True)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    made = []
    from_cu_seqlens = PackedLayout.from_cu_seqlens
    monkeypatch.setattr(
        PackedLayout, "from_cu_seqlens", lambda x: made.append(x) or from_cu_seqlens(x)
    )
    for _ in range(3):
        attend("sdpa", inputs(7), cu_seq_lens_q=cu_seqlens)
    assert len(made) == 1


def test_registered_names_and_whose_configs_get_them() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    language_model, tower = nn.Module(), nn.Module()
    language_model.config, tower.config = SimpleNamespace(), SimpleNamespace()
    for name in IMPLEMENTATIONS:
        use_packed_attention(language_model, [tower], name)
        registered = language_model.config._attn_implementation
        assert registered == tower.config._attn_implementation
        assert "flash" in registered
        assert registered in AttentionInterface() and registered in AttentionMaskInterface()
    use_packed_attention(language_model, (), "flex")
    assert language_model.config._attn_implementation == "perl_flash_flex"
    assert tower.config._attn_implementation == "perl_flash_sdpa"


def test_a_compiled_layer_is_not_compiled_again_for_another_layout(name: str) -> None:
    counter = CompileCounter()
    function = attention_function(name)
    module = nn.Module()
    module.is_causal = True

    def layer(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return function(module, q * 2, k, v, None, **kwargs)[0] + 1

    compiled = torch.compile(layer, backend=counter, dynamic=True)
    for row in ("several completions", "no prefix", "prompts of one token", "even pieces"):
        layout, sees = packed(ROWS[row])
        qkv = inputs(layout.tokens)
        out = compiled(*qkv, packed_layout=layout)
        torch.testing.assert_close(out, dense(2 * qkv[0], *qkv[1:], sees, DIM**-0.5) + 1)
    # What is before the attention and what is after it.
    assert counter.frame_count == 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("row", ["one piece", "several completions", "more than a block"])
def test_blocks_of_flex_are_those_of_its_mask(row: str, causal: bool) -> None:
    segments = [*ROWS[row], (300, [100, 300, 40])]
    layout, sees = packed(segments)
    mask = block_mask(layout, causal)
    n = mask.seq_lengths[0]
    want = create_block_mask(mask.mask_mod, 1, 1, n, n, device="cpu")
    assert torch.equal(mask.to_dense(), want.to_dense())
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, part), getattr(want, part))
    if causal:
        token = torch.arange(layout.tokens)
        assert torch.equal(mask.mask_mod(0, 0, token[:, None], token), sees)


def test_masks_of_flex_have_at_least_two_blocks() -> None:
    sizes = [block_mask(packed([(n, [])])[0], True).seq_lengths for n in (1, 128, 256, 257, 384)]
    assert sizes == [(n, n) for n in (256, 256, 256, 384, 384)]


def test_flex_is_not_compiled_again_for_another_layout() -> None:
    counter = CompileCounter()
    # On a CPU it has no gradients.
    compiled: Any = torch.compile(flex_attention, backend=counter, dynamic=True)
    for segments in (ROWS["one piece"], ROWS["more than a block"], [(400, [5]), (150, [9, 70])]):
        layout, sees = packed(segments)
        for causal in (False, True):
            mask = block_mask(layout, causal)
            q, k, v = (x.detach() for x in inputs(mask.seq_lengths[0], groups=4))
            out = run_compiled(compiled, q, k, v, mask, 0.4)
        tokens = layout.tokens
        want = dense(*(x[:, :, :tokens] for x in (q, k, v)), sees, 0.4)
        torch.testing.assert_close(out[:, :, :tokens].transpose(1, 2), want)
    assert counter.frame_count == 1


def test_gathered_rows_and_their_gradient() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 0, 2, 4, 0])
    upstream = torch.randn(6, 2, 3, dtype=torch.float64)
    got = with_gradients(gather_rows(x, index), [x], upstream)
    want = with_gradients(x[index], [x], upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


def test_gradients_of_a_row_taken_often_are_summed_in_float32() -> None:
    # In bfloat16, 256 + 1 is 256: a sum there stops growing. On a CPU, PyTorch has that for single numbers only.
    x = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert x.grad.tolist() == [1000, 0]


# On a GPU: the kernels themselves.

LONG: Segments = [(70, [30, 12, 45]), (1, [1, 1]), (150, [20]), (33, [64, 1])]
REAL = [
    *([("flash_attention_2", torch.bfloat16)] if not flash_attn_problem() else []),
    *[(name, torch.bfloat16) for name in ("varlen", "flex", "sdpa")],
    *[(name, torch.float32) for name in ("flex", "sdpa")],
]


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("name", "dtype"), REAL, ids=str)
def test_kernels_against_float64(name: str, dtype: torch.dtype, groups: int) -> None:
    layout, sees = packed(LONG, "cuda")
    qkv = inputs(layout.tokens, groups, dtype, "cuda", dim=64)
    upstream = torch.randn(1, layout.tokens, 4, 64, device="cuda", dtype=dtype)
    got = with_gradients(attend(name, qkv, packed_layout=layout), qkv, upstream)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want = with_gradients(dense(*exact, sees, 0.4), exact, upstream.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < tolerance * other.abs().max()
    check_poison(lambda qkv: attend(name, qkv, packed_layout=layout), qkv, layout, sees)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), REAL, ids=str)
def test_kernels_over_segments_of_a_vision_tower(name: str, dtype: torch.dtype) -> None:
    lengths = [64, 64, 16, 200, 1]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    sees = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().cuda()
    # Qwen2-VL's towers have heads of 80, no power of two.
    qkv = inputs(sum(lengths), 1, dtype, "cuda", dim=80)
    out = attend(name, qkv, cu_seq_lens_q=cu_seqlens)
    want = dense(*(x.double() for x in qkv), sees, 0.4)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert (out.double() - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.gpu
def test_the_kernel_of_flex_is_not_compiled_again_for_another_layout() -> None:
    def step(segments: Segments) -> None:
        layout, _ = packed(segments, "cuda")
        qkv = inputs(layout.tokens, 2, torch.bfloat16, "cuda", dim=64)
        attend("flex", qkv, packed_layout=layout).sum().backward()

    step(LONG)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for segments in (ROWS["one piece"], ROWS["more than a block"], LONG * 2, LONG[::-1]):
            step(segments)
