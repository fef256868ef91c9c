import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from dataloading.augment import crop_windows
from dataloading.crop import MemoryCrops, crop_resize


def pixels_and_windows(height: int, width: int, num: int = 65):
    pixels = np.random.default_rng(height * width).integers(0, 256, (num, height, width, 3), dtype=np.uint8)
    rows = np.random.default_rng(1).permutation(num)
    heights, widths = np.full(num, height), np.full(num, width)
    windows = crop_windows(0, rows * 0, rows, heights, widths, view=0, scale=(0.02, 1.0), ratio=(0.5, 2.0))
    return torch.from_numpy(pixels), rows, *windows


# float32 weights and sums against torchvision in float64.
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (64, 48, 32), (20, 33, 17), (96, 96, 24), (9, 7, 40), (1, 5, 3)]
)
def test_crops_equal_torchvisions_resize_of_the_crop_within_5e_7(height, width, size):
    pixels, rows, anchors, sizes = pixels_and_windows(height, width)
    crops = crop_resize(pixels, rows, anchors, sizes, size=size)
    for crop, row, (top, left), (tall, wide) in zip(crops, rows, anchors.tolist(), sizes.tolist(), strict=True):
        image = pixels[int(row)].permute(2, 0, 1).double() / 255.0
        expected = tv.resized_crop(image, top, left, tall, wide, [size, size], antialias=True)
        assert (crop - expected).abs().max() < 5e-7


def test_nothing_outside_the_window_is_read():
    pixels, rows, anchors, sizes = pixels_and_windows(32, 32, num=20)
    changed = pixels.clone()
    for row, (top, left), (tall, wide) in zip(rows, anchors, sizes, strict=True):
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[top : top + tall, left : left + wide] = False
        changed[int(row)][outside] ^= 255
    crops = crop_resize(pixels, rows, anchors, sizes, size=16)
    assert torch.equal(crops, crop_resize(changed, rows, anchors, sizes, size=16))


def test_the_whole_image_at_its_own_size_is_itself():
    pixels, rows, _, _ = pixels_and_windows(32, 32)
    crops = crop_resize(pixels, rows, np.zeros((65, 2), int), np.full((65, 2), 32), size=32)
    assert (crops - pixels[torch.from_numpy(rows)].permute(0, 3, 1, 2) / 255.0).abs().max() < 1e-7


def test_a_crops_bits_do_not_depend_on_batch_or_threads():
    # The windows of (64, 48) need from 2 to 4 taps, so the batches do not all have the same number of passes.
    pixels, rows, anchors, sizes = pixels_and_windows(64, 48)
    before = torch.get_num_threads()
    try:
        whole = crop_resize(pixels, rows, anchors, sizes, size=32)
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for length in range(1, 66, 3):
                part = slice(65 - length, 65)
                crops = crop_resize(pixels, rows[part], anchors[part], sizes[part], size=32)
                assert torch.equal(crops, whole[part])
    finally:
        torch.set_num_threads(before)


def test_read_only_pixels_are_taken_without_a_warning():
    pixels_NHWC = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    pixels_NHWC.flags.writeable = False
    MemoryCrops(pixels_NHWC, 4, torch.device("cpu")).close()


def test_a_batch_without_samples_has_no_crops():
    none = np.zeros((0, 2), int)
    assert crop_resize(torch.zeros((3, 8, 8, 3), dtype=torch.uint8), none[:, 0], none, none, size=5).shape == (
        0,
        3,
        5,
        5,
    )
