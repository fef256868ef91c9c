import numpy as np
import pytest

from dataloading.philox import Purpose, philox4x32, uniforms, words


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            0xFFFFFFFFFFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    block = philox4x32(np.array([counter], dtype=np.uint32), key)
    assert tuple(block[0].tolist()) == answer


def test_uniforms_are_uniform():
    draws = uniforms(7, np.zeros(20_000, int), np.arange(20_000), view=0, purpose=Purpose.CROP, num_draws=5)
    counts, _ = np.histogram(draws, bins=100, range=(0.0, 1.0))
    # 99 degrees of freedom: 170 is exceeded once in a hundred thousand times.
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 170
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.04


def test_a_uniform_depends_only_on_its_tuple():
    rows, visits = np.array([5, 2**33 + 1, 9]), np.array([0, 3, 1])
    together = uniforms(1, visits, rows, view=2, purpose=Purpose.FLIP, num_draws=7)
    for i in range(3):
        alone = uniforms(1, visits[i : i + 1], rows[i : i + 1], view=2, purpose=Purpose.FLIP, num_draws=3)
        assert np.array_equal(alone[0], together[i, :3])


def test_every_part_of_the_tuple_matters():
    def draw(seed=1, visit=2, row=3, view=0, purpose=Purpose.CROP):
        return tuple(uniforms(seed, [visit], [row], view=view, purpose=purpose, num_draws=2)[0].tolist())

    others = [draw(seed=2), draw(visit=3), draw(row=4), draw(row=3 + 2**32), draw(view=1), draw(purpose=Purpose.FLIP)]
    # Seed and visit are not interchangeable, as they are where they are added.
    others += [draw(seed=2, visit=1), draw(seed=3, visit=1), draw()]
    assert len(set(others)) == len(others)


def test_more_words_begin_with_the_fewer():
    many = words(1, 2**40 + 1, purpose=Purpose.BANK_START, num=11)
    assert np.array_equal(many[:4], words(1, 2**40 + 1, purpose=Purpose.BANK_START, num=4))
    assert not np.array_equal(many[:4], words(1, 1, purpose=Purpose.BANK_START, num=4))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        uniforms(seed, [0], [0], view=0, purpose=Purpose.CROP, num_draws=1)
