"""What the leak scripts share: run a round many times and compare what is there before and after.

Counted: Python's allocated blocks, the core's live allocations, resident memory, and references to the extension's types.
"""
import gc
import sys

import modelq._core as core

ROUNDS = 1000
RESIDENT = 24 << 20   # bytes: the allocator's own slack


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def types() -> dict[str, int]:
    return {name: sys.getrefcount(value) for name, value in vars(core).items() if isinstance(value, type)}


def state() -> tuple[int, int, int, dict[str, int]]:
    gc.collect()
    return sys.getallocatedblocks(), core._alloc_live(), resident(), types()


def check(one_round, rounds: int = ROUNDS) -> None:
    """A leak shows in every one of three measurements; a cache that happens to grow shows in one."""
    for _ in range(rounds):   # fills caches and free lists
        one_round()
    problems = []
    for _ in range(3):
        problems = measure(one_round, rounds)
        if not problems:
            print("no leak")
            return
    raise AssertionError(f"left after {rounds} rounds: {', '.join(problems)}")


def measure(one_round, rounds: int) -> list[str]:
    blocks, live, memory, references = state()
    for _ in range(rounds):
        one_round()
    blocks_after, live_after, memory_after, references_after = state()
    problems = [f"{live_after - live} allocations of the core"] * (live_after != live)
    problems += [f"{blocks_after - blocks} Python blocks"] * (blocks_after - blocks >= rounds // 2)   # one per round would be twice that
    problems += [f"references to types, {references} -> {references_after}"] * (references_after != references)
    problems += [f"{(memory_after - memory) >> 20} MiB resident"] * (memory_after - memory >= RESIDENT)
    return problems
