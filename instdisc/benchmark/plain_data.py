"""The alternative's data loading: torchvision transforms per image in a `torch.utils.data.DataLoader`."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from dataloading.augment import AugmentConfig
from dataloading.index import Dataset
from dataloading.loader import Batch

DECODERS = ("PIL", "tensors")
_ENDLESS = 1 << 40


@dataclass(frozen=True, kw_only=True)
class PlainDataSettings:
    """The settings of the plain loader that a user would try."""

    images: str = "PIL"
    """One of `DECODERS`: what the transforms work on."""
    num_workers: int = 0
    """Processes of the DataLoader."""
    normalize_batch: bool = False
    """Whether images travel as bytes, and become floats and are normalised as a whole batch."""

    @property
    def name(self) -> str:
        """The settings in words."""
        batch = ", normalised by the batch" if self.normalize_batch else ""
        return f"transforms on {self.images}, {self.num_workers} workers{batch}"


def plain_data_settings(num_workers: Iterable[int], *, with_batch_normalize: bool = False) -> list[PlainDataSettings]:
    """Return the settings that the sweep tries."""
    ways = (False, True) if with_batch_normalize else (False,)
    return [
        PlainDataSettings(images=images, num_workers=workers, normalize_batch=by_batch)
        for images, workers, by_batch in itertools.product(DECODERS, num_workers, ways)
    ]


def _to_floats(augment: AugmentConfig) -> list[torch.nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.mean, augment.std)]


class InstanceImages(TorchDataset):
    """Augmented images with their row numbers, one at a time."""

    def __init__(self, dataset: Dataset, augment: AugmentConfig, settings: PlainDataSettings) -> None:
        images = settings.images
        self._pixels_NHWC, self._read, self._images = dataset.pixels_NHWC, dataset.read, images
        self._num_rows = dataset.index.num_rows
        jitter = v2.ColorJitter(*augment.jitter)
        often = augment.jitter_probability if max(augment.jitter) else 0.0
        colors: dict[str, list[torch.nn.Module]] = {
            "jitter": [jitter] if often == 1 else [v2.RandomApply([jitter], often)] if often else [],
            "grayscale": [v2.RandomGrayscale(augment.grayscale_probability)] if augment.grayscale_probability else [],
        }
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(augment.size, scale=augment.scale, ratio=augment.ratio, antialias=True),
                *([v2.RandomHorizontalFlip(augment.flip_probability)] if augment.flip_probability else []),
                *(transform for name in augment.order for transform in colors[name]),
                v2.ToImage(),
                *([] if settings.normalize_batch else _to_floats(augment)),
            ]
        )

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(self._image(row)), row

    def _image(self, row: int) -> Image.Image | Tensor:
        if self._pixels_NHWC is not None:
            pixels_HWC = self._pixels_NHWC[row]
            if self._images == "PIL":
                return Image.fromarray(pixels_HWC)
            return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))
        assert self._read is not None
        encoded = self._read(row)
        if self._images == "PIL":
            return Image.open(io.BytesIO(encoded)).convert("RGB")
        from torchvision.io import ImageReadMode, decode_image

        return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)


class PlainData:
    """Endless shuffled batches of a DataLoader. Its workers live from `open` to `close`: none works beside a rival."""

    # Workers begin with two batches each for nothing: as many steps, and the clock starts on a steady flow.
    lead_in_steps = 4

    def __init__(
        self,
        dataset: Dataset,
        augment: AugmentConfig,
        batch_size: int,
        settings: PlainDataSettings,
        device: torch.device,
    ) -> None:
        self._device = device
        self._finish = v2.Compose(_to_floats(augment)) if settings.normalize_batch else None
        images = InstanceImages(dataset, augment, settings)
        # More workers than cores are tried on purpose.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        self._loader = DataLoader(
            images,
            batch_size=batch_size,
            # Epoch after epoch: with one at a time, the workers of a small data set would start anew in mid-trial.
            sampler=RandomSampler(images, num_samples=_ENDLESS),
            drop_last=True,
            num_workers=settings.num_workers,
            pin_memory=device.type == "cuda",
            # As users have it on Linux: workers start at once and share the images in memory.
            multiprocessing_context="fork" if settings.num_workers else None,
        )
        self._batches: Generator[Batch] | None = None

    def open(self, step: int) -> Generator[Batch]:
        """Start the workers and return the batches; `step` does not matter, the order is drawn anew."""
        self._batches = self._endless()
        return self._batches

    def close(self) -> None:
        """End the workers: a DataLoader's iterator does that when nobody holds it any more."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _endless(self) -> Generator[Batch]:
        while True:
            with warnings.catch_warnings():
                # Python 3.12 warns of every fork of a process with threads; it is how DataLoaders run on Linux.
                warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
                # More workers than cores are a setting like others here.
                warnings.filterwarnings("ignore", message=".*will create .* worker processes", category=UserWarning)
                epoch = iter(self._loader)
            for images_BCHW, rows_B in epoch:
                images_BCHW = images_BCHW.to(self._device, non_blocking=True)
                if self._finish is not None:
                    images_BCHW = self._finish(images_BCHW)
                yield Batch(images_BCHW, rows_B, torch.ones(len(rows_B), dtype=torch.bool))
