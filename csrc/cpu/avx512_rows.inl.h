// Rows of activations with AVX-512: limbs, signed bytes of q, on the way in, and exact sums in float64 on the way out.
#include <immintrin.h>

#include <cstdint>

#include "rows.h"

namespace poc::cpu {
namespace {

// A tile is [k / 4][row][limb][4 k] signed bytes, the high limb first.
void quantise(const Activations& x, RowState* states, int rows, int16_t* scratch, void* tile) {
  quantise_rows(x, states, rows, scratch);
  const int limbs = x.activation_bits == 16 ? 2 : 1;
  const int64_t step = static_cast<int64_t>(rows) * limbs;  // 4-byte units from one k / 4 to the next
  for (int r = 0; r < rows; ++r) {
    const int16_t* q = scratch + r * x.k_padded;
    auto* out = static_cast<uint32_t*>(tile) + r * limbs;
    for (int64_t k = 0; k < x.k_padded; k += 16) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + k));
      alignas(16) uint32_t words[2][4];
      if (limbs == 2) {
        const __m256i hi = _mm256_srai_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(128)), 8);
        _mm_store_si128(reinterpret_cast<__m128i*>(words[0]), _mm256_cvtepi16_epi8(hi));
        _mm_store_si128(reinterpret_cast<__m128i*>(words[1]), _mm256_cvtepi16_epi8(v));  // lo is q mod 256
        for (int i = 0; i < 4; ++i) {
          out[i * step] = words[0][i];
          out[i * step + 1] = words[1][i];
        }
      } else {
        _mm_store_si128(reinterpret_cast<__m128i*>(words[0]), _mm256_cvtepi16_epi8(v));
        for (int i = 0; i < 4; ++i) out[i * step] = words[0][i];
      }
      out += 4 * step;
    }
  }
}

// 16 columns of the sums of a row.
inline void store_sums(double* sums, __m512d low, __m512d high, bool accumulate) {
  if (accumulate) {
    low = _mm512_add_pd(low, _mm512_loadu_pd(sums));
    high = _mm512_add_pd(high, _mm512_loadu_pd(sums + 8));
  }
  _mm512_storeu_pd(sums, low);
  _mm512_storeu_pd(sums + 8, high);
}

inline __m512d low_doubles(__m512i a) { return _mm512_cvtepi32_pd(_mm512_castsi512_si256(a)); }
inline __m512d high_doubles(__m512i a) { return _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(a, 1)); }

}  // namespace
}  // namespace poc::cpu
