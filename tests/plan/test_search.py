"""The search of the largest batch, on machines whose memory is a known function of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nag_jax.plan.search import LARGEST_GROWTH, Attempt, Largest, largest_fitting


class Machine:
    """Memory fixed + slope * batch, with what was asked of it; `blind` does not say how much it needs."""

    def __init__(self, fixed: float, slope: float, limit: float, blind: bool = False):
        self.fixed, self.slope, self.limit, self.blind = fixed, slope, limit, blind

    def attempt(self, size: int) -> Attempt:
        needed = self.fixed + self.slope * size
        return Attempt(needed <= self.limit, None if self.blind else needed)

    def search(self, first: int, max_attempts: int = 6) -> tuple[Largest, int]:
        known = {first: self.attempt(first)}
        found = largest_fitting(
            self.attempt, known, limit=self.limit, fixed_bytes=self.fixed, max_attempts=max_attempts
        )
        return found, len(known)


@given(
    fixed=st.floats(0, 50), slope=st.floats(0.5, 20), first=st.integers(1, 64), blind=st.booleans()
)
def test_the_bracket_holds_the_truth_and_is_narrow_with_enough_attempts(fixed, slope, first, blind):
    machine = Machine(fixed, slope, 100.0, blind)
    found, _ = machine.search(first, max_attempts=100)
    truth = int((100.0 - fixed) / slope)
    assert found.fits <= truth
    if found.too_large is None:
        assert found.fits == LARGEST_GROWTH * first
    else:
        assert truth < found.too_large <= found.fits + max(1, found.fits // 8)


def test_linear_memory_is_found_in_a_few_attempts():
    machine = Machine(fixed=10.0, slope=1.0, limit=100.0)
    found, attempts = machine.search(8)
    assert found.fits <= 90 < found.too_large
    assert found.fits >= 80 and attempts <= 4


def test_a_compiler_that_understates_what_is_missing_is_not_followed_one_by_one():
    """It says a twentieth less of what does not fit, so that the line meets the limit too late every time."""

    class Understating(Machine):
        def attempt(self, size: int) -> Attempt:
            fits, needed = super().attempt(size)
            return Attempt(fits, needed if fits else max(0.95 * needed, self.limit))

    found, attempts = Understating(fixed=0.0, slope=0.1, limit=100.0).search(8000)
    assert found.fits >= 1000 * 7 / 8 and attempts <= 4


def test_it_ends_after_so_many_attempts():
    found, attempts = Machine(fixed=0.0, slope=1e-9, limit=1.0).search(1, max_attempts=2)
    assert attempts == 2 and found == Largest(8, None)


def test_it_ends_where_memory_is_no_concern():
    found, attempts = Machine(fixed=0.0, slope=1e-9, limit=1.0).search(4)
    assert (found, attempts) == (Largest(4 * LARGEST_GROWTH, None), 3)


def test_nothing_fits():
    found, _ = Machine(fixed=200.0, slope=1.0, limit=100.0).search(8)
    assert found == Largest(0, 1)


@pytest.mark.parametrize("first", [3, 90, 91, 500])
def test_any_start(first):
    found, _ = Machine(fixed=10.0, slope=1.0, limit=100.0).search(first, max_attempts=20)
    assert found.fits <= 90 < found.too_large
