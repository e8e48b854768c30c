"""Both extensions load, and agree on what they are."""
import modelq._core as core


def test_core_and_testing_load(testing):
    assert core.__name__ == "modelq._core" and testing.__name__ == "modelq._testing"


def test_allocation_faults_count_from_the_call(testing):
    for module in (core, testing):
        module._alloc_fail_at(0)
        assert module._alloc_fail_at(1 << 40) == 0
        assert module._alloc_fail_at(0) == 0   # nothing was asked for in between
