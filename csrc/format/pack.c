#include "format/pack.h"

static void pack_nibbles(const uint8_t *codes, int64_t n, uint8_t *packed)
{
    for (int64_t i = 0; i < n / 2; i++) packed[i] = (uint8_t)((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
    if (n % 2) packed[n / 2] = codes[n - 1] & 15;
}

static void unpack_nibbles(const uint8_t *packed, int64_t n, uint8_t *codes)
{
    for (int64_t i = 0; i < n / 2; i++) {
        codes[2 * i] = packed[i] & 15;
        codes[2 * i + 1] = packed[i] >> 4;
    }
    if (n % 2) codes[n - 1] = packed[n / 2] & 15;
}

void mq_pack_bits(const uint8_t *codes, int64_t n, int bits, uint8_t *packed)
{
    if (bits == 4) {
        pack_nibbles(codes, n, packed);
        return;
    }
    uint32_t held = 0, mask = (1u << bits) - 1u;
    int count = 0;
    for (int64_t i = 0; i < n; i++) {
        held |= (codes[i] & mask) << count;
        for (count += bits; count >= 8; count -= 8, held >>= 8) *packed++ = (uint8_t)held;
    }
    if (count > 0) *packed = (uint8_t)held;
}

void mq_unpack_bits(const uint8_t *packed, int64_t n, int bits, uint8_t *codes)
{
    if (bits == 4) {
        unpack_nibbles(packed, n, codes);
        return;
    }
    uint32_t held = 0, mask = (1u << bits) - 1u;
    int count = 0;
    for (int64_t i = 0; i < n; i++, count -= bits, held >>= bits) {
        for (; count < bits; count += 8) held |= (uint32_t)*packed++ << count;
        codes[i] = (uint8_t)(held & mask);
    }
}

void mq_pack_row_pair(const uint8_t *even, const uint8_t *odd, int64_t n, uint8_t *packed)
{
    for (int64_t i = 0; i < n; i++) packed[i] = (uint8_t)((even[i] & 15) | odd[i] << 4);
}

void mq_unpack_row_pair(const uint8_t *packed, int64_t n, uint8_t *even, uint8_t *odd)
{
    for (int64_t i = 0; i < n; i++) {
        even[i] = packed[i] & 15;
        odd[i] = packed[i] >> 4;
    }
}
