import numpy as np
import pytest
import torch

from dataloading import color_batch
from dataloading.augment import CONTRAST, HUE, AugmentConfig, ColorFactors, color_factors, kernel_size
from dataloading.color import augment_colors
from dataloading.torch_loader import reference_colors

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EVERYTHING = AugmentConfig(blur_probability=0.5, solarize_probability=0.5)


def images_of(num: int, size: int) -> torch.Tensor:
    """Return random images, among them gray, black-and-white and flat ones, where hue has its corners."""
    images = torch.randint(0, 256, (num, 3, size, size), generator=torch.Generator().manual_seed(num)) / 255.0
    images[::7] = images[::7].mean(dim=1, keepdim=True)
    images[3::7] = (images[3::7] > 0.5).float()
    images[5::7] = images[5::7, :, :1, :1]
    return images


def factors_of(num: int, config: AugmentConfig) -> ColorFactors:
    return color_factors(3, np.arange(num) % 3, np.arange(num), view=0, config=config)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The chains differ by the rounding of float32 in a dozen operations, of which contrast and saturation amplify.
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(**PLAIN),
        AugmentConfig(order=("jitter", "grayscale"), **PLAIN),
        AugmentConfig(jitter=(0.8, 0.8, 0.8, 0.5), jitter_probability=0.8, **PLAIN),
        AugmentConfig(jitter=(0.0, 0.0, 0.0, 0.5), **PLAIN),
        AugmentConfig(jitter=(0.4, 0.0, 0.4, 0.0), blur_probability=0.5, **PLAIN),
        AugmentConfig(jitter=(0.0, 0.0, 0.0, 0.0), solarize_probability=0.5, **PLAIN),
    ],
)
def test_colors_equal_torchvisions_within_4e_6(config):
    images, factors = images_of(160, 24), factors_of(160, config)
    expected = reference_colors(images.double(), factors, config)
    assert (augment_colors(images.clone(), factors, config) - expected).abs().max() < 4e-6


@pytest.mark.parametrize("size", [1, 17, 64, 225])
@pytest.mark.parametrize("order", [("grayscale", "jitter"), ("jitter", "grayscale")])
def test_the_compiled_chain_has_the_bits_of_the_batched_one(size, order):
    """GPUs run the batched chain; the kernels of CPUs are compiled from the same operations."""
    config = AugmentConfig(
        jitter=(0.8, 0.8, 0.8, 0.5), order=order, jitter_probability=0.9, blur_probability=0.5,
        solarize_probability=0.5, **PLAIN,
    )  # fmt: skip
    images, factors = images_of(64, size), factors_of(64, config)
    expected = images.clone()
    color_batch.augment_colors(expected, factors, config)
    assert torch.equal(augment_colors(images, factors, config), expected)


def test_normalised_images_equal_torchvisions():
    config = AugmentConfig(jitter=(0.0,) * 4)
    images, factors = images_of(40, 24), factors_of(40, config)
    expected = reference_colors(images, factors, config)
    assert (augment_colors(images.clone(), factors, config) - expected).abs().max() < 2e-6


def test_a_wrong_hue_would_be_seen():
    """The comparison above can fail: a hue off by a thousandth of the circle is far beyond its tolerance."""
    config = AugmentConfig(jitter=(0.0, 0.0, 0.0, 0.5), **PLAIN)
    images, factors = images_of(40, 24), factors_of(40, config)
    expected = augment_colors(images.clone(), factors, config)
    factors.factors_B4[:, HUE] += 0.001
    assert (augment_colors(images.clone(), factors, config) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("size", "lengths"), [(17, range(1, 66)), (32, range(1, 66, 16))])
def test_an_images_bits_do_not_depend_on_batch_or_threads(size, lengths, one_thread):
    images, factors = images_of(65, size), factors_of(65, EVERYTHING)
    whole = augment_colors(images.clone(), factors, EVERYTHING)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for length in lengths:
            start = (length * 13) % (66 - length)
            part = slice(start, start + length)
            assert torch.equal(augment_colors(images[part].clone(), factors[part], EVERYTHING), whole[part])
        order = np.random.default_rng(num_threads).permutation(65)
        shuffled = augment_colors(images[torch.from_numpy(order)], factors[order], EVERYTHING)
        assert torch.equal(shuffled, whole[torch.from_numpy(order)])


def test_large_images_have_the_same_bits_with_several_threads(one_thread):
    images, factors = images_of(3, 225), factors_of(3, EVERYTHING)
    alone = torch.cat([augment_colors(images[i : i + 1].clone(), factors[i : i + 1], EVERYTHING) for i in range(3)])
    torch.set_num_threads(2)
    assert torch.equal(augment_colors(images.clone(), factors, EVERYTHING), alone)


def test_contrast_keeps_the_mean_of_a_flat_image_exactly():
    config = AugmentConfig(jitter=(0.0, 0.5, 0.0, 0.0), flip_probability=0.0, grayscale_probability=0.0, **PLAIN)
    factors = factors_of(4, config)
    factors.factors_B4[:, CONTRAST] = [0.5, 0.8, 1.2, 1.5]
    gray = torch.full((4, 3, 30, 30), 0.6)
    # torchvision's luma weights add up to 0.9999.
    assert (augment_colors(gray.clone(), factors, config) - 0.6).abs().max() < 0.5 * 0.6 * 1.1e-4


def test_a_batch_without_samples_stays_one():
    none = factors_of(1, AugmentConfig())[np.empty(0, dtype=np.int64)]
    assert augment_colors(torch.empty((0, 3, 8, 8)), none, AugmentConfig()).shape == (0, 3, 8, 8)


def test_the_blurs_kernel_is_odd_and_about_a_tenth_of_the_image():
    assert [kernel_size(size) for size in (224, 96, 32, 16)] == [23, 9, 3, 1]
