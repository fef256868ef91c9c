from math import exp, log, sqrt

import numpy as np
import pytest

from dataloading.augment import HUE, AugmentConfig, color_factors, crop_windows, eval_windows
from dataloading.philox import Purpose, uniforms


def torchvision_window(draws, height, width, scale, ratio):
    """RandomResizedCrop.get_params of torchvision, line by line, with the random numbers handed in."""
    for attempt in range(10):
        target_area = height * width * (scale[0] + draws[attempt] * (scale[1] - scale[0]))
        aspect = exp(log(ratio[0]) + draws[10 + attempt] * (log(ratio[1]) - log(ratio[0])))
        w, h = round(sqrt(target_area * aspect)), round(sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1))), (h, w)
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return ((height - h) // 2, (width - w) // 2), (h, w)


def many_images(num=600):
    rng = np.random.default_rng(0)
    return rng.integers(0, 9, num), rng.integers(0, 2**34, num), rng.integers(4, 700, num), rng.integers(4, 700, num)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0)])
def test_windows_are_those_of_torchvision_given_the_same_numbers(scale):
    visits, rows, heights, widths = many_images()
    anchors, sizes = crop_windows(3, visits, rows, heights, widths, view=1, scale=scale, ratio=(3 / 4, 4 / 3))
    draws = uniforms(3, visits, rows, view=1, purpose=Purpose.CROP, num_draws=22)
    expected = [torchvision_window(draws[i], heights[i], widths[i], scale, (3 / 4, 4 / 3)) for i in range(len(rows))]
    assert [(tuple(a), tuple(s)) for a, s in zip(anchors.tolist(), sizes.tolist(), strict=True)] == expected


def test_windows_lie_inside_images_of_any_shape():
    heights, widths = np.array([1, 1, 1, 500, 3, 1000, 2]), np.array([1, 500, 2, 1, 1000, 3, 1])
    for seed in range(30):
        anchors, sizes = crop_windows(
            seed, np.zeros(7, int), np.arange(7), heights, widths, view=0, scale=(0.01, 1.0), ratio=(3 / 4, 4 / 3)
        )
        assert (anchors >= 0).all()
        assert (sizes >= 1).all()
        assert (anchors + sizes <= np.stack([heights, widths], axis=1)).all()


def test_window_areas_and_ratios_are_uniform_and_log_uniform():
    rows = np.arange(20_000)
    size = np.full(len(rows), 2000)
    _, sizes = crop_windows(1, rows * 0, rows, size, size, view=0, scale=(0.2, 0.5), ratio=(3 / 4, 4 / 3))
    area, ratio = sizes.prod(axis=1) / 2000**2, np.log(sizes[:, 1] / sizes[:, 0])
    assert np.abs(np.quantile(area, [0.25, 0.5, 0.75]) - [0.275, 0.35, 0.425]).max() < 0.005
    assert np.abs(np.quantile(ratio, [0.25, 0.5, 0.75]) - np.log(4 / 3) * np.array([-0.5, 0.0, 0.5])).max() < 0.01


def test_parameters_do_not_depend_on_the_batch():
    visits, rows, heights, widths = many_images(67)
    config = AugmentConfig(blur_probability=0.5, solarize_probability=0.3, jitter_probability=0.7)
    windows = crop_windows(3, visits, rows, heights, widths, view=0, scale=(0.2, 1.0), ratio=(0.5, 2.0))
    colors = color_factors(3, visits, rows, view=0, config=config)
    for start, stop in [(0, 1), (1, 3), (3, 36), (36, 67)]:
        part = slice(start, stop)
        of_part = crop_windows(
            3, visits[part], rows[part], heights[part], widths[part], view=0, scale=(0.2, 1.0), ratio=(0.5, 2.0)
        )
        assert all(np.array_equal(a[part], b) for a, b in zip(windows, of_part, strict=True))
        colors_of_part = color_factors(3, visits[part], rows[part], view=0, config=config)
        for name, values in vars(colors_of_part).items():
            assert np.array_equal(getattr(colors, name)[part], values), name


def test_views_and_visits_and_seeds_have_parameters_of_their_own():
    def factors(seed=0, visit=0, view=0):
        return color_factors(seed, [visit], [7], view=view, config=AugmentConfig()).factors_B4.tobytes()

    assert len({factors(), factors(seed=1), factors(visit=1), factors(view=1), factors(seed=1, visit=1)}) == 5


def test_color_factors_have_torchvisions_distributions():
    rows = np.arange(24_000)
    config = AugmentConfig(
        jitter=(0.4, 1.5, 0.2, 0.1), jitter_probability=0.8, grayscale_probability=0.2, flip_probability=0.5,
        blur_probability=0.3, solarize_probability=0.1,
    )  # fmt: skip
    factors = color_factors(5, rows * 0, rows, view=0, config=config)
    low, high = factors.factors_B4.min(axis=0), factors.factors_B4.max(axis=0)
    assert low == pytest.approx([0.6, 0.0, 0.8, -0.1], abs=1e-3)
    assert high == pytest.approx([1.4, 2.5, 1.2, 0.1], abs=1e-3)
    assert factors.factors_B4.mean(axis=0) == pytest.approx([1.0, 1.25, 1.0, 0.0], abs=0.015)
    chosen = [factors.jitter_B, factors.grayscale_B, factors.flip_B, factors.sigma_B > 0, factors.solarize_B]
    assert [float(c.mean()) for c in chosen] == pytest.approx([0.8, 0.2, 0.5, 0.3, 0.1], abs=0.015)
    sigmas = factors.sigma_B[factors.sigma_B > 0]
    assert (float(sigmas.min()), float(sigmas.max())) == pytest.approx((0.1, 2.0), abs=0.01)
    assert (np.sort(factors.order_B4, axis=1) == np.arange(4)).all()
    _, counts = np.unique(factors.order_B4 @ [64, 16, 4, 1], return_counts=True)
    # 23 degrees of freedom: 70 is exceeded once in a million times.
    assert len(counts) == 24
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 70


def test_disabled_operations_choose_nothing():
    config = AugmentConfig(jitter=(0.0,) * 4, grayscale_probability=0.0, flip_probability=0.0)
    factors = color_factors(0, np.zeros(50, int), np.arange(50), view=0, config=config)
    chosen = (factors.jitter_B, factors.grayscale_B, factors.flip_B, factors.sigma_B, factors.solarize_B)
    assert not any(c.any() for c in chosen)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (32, 32), (100, 1000)])
def test_eval_windows_are_the_central_crop_of_the_resized_image(height, width):
    anchors, sizes = eval_windows([height], [width], resize=256, crop=224)
    scale = min(height, width) / 256
    assert sizes[0] == pytest.approx([224 * scale] * 2, abs=0.6)
    assert anchors[0] + sizes[0] / 2 == pytest.approx([height / 2, width / 2], abs=0.5 + scale)
    assert (anchors >= 0).all()
    assert (anchors + sizes <= [height, width]).all()


def test_the_eval_window_of_a_crop_as_large_as_the_resize_is_the_whole_square():
    anchors, sizes = eval_windows([32, 1], [32, 1], resize=32, crop=32)
    assert anchors.tolist() == [[0, 0], [0, 0]]
    assert sizes.tolist() == [[32, 32], [1, 1]]
    with pytest.raises(ValueError, match="crop <= resize"):
        eval_windows([32], [32], resize=32, crop=33)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"ratio": (2.0, 1.0)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"jitter": (-0.1, 0.4, 0.4, 0.4)},
        {"flip_probability": 1.5},
        {"order": ("jitter", "jitter")},
        {"blur_sigma": (0.0, 1.0)},
        {"std": (0.2, 0.0, 0.2)},
        {"mean": (0.5, 0.5)},
        {"num_views": 0},
    ],
)
def test_a_field_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"AugmentConfig.{next(iter(wrong))}: found .* expected"):
        AugmentConfig(**wrong)


def test_the_whole_hue_circle_is_allowed():
    assert AugmentConfig(jitter=(0.0, 0.0, 0.0, 0.5)).jitter[HUE] == 0.5
