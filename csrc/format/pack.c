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

/* Eight codes of b bits are exactly b bytes. The last group may be short: then only its own bytes are touched. */
static void pack_group(const uint8_t *codes, int64_t n, int bits, uint8_t *packed)
{
    uint64_t word = 0, mask = (1u << bits) - 1u;
    for (int64_t i = 0; i < n; i++) word |= (codes[i] & mask) << (i * bits);
    for (int64_t i = 0; i < mq_packed_bytes(n, bits); i++) packed[i] = (uint8_t)(word >> (8 * i));
}

static void unpack_group(const uint8_t *packed, int64_t n, int bits, uint8_t *codes)
{
    uint64_t word = 0, mask = (1u << bits) - 1u;
    for (int64_t i = 0; i < mq_packed_bytes(n, bits); i++) word |= (uint64_t)packed[i] << (8 * i);
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(word >> (i * bits) & mask);
}

void mq_pack_bits(const uint8_t *codes, int64_t n, int bits, uint8_t *packed)
{
    if (bits == 4) {
        pack_nibbles(codes, n, packed);
        return;
    }
    for (; n >= 8; n -= 8, codes += 8, packed += bits) pack_group(codes, 8, bits, packed);
    if (n > 0) pack_group(codes, n, bits, packed);
}

void mq_unpack_bits(const uint8_t *packed, int64_t n, int bits, uint8_t *codes)
{
    if (bits == 4) {
        unpack_nibbles(packed, n, codes);
        return;
    }
    for (; n >= 8; n -= 8, codes += 8, packed += bits) unpack_group(packed, 8, bits, codes);
    if (n > 0) unpack_group(packed, n, bits, codes);
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
