/* Codes of fewer than 8 bits, packed. A row is a bit stream: the first code in the lowest bits of the first byte. */
#ifndef MQ_PACK_H
#define MQ_PACK_H

#include "core/mq.h"

MQ_INLINE int64_t mq_packed_bytes(int64_t n, int bits) { return MQ_CEIL_DIV(n * bits, (int64_t)8); }

/* n codes of bits bits each (1 to 8), a byte per code, to mq_packed_bytes(n, bits) bytes; unused bits are 0. */
void mq_pack_bits(const uint8_t *codes, int64_t n, int bits, uint8_t *packed);
void mq_unpack_bits(const uint8_t *packed, int64_t n, int bits, uint8_t *codes);

/* Two rows of 4-bit codes share bytes: low nibble from the even row, high nibble from the odd one. */
void mq_pack_row_pair(const uint8_t *even, const uint8_t *odd, int64_t n, uint8_t *packed);
void mq_unpack_row_pair(const uint8_t *packed, int64_t n, uint8_t *even, uint8_t *odd);

#endif
