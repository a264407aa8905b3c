"""Each image through the vision tower once: a cache between passes, one shared encoding within an optimizer step."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from perl.model.families import Family, ImageFeatures
from perl.timing import span
from perl.types import EncodedImage, PackedBatch

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 2**14
"""Most visual tokens that are made together where no gradient is kept."""


class Vision:
    """The tower of a model, with a cache of the features that it made without gradient.

    The cache goes by the content of the image and is valid as long as the tower's weights stay as they are: rollouts,
    old and reference log-probs of one batch share one encoding. A frozen tower encodes each image by itself, so that its
    features depend on nothing else to the last bit: they serve training too, and the steps that follow. Changed weights
    are noticed by the version counters that autograd keeps of every tensor.

    Args:
        core: transformers' model of text and images, without the head.
        family: what is special about it.
        cache_bytes: most bytes of features that are kept after a call; the least recently used go first.
    """

    def __init__(self, core: Any, family: Family, cache_bytes: int) -> None:
        self.core, self.family, self.cache_bytes = core, family, cache_bytes
        self.weights: list[nn.Parameter] = []
        self.take_weights()
        self.encoded: Counter[int] = Counter()
        """How many images of so many visual tokens went through the tower so far."""
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._bytes = 0
        self._made_with: object = None
        self._copies: dict[str, EncodedImage] = {}
        self._encoded: set[str] = set()
        """Images that went through the tower since `clear_cache`."""
        self._said_too_small = False

    def take_weights(self) -> None:
        """Go by the parameters that the tower has now."""
        self.weights = [p for part in self.family.tower(self.core) for p in part.parameters()]

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.weights)

    @property
    def images_encoded(self) -> int:
        """How many images went through the tower so far."""
        return self.encoded.total()

    def encode(self, images: Sequence[EncodedImage]) -> ImageFeatures:
        """Run the tower once over these images, of which there is at least one: [K, H], K their visual tokens together,
        in their order."""
        self.encoded.update(image.tokens for image in images)
        with span("vision"):
            return self.family.encode(self.core, [self._there(image) for image in images])

    def features(self, images: Sequence[EncodedImage]) -> ImageFeatures | None:
        """Features of images, each distinct one encoded at most once; None without images.

        With gradient where the tower is trained and gradients are on, else from the cache.
        """
        if not images:
            return None
        if self.trained and torch.is_grad_enabled():
            unique = distinct(images)
            parts = self.encode(unique).split([image.tokens for image in unique])
            made = {image.key: part for image, part in zip(unique, parts, strict=True)}
            return ImageFeatures.join([made[image.key] for image in images])
        with torch.no_grad():
            return self._cached(images)

    def clear_cache(self) -> None:
        """Between steps: what follows does not depend on what was encoded before, to the last bit.

        The bits of a feature depend a little on what it was encoded together with, so a run that goes on from a
        checkpoint would else not give the numbers of one that was never stopped. A frozen tower's features stay.
        """
        self._copies.clear()
        self._encoded.clear()
        if self.trained:
            self._drop()

    def _there(self, image: EncodedImage) -> EncodedImage:
        """The image with its pixels on the tower's device, copied there once a step for all passes of a trained tower."""
        device = self.weights[0].device
        if image.pixel_values.device == device:
            return image
        copy = self._copies.get(image.key)
        if copy is None:
            pixels = image.pixel_values.to(device, non_blocking=True)
            copy = replace(image, pixel_values=pixels)
            if self.trained:
                self._copies[image.key] = copy
        return copy

    def _drop(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def _cached(self, images: Sequence[EncodedImage]) -> ImageFeatures:
        made_with = self._state()
        if made_with != self._made_with:
            self._drop()
            self._encoded.clear()
            self._made_with = made_with
        missing = [i for i in distinct(images) if i.key not in self._kept]
        again = any(image.key in self._encoded for image in missing)
        self._encoded.update(image.key for image in missing)
        for together in _parts(missing) if self.trained else [[image] for image in missing]:
            features = self.encode(together).split([image.tokens for image in together])
            for image, own in zip(together, features, strict=True):
                # A copy: a view would keep what it was encoded together with.
                self._kept[image.key] = own.map(torch.clone)
                self._bytes += own.nbytes
        for image in images:
            self._kept.move_to_end(image.key)
        found = ImageFeatures.join([self._kept[image.key] for image in images])
        if again and self.cache_bytes > 0 and not self._said_too_small:
            self._said_too_small = True
            logger.warning(
                "model.feature_cache_mb = %d is too small for the features of one step: images go through the vision tower "
                "again in each pass; raise it (said once)",
                self.cache_bytes >> 20,
            )
        # Only now: what one call needs together stays until it has been joined, even over the bound.
        while self._bytes > self.cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
        return found

    def _state(self) -> object:
        """Equal as long as the same images give the same features."""
        modules = (m for part in self.family.tower(self.core) for m in part.modules())
        # Of peft's layers, switched off for reference log-probs; transformers' models have a method of that name.
        off = any(getattr(module, "disable_adapters", None) is True for module in modules)
        return off, [(w.data_ptr(), w.dtype, w._version) for w in self.weights]


def distinct(images: Sequence[EncodedImage]) -> list[EncodedImage]:
    """Each content once, in the order of its first appearance."""
    return list({image.key: image for image in images}.values())


def _parts(images: Sequence[EncodedImage]) -> list[list[EncodedImage]]:
    """Images in runs of at most `_TOKENS_AT_ONCE` visual tokens; a larger one alone."""
    parts: list[list[EncodedImage]] = []
    for image in images:
        if not parts or sum(i.tokens for i in parts[-1]) + image.tokens > _TOKENS_AT_ONCE:
            parts.append([])
        parts[-1].append(image)
    return parts


@dataclass(eq=False)
class _Encoding:
    """Images encoded together with gradient, and leaves that stand for the features of each in the language model."""

    features: ImageFeatures
    leaves: dict[str, ImageFeatures]
    last_use: int


class StepFeatures:
    """The images of one optimizer step, each encoded once with gradient, however many micro-batches show it.

    The language model of every micro-batch reads detached leaves, where feature gradients add up in float32; behind
    the last micro-batch that shows an image the tower is back-propagated, once for all images encoded together. Until
    then the tower's activations of that image are kept.

    Args:
        encode: runs the tower with gradient over distinct images.
        batches: the step's micro-batches, in the order in which they will be run.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[EncodedImage]], ImageFeatures],
        batches: Sequence[PackedBatch],
    ) -> None:
        self.encode, self.batches = encode, batches
        self._last_use = {image.key: i for i, b in enumerate(batches) for image in b.images}
        self._open: list[_Encoding] = []

    @contextmanager
    def of(self, number: int) -> Iterator[ImageFeatures | None]:
        """Features of the images of a micro-batch, whose backward has run when the context ends; None without any."""
        images = self.batches[number].images
        known = {key for encoding in self._open for key in encoding.leaves}
        new: defaultdict[int, list[EncodedImage]] = defaultdict(list)
        for image in images:
            if image.key not in known:
                new[self._last_use[image.key]].append(image)
        # Apart by their last use: what is done with need not wait for an image that is shown again much later.
        self._open += [self._encode(together, last) for last, together in new.items()]
        leaves = {k: leaf for encoding in self._open for k, leaf in encoding.leaves.items()}
        yield ImageFeatures.join([leaves[image.key] for image in images]) if images else None
        for encoding in self._open:
            if encoding.last_use == number:
                _back_propagate(encoding)
        self._open = [e for e in self._open if e.last_use != number]

    def _encode(self, images: Sequence[EncodedImage], last_use: int) -> _Encoding:
        features = self.encode(images)
        parts = features.split([image.tokens for image in images])
        leaves = {image.key: part.map(_leaf) for image, part in zip(images, parts, strict=True)}
        return _Encoding(features, leaves, last_use)


def _leaf(features: torch.Tensor) -> torch.Tensor:
    """Detached, in float32 at least, so that gradients of several micro-batches add up exactly."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return features.detach().to(wide).requires_grad_()


def _back_propagate(encoding: _Encoding) -> None:
    """The tower's backward, with the gradients that the language model left on the leaves."""
    tensors, grads = [], []
    for at, features in enumerate(encoding.features.tensors):
        leaves = [leaf.tensors[at] for leaf in encoding.leaves.values()]
        if features.requires_grad and any(leaf.grad is not None for leaf in leaves):
            parts = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            tensors.append(features)
            grads.append(torch.cat(parts).to(features.dtype))
    if tensors:
        with span("vision.backward"):
            torch.autograd.backward(tensors, grads)
