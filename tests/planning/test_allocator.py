"""The caching allocator, followed by hand."""

from lora_sft.planning.allocator import CachingAllocator, reserved_bytes, rounded

MIB = 2**20


def test_blocks_are_multiples_of_512_bytes():
    assert [rounded(count) for count in (0, 1, 512, 513, 2**20)] == [512, 512, 512, 1024, 2**20]


def test_small_blocks_share_a_segment_of_two_mebibytes():
    allocator = CachingAllocator()
    for number in range(4):
        allocator.take(number, MIB // 2)
    assert allocator.reserved == 2 * MIB
    allocator.take(4, 1)
    assert allocator.reserved == 4 * MIB


def test_blocks_below_ten_mebibytes_share_twenty_and_larger_ones_have_their_own():
    allocator = CachingAllocator()
    allocator.take(0, 9 * MIB)
    allocator.take(1, 9 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.take(2, 11 * MIB)
    assert allocator.reserved == (20 + 12) * MIB, "in steps of two"


def test_what_is_given_back_is_used_again_and_never_leaves():
    allocator = CachingAllocator()
    allocator.take(0, 30 * MIB)
    allocator.give_back(0)
    allocator.take(1, 20 * MIB)
    allocator.take(2, 8 * MIB)
    assert allocator.reserved == 30 * MIB, "the second lies in what the first has left over"
    allocator.give_back(1)
    allocator.give_back(2)
    allocator.take(3, 30 * MIB)
    assert allocator.reserved == 30 * MIB, "free neighbours become one again"


def test_a_gap_that_is_too_small_is_no_use():
    """Two blocks of 12 MiB do not make room for one of 24."""
    sizes = [12 * MIB, 12 * MIB, 24 * MIB]
    assert reserved_bytes(sizes, [0, 1, ~0, ~1, 2]) == 48 * MIB


def test_the_smallest_gap_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    for number, size in enumerate((40, 60, 20)):
        allocator.take(number, size * MIB)
    for number in range(3):
        allocator.give_back(number)
    allocator.take(3, 20 * MIB)
    allocator.take(4, 40 * MIB)
    allocator.take(5, 60 * MIB)
    assert allocator.reserved == 120 * MIB
