"""The vision tower's cache: how often an image is encoded, and when what was made is no longer good."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from perl.model import vision as vision_module
from perl.model.families import Family, ImageFeatures
from perl.model.head import HeadLoss
from perl.model.packed.pack import pack_row
from perl.model.tiny import TINY_MODELS, TINY_QWEN
from perl.model.vision import StepFeatures, Vision
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import EncodedImage, PackedBatch
from tests.messages import tells
from tests.model.conftest import CONFIG
from tests.model.steps import batch_logprobs, segments_of


def test_no_grad_passes_share_one_encoding_until_the_weights_change(load) -> None:
    policy, processor = load(TINY_QWEN[0])
    segments = segments_of(processor)
    prompts = [s.prompt for s in segments]
    head = HeadLoss(policy, processor.unsampled_token_ids(), 1.0)
    InProcessEngine(policy, processor, 2**12).generate(prompts, SamplingParams(2, 1.0, 3), seed=0)
    before = [head.logprobs(b).logprobs for b in policy.pack(segments, 60, True)]
    assert policy.vision.images_encoded == 3
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    torch.cat(list(batch_logprobs(policy, pack_row(segments)).values())).sum().backward()
    assert policy.vision.images_encoded == 6
    optimizer.step()
    after = [head.logprobs(b).logprobs for b in policy.pack(segments, 60, True)]
    assert policy.vision.images_encoded == 9
    assert not torch.equal(torch.cat(before), torch.cat(after))
    policy.vision = Vision(policy.core, policy.family, 0)
    fresh = [head.logprobs(b).logprobs for b in policy.pack(segments, 60, True)]
    assert torch.equal(torch.cat(fresh), torch.cat(after))


def test_a_reference_model_reads_the_features_of_an_equal_tower(load) -> None:
    config = replace(CONFIG, freeze_vision=True)
    policy, processor = load(TINY_QWEN[1], config)
    reference, _ = load(TINY_QWEN[1], config)
    batch = pack_row(segments_of(processor))
    head = HeadLoss(reference, processor.unsampled_token_ids(), 1.0)
    expected = head.logprobs(batch).logprobs
    reference.share_tower(policy)
    assert torch.equal(head.logprobs(batch).logprobs, expected)
    assert policy.vision.images_encoded == 3
    assert all(p.device.type == "meta" for p in reference.core.visual.parameters())


@pytest.mark.parametrize("name", TINY_MODELS)
def test_features_of_a_frozen_tower_depend_on_their_image_alone_and_stay(name: str, load) -> None:
    """To the last bit, in float32, whatever they are asked for together with."""
    policy, processor = load(name, replace(CONFIG, freeze_vision=True))
    vision = policy.float().vision
    images = list({i.key: i for s in segments_of(processor) for i in s.prompt.images}.values())
    together = vision.features(images).split([image.tokens for image in images])
    vision.clear_cache()
    vision.features(images[::-1])
    assert vision.images_encoded == len(images) == 3
    for image, expected in zip(images, together, strict=True):
        vision._drop()
        found = vision.features([image])
        assert all(map(torch.equal, found.tensors, expected.tensors))
    assert vision.images_encoded == 6


class Blank:
    """A family whose tower is one weight, 1 at first: an image is its number times the weight, 8 numbers a token."""

    def __init__(self) -> None:
        self.weight = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.weight.weight)
        self.encoded: list[str] = []

    def tower(self, core: object) -> list[nn.Module]:
        return [self.weight]

    def encode(self, core: object, images: Sequence[EncodedImage]) -> ImageFeatures:
        self.encoded += [image.key for image in images]
        numbers = torch.tensor([[float(i.key)] for i in images for _ in range(i.tokens)])
        return ImageFeatures(self.weight(numbers.to(self.weight.weight.dtype)).expand(-1, 8))


def image(key: int, tokens: int = 1) -> EncodedImage:
    return EncodedImage(str(key), torch.empty(0), (1, 2, 2), tokens)


@pytest.fixture
def blank() -> Blank:
    return Blank()


@pytest.fixture
def features(blank: Blank) -> Callable[..., list[float]]:
    """Features without gradient, of a cache of four tokens: the first number of each token."""
    vision = Vision(None, cast(Family, blank), cache_bytes=4 * 8 * 4)

    def features(*images: EncodedImage) -> list[float]:
        with torch.no_grad():
            found = vision.features(images)
        assert found is not None
        return found.rows[:, 0].tolist()

    features.vision = vision
    return features


def test_what_was_read_last_is_kept_longest(blank: Blank, features) -> None:
    one, two, three = image(1), image(2, tokens=2), image(3, tokens=2)
    assert features(one, two, one) == [1, 2, 2, 1]
    kept = [t for each in features.vision._kept.values() for t in each.tensors]
    assert [t.untyped_storage().nbytes() for t in kept] == [t.nbytes for t in kept] == [64, 32]
    features(one)
    # Five tokens: the two that were read longest ago go.
    assert features(three) == [3, 3]
    assert blank.encoded == ["1", "2", "3"]
    assert features(one, three) == [1, 3, 3]
    assert blank.encoded == ["1", "2", "3"]
    features(two)
    assert blank.encoded == ["1", "2", "3", "2"]


def test_a_cache_that_suffices_or_is_off_says_nothing(
    blank: Blank, features, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert features(image(4, tokens=4)) == [4] * 4
    assert blank.encoded == ["4"]
    features.vision.cache_bytes = 0
    for _ in range(2):
        assert features(image(2)) == [2]
    assert blank.encoded == ["4", "2", "2"] and not caplog.records


def test_what_another_step_or_other_weights_encoded_says_nothing_of_the_cache(
    blank: Blank, features, caplog: pytest.LogCaptureFixture
) -> None:
    features(image(1))
    features.vision.clear_cache()
    features(image(1))
    with torch.no_grad():
        blank.weight.weight += 1
    features(image(1))
    assert blank.encoded == ["1", "1", "1"] and not caplog.records


def test_what_one_call_needs_is_joined_before_anything_goes(
    blank: Blank, features, caplog: pytest.LogCaptureFixture
) -> None:
    images = [image(k, tokens=2) for k in range(3)]
    for _ in range(2):
        assert features(*images) == [0, 0, 1, 1, 2, 2]
    # Over the bound the oldest goes: so it does each time.
    assert blank.encoded == ["0", "1", "2", "0"]
    [warning] = caplog.records
    tells(warning.getMessage(), "model.feature_cache_mb")


@pytest.mark.parametrize("trained", [True, False])
def test_pixels_are_copied_to_the_towers_device_once_a_step(trained: bool) -> None:
    """Those of a frozen one need not stay there: its features do."""
    seen: list[list[torch.Tensor]] = []

    class There(Blank):
        def encode(self, core: object, images: Sequence[EncodedImage]) -> ImageFeatures:
            seen.append([i.pixel_values for i in images])
            return ImageFeatures(torch.zeros(len(images), 1))

    blank = There()
    blank.weight.to("meta").requires_grad_(trained)
    vision = Vision(None, cast(Family, blank), 0)
    images = [image(1), image(2)]
    for _ in range(2):
        vision.features(images)
    assert all(p.device.type == "meta" for pixels in seen for p in pixels)
    flat = [p for pixels in seen for p in pixels]
    assert len(flat) == 4 and len({id(p) for p in flat}) == (2 if trained else 4)
    vision.clear_cache()
    vision.features(images)
    assert len({id(p) for pixels in seen for p in pixels}) == (4 if trained else 6)
    here = replace(images[0], pixel_values=torch.zeros(1, 1, device="meta"))
    vision.features([here])
    assert seen[-1] == [here.pixel_values] and seen[-1][0] is here.pixel_values


def test_a_cleared_cache_is_as_large_as_a_new_one(blank: Blank, features) -> None:
    for _ in range(2):
        features(image(0, tokens=4))
        features.vision.clear_cache()
    assert features(image(0, tokens=2), image(1, tokens=2)) == [0, 0, 1, 1]
    features(image(0, tokens=2))
    assert blank.encoded == ["0", "0", "0", "1"]


def test_changed_weights_and_another_precision_make_features_anew(blank: Blank, features) -> None:
    def dtype() -> torch.dtype:
        with torch.no_grad():
            return features.vision.features([image(3)]).rows.dtype

    assert features(image(3)) == [3]
    with torch.no_grad():
        blank.weight.weight += 1
    assert features(image(3)) == [6]
    assert dtype() == torch.float32 and len(blank.encoded) == 2
    blank.weight.double()
    assert dtype() == dtype() == torch.float64 and len(blank.encoded) == 3


def test_images_go_through_the_tower_in_parts_where_no_gradient_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vision_module, "_TOKENS_AT_ONCE", 4)
    calls: list[list[str]] = []

    class Counted(Blank):
        def encode(self, core: object, images: Sequence[EncodedImage]) -> ImageFeatures:
            calls.append([i.key for i in images])
            return super().encode(core, images)

    vision = Vision(None, cast(Family, Counted()), cache_bytes=2**20)
    images = [image(k, tokens) for k, tokens in enumerate((2, 2, 1, 7, 3, 1))]
    with torch.no_grad():
        found = vision.features(images)
    assert found is not None
    assert found.rows[:, 0].tolist() == [0, 0, 1, 1, 2, *[3] * 7, 4, 4, 4, 5]
    assert calls == [["0", "1"], ["2"], ["3"], ["4", "5"]] and vision.images_encoded == 6
    found = vision.features([images[1], images[0], images[1]])
    assert found is not None and found.rows.requires_grad
    assert calls[4:] == [["1", "0"]] and found.rows[:, 0].tolist() == [1, 1, 0, 0, 1, 1]


def batches(*shown: Sequence[EncodedImage]) -> list[PackedBatch]:
    return [cast(PackedBatch, SimpleNamespace(images=images)) for images in shown]


def test_gradients_of_many_micro_batches_add_up_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    step = StepFeatures(lambda images: ImageFeatures(weight * 1), batches(*[[image(0)]] * 1000))
    for number in range(1000):
        with step.of(number) as found:
            assert found is not None
            found.rows.sum().backward()
    assert weight.grad is not None and weight.grad.item() == 1000


def test_the_tower_is_back_propagated_behind_the_last_micro_batch_that_shows_an_image() -> None:
    """Features are one weight each times 1, of two tensors; the loss takes 10^number of each micro-batch."""
    weights = [torch.ones((), requires_grad=True) for _ in range(3)]
    encoded: list[list[str]] = []

    def encode(images: Sequence[EncodedImage]) -> ImageFeatures:
        encoded.append([i.key for i in images])
        rows = torch.stack([weights[int(i.key)] for i in images])[:, None]
        return ImageFeatures(rows, (rows * 2,))

    def gradients() -> list[float]:
        return [0 if w.grad is None else w.grad.item() for w in weights]

    a, b, c = (image(k) for k in range(3))
    step = StepFeatures(encode, batches([a, b], [], [b, c], [a]))
    after = []
    for number, (first, second) in enumerate([(1, 0), (0, 0), (0, 1), (1, 0)]):
        with step.of(number) as found:
            if found is None:
                assert number == 1
            else:
                # The first image of a micro-batch by its rows, the second by its deepstack.
                loss = first * found.rows[0] + second * found.deepstack[0][-1]
                (10**number * loss).sum().backward()
        after.append(gradients())
    assert encoded == [["0"], ["1"], ["2"]]
    # Only `a` of the first, the deepstack of `c` (2 x 100) and `a` of the last enter a loss.
    assert after == [[0, 0, 0], [0, 0, 0], [0, 0, 200], [1001, 0, 200]]


def test_images_that_are_last_shown_together_are_encoded_together() -> None:
    """Nothing is back-propagated where no loss was, or where the features need no gradient."""
    weight = torch.ones((), requires_grad=True)
    encoded: list[list[str]] = []

    def encode(images: Sequence[EncodedImage]) -> ImageFeatures:
        encoded.append([i.key for i in images])
        rows = torch.tensor([[float(i.key)] for i in images])
        return ImageFeatures(rows * weight, (rows,))

    a, b, c = (image(k) for k in range(3))
    step = StepFeatures(encode, batches([a, b, c], [c, a]))
    for number, rows in enumerate(([[0], [1], [2]], [[2], [0]])):
        with step.of(number) as found:
            assert found is not None and found.rows.tolist() == rows
            found.deepstack[0].sum().backward()
    assert encoded == [["0", "2"], ["1"]] and weight.grad is None
