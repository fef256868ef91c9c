"""The alternative's data loading: torchvision transforms per image in a `torch.utils.data.DataLoader`."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from dataloading.augment import AugmentConfig
from dataloading.index import Dataset
from dataloading.loader import Batch

DECODERS = ("PIL", "tensors")


@dataclass(frozen=True, kw_only=True)
class PlainDataSettings:
    """The settings of the plain loader that a user would try."""

    images: str = "PIL"
    """One of `DECODERS`: what the transforms work on."""
    num_workers: int = 0
    """Processes of the DataLoader."""

    @property
    def name(self) -> str:
        """The settings in words."""
        return f"transforms on {self.images}, {self.num_workers} workers"


def plain_data_settings(most_workers: int) -> list[PlainDataSettings]:
    """Return the settings that the sweep tries."""
    return [
        PlainDataSettings(images=images, num_workers=num_workers)
        for images, num_workers in itertools.product(DECODERS, range(most_workers + 1))
    ]


class InstanceImages(TorchDataset):
    """Augmented images with their row numbers, one at a time."""

    def __init__(self, dataset: Dataset, augment: AugmentConfig, images: str) -> None:
        self._pixels_NHWC, self._read, self._images = dataset.pixels_NHWC, dataset.read, images
        self._num_rows = dataset.index.num_rows
        jitter = v2.ColorJitter(*augment.jitter)
        colors: dict[str, torch.nn.Module] = {
            "jitter": v2.RandomApply([jitter], augment.jitter_probability)
            if augment.jitter_probability < 1
            else jitter,
            "grayscale": v2.RandomGrayscale(augment.grayscale_probability),
        }
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(augment.size, scale=augment.scale, ratio=augment.ratio, antialias=True),
                *([v2.RandomHorizontalFlip(augment.flip_probability)] if augment.flip_probability else []),
                *(colors[name] for name in augment.order),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(augment.mean, augment.std),
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
        self._loader = DataLoader(
            InstanceImages(dataset, augment, settings.images),
            batch_size=batch_size,
            shuffle=True,
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
                epoch = iter(self._loader)
            for images_BCHW, rows_B in epoch:
                images_BCHW = images_BCHW.to(self._device, non_blocking=True)
                yield Batch(images_BCHW, rows_B, torch.ones(len(rows_B), dtype=torch.bool))
