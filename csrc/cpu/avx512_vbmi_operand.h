// `struct Operand` of avx512_draw.inl.h for CPUs with VBMI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../definition.h"

namespace poc::cpu {
namespace {

// v + 128 by a 7-bit index: a, sign, b from the lowest bit up.
struct ByteTable {
  alignas(64) uint8_t bytes[128];
};

constexpr ByteTable make_table() {
  ByteTable table{};
  for (int index = 0; index < 128; ++index) {
    const int u = table_entry(kTableA, index & 7) + table_entry(kTableB, index >> 4);
    table.bytes[index] = static_cast<uint8_t>((index & 8) != 0 ? 127 - u : 128 + u);
  }
  return table;
}
constexpr ByteTable kTable = make_table();

constexpr int kOrder[4] = {0, 2, 1, 3};

// Of two vectors of int32, in the order of entries: 32 lowest bytes, then 32 second bytes.
struct PackIndex {
  alignas(64) uint8_t bytes[64];
};

constexpr PackIndex make_pack() {
  PackIndex pack{};
  for (int i = 0; i < 32; ++i) {
    const int k = i / 4 * 4 + kOrder[i % 4];
    pack.bytes[i] = static_cast<uint8_t>(4 * k);
    pack.bytes[32 + i] = static_cast<uint8_t>(4 * k + 1);
  }
  return pack;
}
constexpr PackIndex kPack = make_pack();

struct Operand {
  static constexpr const int (&kOrder)[4] = poc::cpu::kOrder;

  static inline __m512i entries(__m512i words) {
    // An index has a and sign in its lower nibble, b above. In this order two nibbles of each half of a word are where
    // they belong: the lower ones of bytes 0 and 1, the upper ones of bytes 2 and 3. One multishift moves the others.
    const __m512i moved = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2C24342C0C04140C), words);
    const __m512i in_place = _mm512_set1_epi32(static_cast<int>(0xF0F00F0Fu));
    const __m512i index = _mm512_ternarylogic_epi64(in_place, words, moved, 0xCA);
    return _mm512_permutex2var_epi8(_mm512_load_si512(kTable.bytes), index, _mm512_load_si512(kTable.bytes + 64));
  }

  static inline __m512i bytes(const __m512i (&q)[4]) {
    __m512i high, low;
    limbs(q, high, low);
    return low;
  }
  static inline void limbs(const __m512i (&q)[4], __m512i& high, __m512i& low) {
    const __m512i pack = _mm512_load_si512(kPack.bytes), bias = _mm512_set1_epi32(128);
    __m512i biased[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) biased[i] = _mm512_add_epi32(q[i], bias);
    const __m512i first = _mm512_permutex2var_epi8(biased[0], pack, biased[1]);
    const __m512i second = _mm512_permutex2var_epi8(biased[2], pack, biased[3]);
    high = _mm512_shuffle_i64x2(first, second, 0xEE);
    low = _mm512_xor_si512(_mm512_shuffle_i64x2(first, second, 0x44), _mm512_set1_epi8(-128));
  }
};

}  // namespace
}  // namespace poc::cpu
