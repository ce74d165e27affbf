/* SPDX-License-Identifier: Apache-2.0 */
/* One packed code at a time, for the reference kernels and for reading back; kernels.h has the layout. */
#ifndef FKV_KERNELS_PACKED_H
#define FKV_KERNELS_PACKED_H

#include <stddef.h>
#include <stdint.h>

static inline unsigned fkv_packed_half(const uint8_t *p) {
    return p[0] | (unsigned)p[1] << 8;
}

static inline uint32_t fkv_packed_word(const uint8_t *p) {
    return fkv_packed_half(p) | (uint32_t)fkv_packed_half(p + 2) << 16;
}

/* Token t of the keys' channel that begins at `channel`. */
static inline unsigned fkv_packed_key(const uint8_t *channel, int bits, int t) {
    const int v = t / 16, i = t % 16;
    if (bits == 8)
        return channel[t];
    if (bits == 4)
        return fkv_packed_half(channel + 2 * i) >> 4 * v & 15;
    unsigned low = channel[i] >> 2 * v & 3;
    return bits == 2 ? low : low | (fkv_packed_half(channel + 16 + 2 * v) >> i & 1) << 2;
}

/* Code of `bits` bits in the words [64 / S][channels] at p, S = 32 / bits. */
static inline unsigned fkv_packed_in_words(const uint8_t *p, int bits, int channels, int t, int c) {
    const int S = 32 / bits;
    return fkv_packed_word(p + 4 * ((ptrdiff_t)(t / S) * channels + c)) >> t % S * bits &
           ((1u << bits) - 1);
}

/* Token t of channel c of the values' class that begins at `class` and has n channels. */
static inline unsigned fkv_packed_value(const uint8_t *class, int bits, int n, int t, int c) {
    if (bits != 3)
        return fkv_packed_in_words(class, bits, n, t, c);
    return fkv_packed_in_words(class, 2, n, t, c) |
           fkv_packed_in_words(class + 16 * (ptrdiff_t)n, 1, n, t, c) << 2;
}

#endif /* FKV_KERNELS_PACKED_H */
