/* SPDX-License-Identifier: Apache-2.0 */
/* Bit for bit what F16C's instructions give, NaN payloads included, so that levels agree. */
#include "core/core.h"

#include <string.h>

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

float fkv_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = h >> 10 & 0x1fu;
    uint32_t fraction = h & 0x3ffu;
    if (exponent == 0x1f) {
        uint32_t quiet = fraction ? 0x400000u : 0;
        return float_of(sign | 0x7f800000u | quiet | fraction << 13);
    }
    if (exponent == 0) {
        float magnitude = (float)fraction * 0x1p-24f; /* exact */
        return float_of(sign | bits_of(magnitude));
    }
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t fkv_f32_to_f16(float x) {
    uint32_t u = bits_of(x);
    uint32_t sign = u >> 16 & 0x8000u;
    uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    }
    if (magnitude >= 0x477ff000u) { /* 65520: halfway to the first value that does not exist */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude >= 0x38800000u) { /* 2^-14: normal; a carry may run into the exponent, rightly */
        uint32_t odd = magnitude >> 13 & 1u;
        return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
    }
    uint32_t exponent = magnitude >> 23;
    if (exponent < 102) { /* below half of the least subnormal, 2^-24 */
        return (uint16_t)sign;
    }
    uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t shift = 126 - exponent; /* 14..24 */
    uint32_t result = fraction >> shift;
    uint32_t rest = fraction & ((1u << shift) - 1);
    uint32_t half = 1u << (shift - 1);
    result += rest > half || (rest == half && (result & 1u));
    return (uint16_t)(sign | result);
}

float fkv_bf16_to_f32(uint16_t h) {
    return float_of((uint32_t)h << 16);
}

uint16_t fkv_f32_to_bf16(float x) {
    uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(u >> 16 | 0x40u);
    }
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

float fkv_load_element(const void *p, fkv_dtype dtype) {
    if (dtype == FKV_DTYPE_F32) {
        float x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return dtype == FKV_DTYPE_F16 ? fkv_f16_to_f32(h) : fkv_bf16_to_f32(h);
}

void fkv_store_element(void *p, fkv_dtype dtype, float x) {
    if (dtype == FKV_DTYPE_F32) {
        memcpy(p, &x, sizeof x);
        return;
    }
    uint16_t h = dtype == FKV_DTYPE_F16 ? fkv_f32_to_f16(x) : fkv_f32_to_bf16(x);
    memcpy(p, &h, sizeof h);
}
