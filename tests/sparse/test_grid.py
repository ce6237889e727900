import pytest

from longreel.sparse.grid import TokenGrid


def test_counts():
    grid = TokenGrid(frames=5, height=3, width=4, text=7)
    assert (grid.per_frame, grid.video, len(grid)) == (12, 60, 67)


def test_is_a_value():
    grid = TokenGrid(5, 3, 4, 7)
    assert grid == TokenGrid(5, 3, 4, text=7)
    assert hash(grid) == hash(TokenGrid(5, 3, 4, 7))
    assert grid.without_text() == TokenGrid(5, 3, 4)
    with pytest.raises(AttributeError):
        grid.frames = 6  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, -1), (5, 3, 4, -1)])
def test_impossible_sizes_are_named(sizes):
    with pytest.raises(ValueError, match=r"TokenGrid\(frames=.* is not a token grid: .* at least"):
        TokenGrid(*sizes)
