"""A cost is told round by round, so that a machine that slows down adds nothing to it."""

from benchmarks.wiping import compared


def test_each_round_is_compared_with_itself() -> None:
    slower_and_slower = [{"append": 10.0 * factor} for factor in (1, 2, 4, 8, 16)]
    wiping = [{"append": one["append"] * 1.25} for one in slower_and_slower]
    (cost,) = compared({"off": slower_and_slower, "on": wiping}).values()
    assert cost == {"off_ms": 40.0, "on_ms": 50.0, "cost": 0.25, "from": 0.25, "to": 0.25}
