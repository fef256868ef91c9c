"""The loader's contract, on every image path."""

import io
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from made_images import encode, encoded_dataset, odd_sized_jpegs, picture, pixel_dataset
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from dataloading import headers, stream
from dataloading.augment import AugmentConfig, crop_windows
from dataloading.index import Dataset
from dataloading.loader import Batch, eval_batches, make_loader

FILES = odd_sized_jpegs(43)
AUGMENT = AugmentConfig(size=32, blur_probability=0.5, solarize_probability=0.2)
PIXELS_ONLY = AugmentConfig(
    size=32, jitter=(0.0,) * 4, grayscale_probability=0.0, mean=(0.0,) * 3, std=(1.0,) * 3
)  # fmt: skip
PATHS = {"memory": pixel_dataset(43, 32, 32), "dali": encoded_dataset(FILES), "nvimgcodec": encoded_dataset(FILES)}


def batches_of(
    dataset: Dataset,
    num: int,
    *,
    augment: AugmentConfig = AUGMENT,
    start_step: int = 0,
    global_batch: int = 12,
    offsets: tuple[int, int] | None = None,
    num_threads: int = 2,
    backend: str | None = None,
) -> list[Batch]:
    if backend is None:
        backend = next((name for name, known in PATHS.items() if known is dataset), "auto")
    loader = make_loader(
        dataset,
        augment,
        seed=1,
        global_batch=global_batch,
        offsets=offsets or (0, global_batch),
        device="cpu",
        num_threads=num_threads,
        backend=backend,
    )
    try:
        return list(islice(loader.batches(start_step), num))
    finally:
        loader.close()


def images_by_visit(batches: list[Batch], first_position: int = 0) -> dict[int, tuple[int, bytes]]:
    """Return per stream position the row and the bits of its image; for batches without gaps between them."""
    rows = torch.cat([batch.indices_B for batch in batches]).tolist()
    images = torch.cat([batch.images_BCHW for batch in batches])
    shown = [(row, image.numpy().tobytes()) for row, image in zip(rows, images, strict=True)]
    return dict(enumerate(shown, first_position))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.indices_B, theirs.indices_B)
        assert torch.equal(ours.valid_B, theirs.valid_B)
        assert torch.equal(ours.images_BCHW, theirs.images_BCHW)


@pytest.mark.parametrize("path", PATHS)
def test_batches_hold_the_rows_of_the_stream(path):
    batches = batches_of(PATHS[path], 5)
    rows = np.concatenate([batch.indices_B.numpy() for batch in batches])
    assert np.array_equal(rows, stream.rows(np.arange(60), 43, seed=1))
    for batch in batches:
        assert batch.images_BCHW.shape == (12, 3, 32, 32)
        assert batch.images_BCHW.dtype == torch.float32
        assert batch.indices_B.dtype == torch.int64
        assert batch.valid_B.all()


@pytest.mark.parametrize("path", PATHS)
def test_an_image_has_the_same_bits_at_any_batch_size_and_number_of_threads(path):
    expected = images_by_visit(batches_of(PATHS[path], 6))
    for global_batch, num_threads in ((8, 1), (36, 2)):
        batches = batches_of(PATHS[path], 72 // global_batch, global_batch=global_batch, num_threads=num_threads)
        assert images_by_visit(batches) == expected


@pytest.mark.parametrize("path", PATHS)
def test_the_parts_of_several_ranks_are_the_batch_of_one(path):
    whole = batches_of(PATHS[path], 3)
    of_ranks = [batches_of(PATHS[path], 3, offsets=offsets) for offsets in ((0, 5), (5, 9), (9, 9), (9, 12))]
    for step, parts in enumerate(zip(*of_ranks, strict=True)):
        assert torch.equal(torch.cat([part.images_BCHW for part in parts]), whole[step].images_BCHW)
        assert torch.equal(torch.cat([part.indices_B for part in parts]), whole[step].indices_B)


@pytest.mark.parametrize("path", PATHS)
def test_a_restart_at_a_later_step_continues_the_stream(path):
    assert_same(batches_of(PATHS[path], 3, start_step=4), batches_of(PATHS[path], 7)[4:])


@pytest.mark.parametrize("path", PATHS)
def test_one_loader_starts_anew_at_another_step(path):
    loader = make_loader(
        PATHS[path], AUGMENT, seed=1, global_batch=12, offsets=(0, 12), device="cpu", num_threads=2, backend=path
    )
    first = loader.batches(0)
    expected = [next(first) for _ in range(3)]
    assert_same(list(islice(loader.batches(1), 2)), expected[1:])
    loader.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_rank_without_positions_gets_empty_batches(path):
    for num_views, shape in ((1, (0, 3, 32, 32)), (2, (2, 0, 3, 32, 32))):
        augment = AugmentConfig(size=32, num_views=num_views)
        for batch in batches_of(PATHS[path], 2, augment=augment, offsets=(7, 7)):
            assert batch.images_BCHW.shape == shape
            assert batch.indices_B.shape == batch.valid_B.shape == (0,)


@pytest.mark.parametrize("path", PATHS)
def test_the_first_of_several_views_is_the_view_of_one(path):
    one = batches_of(PATHS[path], 2)
    two = batches_of(PATHS[path], 2, augment=AugmentConfig(**(vars(AUGMENT) | {"num_views": 2})))
    for single, double in zip(one, two, strict=True):
        assert double.images_VBCHW.shape == (2, 12, 3, 32, 32)
        assert torch.equal(double.images_VBCHW[0], single.images_BCHW)
        assert not torch.equal(double.images_VBCHW[1], single.images_BCHW)


MULTI_CROP = AugmentConfig(
    size=32, num_views=2, num_local_views=3, local_size=16, local_scale=(0.05, 0.3), jitter=(0.0,) * 4,
    grayscale_probability=0.0, mean=(0.0,) * 3, std=(1.0,) * 3,
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_multi_crop_adds_smaller_views_and_leaves_the_others_as_they_are(path):
    without = batches_of(PATHS[path], 3, augment=replace(MULTI_CROP, num_local_views=0))
    found = batches_of(PATHS[path], 3, augment=MULTI_CROP)
    one_more = batches_of(PATHS[path], 3, augment=replace(MULTI_CROP, num_views=1, num_local_views=4))
    for batch, plain, more in zip(found, without, one_more, strict=True):
        assert plain.local_images_LBCss is None
        assert torch.equal(batch.images_BCHW, plain.images_BCHW)
        local = batch.local_images_LBCss
        assert local is not None
        assert local.shape == (3, 12, 3, 16, 16)
        assert more.local_images_LBCss is not None
        assert torch.equal(more.local_images_LBCss[:3], local)
        assert len({view.numpy().tobytes() for view in local}) == 3
    (nobody,) = batches_of(PATHS[path], 1, augment=MULTI_CROP, offsets=(7, 7))
    assert nobody.local_images_LBCss is not None
    assert nobody.local_images_LBCss.shape == (3, 0, 3, 16, 16)


def test_local_views_show_what_torchvision_crops():
    """Against the same windows, cut out by torchvision."""
    (batch,) = batches_of(PATHS["nvimgcodec"], 1, augment=replace(MULTI_CROP, flip_probability=0.0))
    assert batch.local_images_LBCss is not None
    index, rows = PATHS["nvimgcodec"].index, batch.indices_B.numpy()
    sizes = index.heights_N[rows], index.widths_N[rows]
    for view, images in enumerate(batch.local_images_LBCss):
        windows = crop_windows(
            1, np.zeros(12, dtype=np.int64), rows, *sizes, view=128 + view, scale=(0.05, 0.3), ratio=MULTI_CROP.ratio
        )
        for row, image, anchor, size in zip(rows, images, *windows, strict=True):
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(FILES[row])).convert("RGB"))).permute(2, 0, 1)
            expected = tv.resized_crop(pixels, *anchor.tolist(), *size.tolist(), [16, 16], antialias=True)
            assert torch.equal((image * 255.0).round().to(torch.uint8), expected)


def test_an_image_that_fails_is_invalid_in_all_its_views():
    damaged = encoded_dataset(FILES, DAMAGE)
    for batch in batches_of(damaged, 8, augment=MULTI_CROP):
        assert torch.equal(~batch.valid_B, torch.isin(batch.indices_B, torch.tensor(list(DAMAGE))))
        assert batch.local_images_LBCss is not None


def test_views_of_one_image_share_a_read():
    reads = []

    class Far:
        is_remote = True

        def __call__(self, row: int) -> bytes:
            reads.append(row)
            return FILES[row]

    loader = make_loader(
        Dataset(PATHS["dali"].index, None, Far()), MULTI_CROP, seed=1, global_batch=43, offsets=(0, 43), device="cpu",
        num_threads=2,
    )  # fmt: skip
    list(islice(loader.batches(0), 5))
    loader.close()
    assert max(np.bincount(reads)) <= len(reads) // 43 + 1


def test_memory_equals_the_torchvision_reference():
    ours, reference = batches_of(PATHS["memory"], 4), batches_of(PATHS["memory"], 4, backend="torch")
    for a, b in zip(ours, reference, strict=True):
        # 4e-6 of the colours divided by a standard deviation of 0.22, and a margin where solarise meets its threshold.
        differs = (a.images_BCHW - b.images_BCHW).abs() > 3e-5
        assert differs.float().mean() < 1e-4


def test_dali_equals_the_torchvision_reference_within_half_a_level_on_average():
    ours = batches_of(PATHS["dali"], 8, augment=PIXELS_ONLY)
    reference = batches_of(PATHS["dali"], 8, augment=PIXELS_ONLY, backend="torch")
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.indices_B, b.indices_B)
        assert (a.images_BCHW - b.images_BCHW).abs().mean(dim=(1, 2, 3)).max() * 255.0 < 0.5


def test_nvimgcodec_equals_the_torchvision_reference():
    ours = batches_of(PATHS["nvimgcodec"], 8)
    reference = batches_of(PATHS["nvimgcodec"], 8, backend="torch")
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.indices_B, b.indices_B)
        differs = (a.images_BCHW - b.images_BCHW).abs() > 3e-5
        assert differs.float().mean() < 1e-4  # where solarise meets its threshold


HALF = FILES[20][: len(FILES[20]) // 2]
DAMAGE = {20: HALF, 21: b"no image at all", 22: b"", 40: FILES[39]}


@pytest.mark.parametrize("backend", ["nvimgcodec", "dali", "torch"])
def test_damaged_images_are_replaced_and_all_others_keep_their_bits(backend):
    damaged = encoded_dataset(FILES, DAMAGE, bad=(5,))
    found = batches_of(damaged, 11, augment=PIXELS_ONLY, backend=backend)
    expected = batches_of(PATHS["dali"], 11, augment=PIXELS_ONLY, backend=backend)
    invalid = set()
    for ours, whole in zip(found, expected, strict=True):
        assert torch.equal(ours.indices_B, whole.indices_B)
        assert torch.equal(ours.images_BCHW[ours.valid_B], whole.images_BCHW[ours.valid_B])
        invalid |= set(ours.indices_B[~ours.valid_B].tolist())
    assert invalid == {5, *DAMAGE}


def test_the_stand_in_is_the_next_good_row_with_the_numbers_of_the_damaged_one():
    shown = batches_of(encoded_dataset(FILES, {21: b"", 22: b"x"}), 4, augment=PIXELS_ONLY)
    # The same row numbers, but 21 and 22 are the image of 23 themselves.
    files = [FILES[23] if row in (21, 22) else file for row, file in enumerate(FILES)]
    assert_same(
        [Batch(b.images_BCHW, b.indices_B, torch.ones_like(b.valid_B)) for b in shown],
        batches_of(encoded_dataset(files), 4, augment=PIXELS_ONLY),
    )


def test_validity_and_pixels_do_not_depend_on_what_failed_before():
    """Half a JPEG file decodes where the window lies in its upper half: a restart must not change that."""
    damaged = encoded_dataset(FILES, {row: FILES[row][: len(FILES[row]) * 2 // 3] for row in range(0, 43, 4)})
    whole = batches_of(damaged, 14)
    assert_same(batches_of(damaged, 7, start_step=7), whole[7:])
    of_ranks = [batches_of(damaged, 14, offsets=offsets) for offsets in ((0, 5), (5, 12))]
    for batch, *parts in zip(whole, *of_ranks, strict=True):
        assert torch.equal(torch.cat([part.images_BCHW for part in parts]), batch.images_BCHW)
        assert torch.equal(torch.cat([part.valid_B for part in parts]), batch.valid_B)
    assert not torch.cat([batch.valid_B for batch in whole]).all()


def test_bad_rows_are_listed_with_name_and_reason():
    damaged = encoded_dataset(FILES, DAMAGE, bad=(5,))
    loader = make_loader(damaged, PIXELS_ONLY, seed=1, global_batch=43, offsets=(0, 43), device="cpu", num_threads=2)
    assert loader.failed_rows() == []
    list(islice(loader.batches(0), 3))
    loader.close()
    reasons = {bad.name: bad.reason for bad in loader.failed_rows()}
    assert sorted(reasons) == ["20.jpg", "21.jpg", "22.jpg", "40.jpg"]
    assert "truncated" in reasons["20.jpg"]
    assert "no image in a known format" in reasons["21.jpg"]
    assert "changed since it was indexed" in reasons["40.jpg"]


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(headers, "MAX_PIXELS", 60 * 50)
    loader = make_loader(
        encoded_dataset([encode(picture(60, 50, 0)), encode(picture(61, 50, 1))]),
        PIXELS_ONLY, seed=1, global_batch=2, offsets=(0, 2), device="cpu", num_threads=1,
    )  # fmt: skip
    batch = next(loader.batches(0))
    loader.close()
    assert batch.valid_B.tolist() == [row == 0 for row in batch.indices_B.tolist()]
    assert [bad.row for bad in loader.failed_rows()] == [1]
    assert loader.failed_rows(1) == []
    assert "decompression bomb" in loader.failed_rows()[0].reason


def test_images_that_only_pillow_decodes_are_valid():
    files = [*FILES[:5], encode(picture(70, 60, 1), "GIF")]
    for batch in batches_of(encoded_dataset(files), 2, augment=PIXELS_ONLY, global_batch=6):
        assert batch.valid_B.all()
        image = batch.images_BCHW[batch.indices_B == 5]
        assert image.std() > 0.05


def test_a_dataset_without_a_good_image_is_refused():
    with pytest.raises(ValueError, match="no image of made can be decoded"):
        batches_of(encoded_dataset(FILES[:3], {0: b"", 1: b"", 2: b"x"}), 1, global_batch=3)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_eval_batches_are_the_central_crop_in_the_given_order(backend):
    shapes = [(300, 400), (400, 300), (333, 333)]
    originals = [picture(h // 5, w // 5, h).resize((w, h), Image.Resampling.BICUBIC) for h, w in shapes]
    dataset, rows = encoded_dataset([encode(original) for original in originals]), [2, 0, 0, 1, 2]
    batches = list(
        eval_batches(
            dataset, rows, resize=72, crop=64, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=2, device="cpu",
            num_threads=2, backend=backend,
        )
    )  # fmt: skip
    assert [len(batch.indices_B) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.indices_B for batch in batches]).tolist() == rows
    images = torch.cat([batch.images_BCHW for batch in batches]) * 0.5 + 0.5
    assert torch.equal(images[1], images[2])
    for row, image in zip(rows, images, strict=True):
        original = torch.from_numpy(np.array(originals[row])).permute(2, 0, 1) / 255.0
        expected = tv.center_crop(tv.resize(original, [72], antialias=True), [64, 64])
        # The window is rounded to whole pixels of the source, of which an output pixel covers four.
        assert (image - expected).abs().mean() < 0.01
        assert (image.roll(1, dims=2) - expected).abs().mean() > 0.015


def test_eval_of_images_in_memory_at_their_own_size_returns_them():
    dataset = PATHS["memory"]
    (batch,) = eval_batches(
        dataset, range(43), resize=32, crop=32, mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=64, device="cpu",
        num_threads=1,
    )  # fmt: skip
    assert dataset.pixels_NHWC is not None
    expected = torch.from_numpy(dataset.pixels_NHWC).permute(0, 3, 1, 2) / 255.0
    assert (batch.images_BCHW - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"offsets": (3, 2)}, "offsets"),
        ({"offsets": (0, 13)}, "offsets"),
        ({"backend": "pil"}, "backend"),
        ({"backend": "memory"}, "no pixels in memory"),
        ({"num_threads": 0}, "num_threads"),
    ],
)
def test_an_impossible_loader_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        batches_of(PATHS["dali"], 1, **wrong)


@pytest.mark.parametrize("backend", ["nvimgcodec", "dali"])
def test_only_formats_whose_broken_files_are_harmless_reach_fast_decoders(backend, monkeypatch):
    """Hostile files of the other formats can end the process: they go to Pillow."""
    from dataloading import dali_pipeline, nvimgcodec_decoder

    kinds = ["JPEG", "TIFF", "PNG", "PPM", "WEBP", "BMP", "JPEG2000"]
    files = [encode(picture(40, 50, number), kind) for number, kind in enumerate(kinds)]
    seen = set()
    run, decode_part = dali_pipeline.Pipeline.feed_input, nvimgcodec_decoder.decode_part

    def spy_dali(self, name, data):
        if name == "encoded":
            seen.update(Image.open(io.BytesIO(image.tobytes())).format for image in data)
        run(self, name, data)

    def spy(window):
        seen.add(Image.open(io.BytesIO(window.encoded)).format)
        return decode_part(window)

    monkeypatch.setattr(dali_pipeline.Pipeline, "feed_input", spy_dali)
    monkeypatch.setattr(nvimgcodec_decoder, "decode_part", spy)
    loader = make_loader(
        encoded_dataset(files), AugmentConfig(size=32), seed=0, global_batch=7, offsets=(0, 7), device="cpu",
        num_threads=1, backend=backend,
    )  # fmt: skip
    batch = next(loader.batches(0))
    loader.close()
    assert batch.valid_B.all()
    assert seen == {"JPEG", "PNG", "WEBP"}
