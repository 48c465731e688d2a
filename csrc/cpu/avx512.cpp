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
  static inline __m512i bytes(__m512i words) {
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
