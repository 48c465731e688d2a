// AVX-512 with VNNI but without VBMI: Cascade Lake, Cooper Lake.
#include <immintrin.h>

#include <cstdint>

#include "../definition.h"

namespace poc::cpu {
namespace {

struct Operand {
  // The four nibbles of the upper or lower half of each word, one per byte: `halves` holds each byte of that half
  // twice.
  static inline __m512i nibbles(__m512i halves) {
    const __m512i shifted = _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAAu, halves, _mm512_srli_epi16(halves, 4));
    return _mm512_and_si512(shifted, _mm512_set1_epi8(0x0F));
  }
  static constexpr int kOrder[4] = {0, 1, 2, 3};

  static inline __m512i entries(__m512i words) {
    const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
    const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
    const __m512i a = nibbles(_mm512_shuffle_epi8(words, low)), b = nibbles(_mm512_shuffle_epi8(words, high));
    // Eight entries, then the same again: bit 3 of a is the sign, bit 3 of b is not used.
    const __m512i u = _mm512_add_epi8(_mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(kTableA)), a),
                                      _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(kTableB)), b));
    const __m512i signs =
        _mm512_broadcast_i32x4(_mm_set_epi64x(0x7F7F7F7F7F7F7F7F, static_cast<int64_t>(0x8080808080808080u)));
    return _mm512_xor_si512(u, _mm512_shuffle_epi8(signs, a));
  }

  // Bytes of 64 int32, each in the range of an int8.
  static inline __m512i bytes(const __m512i (&q)[4]) {
    // Packing works within 128 bits: fours of k come out in the order 0, 4, 8, 12, 1, 5, ...
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
  }
  static inline void limbs(const __m512i (&q)[4], __m512i& high, __m512i& low) {
    __m512i highs[4], lows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      highs[i] = _mm512_srai_epi32(_mm512_add_epi32(q[i], _mm512_set1_epi32(128)), 8);
      lows[i] = _mm512_sub_epi32(q[i], _mm512_slli_epi32(highs[i], 8));
    }
    high = bytes(highs);
    low = bytes(lows);
  }
};

}  // namespace
}  // namespace poc::cpu

#include "avx512.inl.h"

namespace poc::cpu {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512", has_avx512_vnni);
  return kernels;
}

}  // namespace poc::cpu
