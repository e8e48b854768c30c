"""What the leak scripts share: run a round many times and compare what is there before and after.

Counted: Python's allocated blocks, the core's live allocations, resident memory, and references to the extension's types.
"""
import gc
import sys

import modelq._core as core

ROUNDS = 1000
BLOCKS = ROUNDS // 10          # noise of interned strings, free lists, caches: far less than one per round
RESIDENT = 24 << 20            # bytes: the allocator's own slack


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def types() -> dict[str, int]:
    return {name: sys.getrefcount(value) for name, value in vars(core).items() if isinstance(value, type)}


def state() -> tuple[int, int, int, dict[str, int]]:
    gc.collect()
    return sys.getallocatedblocks(), core._alloc_live(), resident(), types()


def check(one_round, rounds: int = ROUNDS) -> None:
    for _ in range(rounds):   # fills caches and free lists
        one_round()
    blocks, live, memory, references = state()
    for _ in range(rounds):
        one_round()
    blocks_after, live_after, memory_after, references_after = state()
    assert live_after == live, f"{live_after - live} allocations of the core left after {rounds} rounds"
    assert blocks_after - blocks < max(BLOCKS, rounds // 10), f"{blocks_after - blocks} Python blocks left after {rounds} rounds"
    assert references_after == references, f"references to types: {references} -> {references_after}"
    assert memory_after - memory < RESIDENT, f"{(memory_after - memory) >> 20} MiB more resident after {rounds} rounds"
    print("no leak")
