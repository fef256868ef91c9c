"""Pictures judged pixel by pixel: each image has a colour of its own, by which it is found again."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from instdisc.pictures import image_grid, neighbours_picture

GREEN, RED = (0, 158, 115), (213, 94, 0)
TITLE = "Nearest neighbours"


def flat(colour, height=32, width=32):
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (height, width, 3)).copy()


def where(picture: Image.Image, colour):
    """Return top, bottom, left, right (inclusive) of the pixels of a colour, and how many there are."""
    found = np.argwhere((np.asarray(picture) == np.array(colour, dtype=np.uint8)).all(axis=2))
    if not len(found):
        return None
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0)
    return int(top), int(bottom), int(left), int(right), len(found)


def place(picture, colour):
    found = where(picture, colour)
    assert found is not None, f"nothing of colour {colour} was drawn"
    return found


def colour_of(row, column):
    return (10 + 40 * row, 20 + 30 * column, 200)


def example(num_rows=2, num_columns=3, correct=True, labels=True, scores=True):
    generator = np.random.default_rng(0)
    return neighbours_picture(
        [flat((250, 10 + 40 * row, 60)) for row in range(num_rows)],
        [[flat(colour_of(row, column)) for column in range(num_columns)] for row in range(num_rows)],
        [[(row + column) % 2 == 0 for column in range(num_columns)] for row in range(num_rows)] if correct else None,
        query_labels=[f"class {row}" for row in range(num_rows)] if labels else None,
        scores=generator.random((num_rows, num_columns)).tolist() if scores else None,
        title=TITLE,
    )


def test_each_row_has_its_query_on_the_left_and_its_neighbours_in_order():
    picture = example()
    for row in range(2):
        edges = [place(picture, (250, 10 + 40 * row, 60)), *(place(picture, colour_of(row, c)) for c in range(3))]
        assert len({top for top, *_ in edges}) == 1
        assert all(left[3] < right[2] for left, right in itertools.pairwise(edges))
    assert place(picture, colour_of(0, 0))[1] < place(picture, colour_of(1, 0))[0]


def test_a_neighbour_of_the_query_s_class_has_a_green_frame_and_another_a_red_one():
    picture = example()
    for row in range(2):
        for column in range(3):
            top, bottom, left, right, _ = place(picture, colour_of(row, column))
            expected = GREEN if (row + column) % 2 == 0 else RED
            middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
            around = [(left - 2, middle_y), (right + 2, middle_y), (middle_x, top - 2), (middle_x, bottom + 2)]
            assert [picture.getpixel(point) for point in around] == [expected] * 4


def test_the_marks_tell_right_from_wrong_without_colour():
    picture = example(num_rows=1, num_columns=2, scores=False).convert("L")
    corners = []
    for column in range(2):
        _, bottom, _, right, _ = place(example(num_rows=1, num_columns=2, scores=False), colour_of(0, column))
        box = picture.crop((right - 13, bottom - 13, right + 2, bottom + 2))
        corners.append(np.asarray(box) > 200)
    assert corners[0].any()
    assert corners[1].any()
    assert (corners[0] != corners[1]).mean() > 0.1


def test_without_classes_there_is_neither_frame_nor_mark():
    picture = example(correct=False)
    assert where(picture, GREEN) is None
    assert where(picture, RED) is None
    assert place(picture, colour_of(0, 0))[4] == 96 * 96


def test_small_images_are_drawn_with_equally_big_pixels_and_no_other_colours():
    board = flat((0, 0, 250))
    board[(np.indices((32, 32)).sum(axis=0) % 2) == 1] = (0, 250, 0)
    picture = neighbours_picture([flat((250, 0, 0))], [[board]], None, query_labels=None, title=TITLE)
    top, _, left, _, _ = place(picture, (0, 0, 250))
    drawn = np.asarray(picture)[top : top + 96, left : left + 96]
    np.testing.assert_array_equal(drawn, board.repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize(("side", "cell"), [(28, 84), (32, 96), (48, 96), (64, 128), (65, 112), (500, 112)])
def test_small_cells_are_whole_multiples_and_large_images_are_reduced(side, cell):
    picture = neighbours_picture(
        [flat((250, 0, 0), side, side)], [[flat((0, 0, 250), side, side)]], None, query_labels=None, title=TITLE
    )
    top, bottom, left, right, count = place(picture, (0, 0, 250))
    assert (bottom - top + 1, right - left + 1, count) == (cell, cell, cell * cell)


def test_large_images_keep_their_proportions():
    picture = neighbours_picture(
        [flat((250, 0, 0), 100, 400)], [[flat((0, 0, 250), 300, 150)]], None, query_labels=None, title=TITLE
    )
    top, bottom, left, right, _ = place(picture, (250, 0, 0))
    assert (bottom - top + 1, right - left + 1) == (28, 112)
    top, bottom, left, right, _ = place(picture, (0, 0, 250))
    assert (bottom - top + 1, right - left + 1) == (112, 56)


def test_a_long_label_ends_before_the_neighbours_and_a_long_title_widens_the_picture():
    def picture(label, title=TITLE):
        return neighbours_picture(
            [flat((250, 0, 0))], [[flat((0, 0, 250))] * 8], None, query_labels=[label], title=title
        )

    short, long = np.asarray(picture("dog")), np.asarray(picture("soft-coated wheaten terrier of the north"))
    first_neighbour = place(picture("dog"), (0, 0, 250))[2]
    assert (short != long).any()
    np.testing.assert_array_equal(short[:, first_neighbour - 4 :], long[:, first_neighbour - 4 :])
    wide = np.asarray(picture("dog", "A title with very many words " * 6))
    assert wide.shape[1] > short.shape[1]
    assert (wide[:, -20:] == 255).all()


def test_rows_may_have_different_numbers_of_neighbours():
    picture = neighbours_picture(
        [flat((250, 0, 0)), flat((250, 90, 0))],
        [[flat((0, 0, 250))] * 3, [flat((0, 250, 0))]],
        None,
        query_labels=None,
        title=TITLE,
    )
    assert place(picture, (0, 0, 250))[4] == 3 * place(picture, (0, 250, 0))[4]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"queries": []}, "at least one query"),
        ({"neighbours": [[]]}, "at least one neighbour"),
        ({"correct": [[True, True]]}, "`correct`"),
        ({"scores": [[]]}, "`scores`"),
        ({"query_labels": ["a", "b"]}, "2 labels"),
        ({"queries": [np.zeros((32, 32), np.uint8)]}, r"\(height, width, 3\)"),
        ({"queries": [np.zeros((32, 32, 3), np.float32)]}, "float32"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_was_found(changed, expected):
    arguments = {
        "queries": [flat((1, 2, 3))],
        "neighbours": [[flat((3, 2, 1))]],
        "correct": [[True]],
        "scores": [[0.5]],
        "query_labels": ["a"],
        "title": TITLE,
    }
    with pytest.raises(ValueError, match=expected):
        neighbours_picture(**{**arguments, **changed})


@pytest.mark.parametrize("columns", [1, 3, 8])
def test_the_grid_equals_torchvision_s_grid_of_the_images_before_they_were_normalised(columns):
    original_BCHW = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 3, 7, 9), dtype=np.uint8))
    mean, std = (0.48, 0.45, 0.40), (0.23, 0.22, 0.27)
    shape = (1, 3, 1, 1)
    normalised_BCHW = (original_BCHW / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    grid = image_grid(normalised_BCHW, mean, std, columns=columns)
    expected = make_grid(original_BCHW, nrow=columns, padding=2, pad_value=255)[:, 2:-2, 2:-2].permute(1, 2, 0).numpy()
    is_pad = (make_grid(torch.ones(5, 1, 7, 9), nrow=columns, padding=2)[0, 2:-2, 2:-2] == 0).numpy()
    np.testing.assert_array_equal(grid[~is_pad], expected[~is_pad])
    assert (grid[is_pad] == grid[is_pad][:1]).all()
    np.testing.assert_array_equal(grid, image_grid(normalised_BCHW.numpy(), mean, std, columns=columns))


def test_the_grid_takes_bfloat16_and_cuts_what_is_out_of_range():
    images_BCHW = torch.tensor([-9.0, 0.5, 9.0, float("nan")], dtype=torch.bfloat16).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    grid = image_grid(images_BCHW, (0.0,) * 3, (1.0,) * 3, columns=4)
    assert grid[0, ::3, 0].tolist() == [0, 128, 255, 0]


def test_the_grid_refuses_what_is_not_a_batch_of_images():
    with pytest.raises(ValueError, match=r"\(5, 7, 9\)"):
        image_grid(np.zeros((5, 7, 9), np.float32), (0.0,) * 3, (1.0,) * 3, columns=2)


def test_enlarged_images_are_squares_of_equal_pixels():
    images_BCHW = np.random.default_rng(0).random((3, 3, 5, 7), dtype=np.float32)
    small, large = (image_grid(images_BCHW, (0.0,) * 3, (1.0,) * 3, columns=1, enlarge=e) for e in (1, 3))
    assert large.shape == (3 * 15 + 4, 21, 3)
    np.testing.assert_array_equal(large[:15:3, ::3], small[:5])
    np.testing.assert_array_equal(large[2:15:3, 2::3], small[:5])
