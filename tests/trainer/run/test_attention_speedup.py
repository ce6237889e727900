"""Whose turn it is, and how often."""

from longreel.trainer.run.attention_speedup import take_turns


def stepping(name: str, times: list[tuple[float, ...]], order: list[str]):
    waiting = iter(times)

    def step() -> tuple[float, ...]:
        order.append(name)
        return next(waiting)

    return step


def test_medians_leave_warmups_out():
    order: list[str] = []
    steps = {
        "a": stepping("a", [(9, 99), (1, 10), (3, 30), (2, 20)], order),
        "b": stepping("b", [(9, 99), (4, 40), (6, 60), (5, 50)], order),
    }
    assert take_turns(steps, warmups=1, repeats=3) == {"a": (2, 20), "b": (5, 50)}
    turns = ["".join(order[i : i + 2]) for i in range(0, 8, 2)]
    assert set(turns) == {"ab", "ba"}


def test_the_quick_go_on_until_their_seconds_are_spent():
    order: list[str] = []
    steps = {
        "quick": stepping("quick", [(100.0, 100.0)] * 100, order),
        "slow": stepping("slow", [(700.0, 800.0)] * 100, order),
    }
    take_turns(steps, warmups=1, repeats=2, seconds=1.0)
    assert (order.count("quick"), order.count("slow")) == (1 + 5, 1 + 2)
    assert order[-3:] == ["quick"] * 3
