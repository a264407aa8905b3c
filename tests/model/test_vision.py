"""The vision tower's cache: how often an image is encoded, and when what was made is no longer good."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from perl.model.families import ImageFeatures
from perl.model.head import HeadLoss
from perl.model.packed.pack import pack_row
from perl.model.tiny import TINY_MODELS, TINY_QWEN
from perl.model.vision import Vision
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import EncodedImage
from tests.model.conftest import CONFIG
from tests.model.steps import batch_logprobs, segments_of, shared_step


@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_grad_passes_share_one_encoding_until_the_weights_change(name: str, load) -> None:
    policy, processor = load(name)
    segments = segments_of(processor)
    prompts = [s.prompt for s in segments]
    head = HeadLoss(policy, processor.unsampled_token_ids(), 1.0)
    InProcessEngine(policy, processor, 4).generate(prompts, SamplingParams(2, 1.0, 3), seed=0)
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


def test_a_frozen_tower_encodes_an_image_once_for_all_passes(load) -> None:
    policy, processor = load(TINY_QWEN[0], replace(CONFIG, freeze_vision=True))
    segments = segments_of(processor)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        shared_step(policy, segments, 60)
        optimizer.step()
    assert policy.vision.images_encoded == 3


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


def test_the_feature_cache_keeps_to_its_bound(caplog: pytest.LogCaptureFixture) -> None:
    weight, encoded = torch.nn.Linear(1, 1), []

    class Blank:
        def tower(self, core: object) -> list[torch.nn.Module]:
            return [weight]

        def encode(self, core: object, images: Sequence[EncodedImage]) -> ImageFeatures:
            encoded.extend(image.key for image in images)
            rows = [torch.full((i.tokens, 8), float(i.key)) for i in images]
            return ImageFeatures(torch.cat(rows))

    images = [EncodedImage(str(k), torch.empty(0), (1, 2, 2), 1 + k % 2) for k in range(6)]
    vision = Vision(None, Blank(), cache_bytes=32 * 4)  # type: ignore[arg-type]

    def features(*images: EncodedImage) -> list[float]:
        with torch.no_grad():
            found = vision.features(images)
        assert found is not None
        return found.rows[:, 0].tolist()

    assert features(images[0], images[1], images[0]) == [0, 1, 1, 0] and encoded == ["0", "1"]
    features(*images[2:4])
    # Four tokens fit: the two oldest images went.
    assert features(*images[2:4]) == [2, 3, 3]
    assert features(images[1]) == [1, 1]
    assert encoded == ["0", "1", "2", "3", "1"]
    with torch.no_grad():
        weight.weight += 1
    features(images[1])
    assert encoded[5:] == ["1"]
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1 and "model.feature_cache_mb = 0 is too small" in warnings[0]
