// Rows of activations with AVX-512: limbs, signed bytes of q, on the way in, and sums in int32 on the way out.
//
// A tile of limbs is [k / 64][high limb, low limb][row][64 k], the k of each four in the order of entries.
//
// The sums are of limbs and v + 128, S = sum(limb * (v + 128)), so sum(limb * v) = S - 128 * sum(limb). A sum of 65536
// products stays below 2^31: 251 * 128 * 65536 = 2,105,540,608.
#include <immintrin.h>

#include <cstdint>

#include "rows.h"

namespace poc::cpu {
namespace {

// Lanes [0, count) of 16, of 32.
inline __mmask16 first16(int64_t count) {
  return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}
inline __mmask32 first32(int64_t count) { return count >= 32 ? 0xFFFFFFFFu : (1u << (count > 0 ? count : 0)) - 1; }

// 16 activations as float32, and back; what the mask leaves out is not touched, and read as 0.
inline __m512 widen(Float32, const uint32_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, from));
}
inline __m512 widen(BFloat16, const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
inline __m512 widen(Float16, const uint16_t* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}
inline void round_to(Float32, uint32_t* to, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(to, mask, values); }
inline void round_to(BFloat16, uint16_t* to, __mmask16 mask, __m512 values) {
  // Not vcvtneps2bf16, which flushes subnormals.
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void round_to(Float16, uint16_t* to, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_same(uint32_t* to, __mmask16 mask, uint32_t value) {
  _mm512_mask_storeu_epi32(to, mask, _mm512_set1_epi32(static_cast<int>(value)));
}
inline void store_same(uint16_t* to, __mmask16 mask, uint16_t value) {
  _mm256_mask_storeu_epi16(to, mask, _mm256_set1_epi16(static_cast<int16_t>(value)));
}

// ---- quantise -------------------------------------------------------------------------------------------------------

// The largest |x| of a row, as bits of float32.
inline uint32_t largest_magnitude(Float32, const uint32_t* row, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t at = 0; at < k; at += 16)
    largest =
        _mm512_max_epu32(largest, _mm512_and_si512(_mm512_maskz_loadu_epi32(first16(k - at), row + at), magnitude));
  return _mm512_reduce_max_epu32(largest);
}
template <class Half>
inline uint32_t largest_magnitude(Half, const uint16_t* row, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t at = 0; at < k; at += 32)
    largest =
        _mm512_max_epu16(largest, _mm512_and_si512(_mm512_maskz_loadu_epi16(first32(k - at), row + at), magnitude));
  const __m512i low = _mm512_and_si512(largest, _mm512_set1_epi32(0xFFFF));
  const uint32_t half = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_srli_epi32(largest, 16), low));
  return float_to_bits(Half::widen(static_cast<uint16_t>(half)));
}

// `out` is the row's place in its tile; the limbs of the next 64 k are k_step bytes on, the low limb low_step.
template <class Type>
void quantise_row(Type type, const Activations& x, int64_t k_padded, RowState& state, uint8_t* out, int64_t low_step,
                  int64_t k_step) {
  const auto* row = static_cast<const typename Type::Storage*>(x.data) + state.row * x.row_stride;
  const bool two = x.activation_bits == 16;
  const uint32_t largest = largest_magnitude(type, row, x.k);
  state.finite = largest < 0x7F800000u;
  state.exponent = row_exponent(state.finite ? largest : 0);
  const __m512 scale = _mm512_set1_ps(power_of_two(activation_shift(x.activation_bits) - state.exponent));
  const __m512 rounder = _mm512_set1_ps(12582912.0f);  // as in round_activation
  const int64_t k_end = state.finite ? x.k : 0;
  __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
  for (int64_t k = 0; k < k_padded; k += 64, out += k_step) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 scaled = _mm512_mul_ps(widen(type, row + k + 16 * i, first16(k_end - k - 16 * i)), scale);
      q[i] = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(scaled, rounder)), _mm512_set1_epi32(0x4B400000));
    }
    const __m512i ones = _mm512_set1_epi8(1);
    if (two) {
      __m512i high, low;
      Operand::limbs(q, high, low);
      _mm512_store_si512(out, high);
      _mm512_store_si512(out + low_step, low);
      high_sum = _mm512_dpbusd_epi32(high_sum, ones, high);
      low_sum = _mm512_dpbusd_epi32(low_sum, ones, low);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        q[i] = _mm512_max_epi32(_mm512_min_epi32(q[i], _mm512_set1_epi32(kMaxByteActivation)),
                                _mm512_set1_epi32(-kMaxByteActivation));
      const __m512i low = Operand::bytes(q);
      _mm512_store_si512(out, low);
      low_sum = _mm512_dpbusd_epi32(low_sum, ones, low);
    }
  }
  state.high_sum = _mm512_reduce_add_epi32(high_sum);
  state.sum = 256 * state.high_sum + _mm512_reduce_add_epi32(low_sum);
}

// `tile_rows` are the rows that the tile has room for.
void quantise_tile(const Activations& x, int64_t k_padded, RowState* states, int rows, int tile_rows, void* tile) {
  const int64_t low_step = 64 * tile_rows, k_step = low_step * (x.activation_bits == 16 ? 2 : 1);
  for (int r = 0; r < rows; ++r)
    with_type(x.dtype, [&](auto type) {
      quantise_row(type, x, k_padded, states[r], static_cast<uint8_t*>(tile) + 64 * r, low_step, k_step);
    });
}

// ---- finish ---------------------------------------------------------------------------------------------------------

// What all columns of a row share on the way from sums to y.
struct RowFinish {
  __m512 coefficient, scale;
  int32_t sum, high_bias, low_bias;  // 128 * the sums of its limbs
  bool small;                        // all integers on the way but T itself fit in 32 bits

  RowFinish(const Results& to, const RowState& state) {
    coefficient = _mm512_set1_ps(to.coefficient);
    scale = _mm512_set1_ps(power_of_two(state.exponent - activation_shift(to.x.activation_bits)));
    sum = state.sum;
    high_bias = 128 * state.high_sum;
    low_bias = 128 * (state.sum - 256 * state.high_sum);
    small = to.x.k <= 32768;
  }
};

inline __m512 both(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

// float32(T) of 16 columns, rounded once.
inline __m512 rounded_total(const RowFinish& row, __m512i low) {
  const __m512i half = _mm512_sub_epi32(low, _mm512_set1_epi32(row.low_bias));
  // |T| <= 127 * 247 * 65536 < 2^31
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_add_epi32(half, half), _mm512_set1_epi32(row.sum)));
}
inline __m512 rounded_total(const RowFinish& row, __m512i high, __m512i low) {
  // T = 512 * a + b
  const __m512i a = _mm512_sub_epi32(high, _mm512_set1_epi32(row.high_bias));
  const __m512i half = _mm512_sub_epi32(low, _mm512_set1_epi32(row.low_bias));
  if (row.small) {
    const __m512i b = _mm512_add_epi32(_mm512_add_epi32(half, half), _mm512_set1_epi32(row.sum));
    const __m512i limit = _mm512_set1_epi32(1 << 24);
    const __m512i beyond = _mm512_or_si512(_mm512_add_epi32(a, limit), _mm512_add_epi32(b, limit));
    // Both are exact as float32, so the fused operation rounds T once.
    if (_mm512_test_epi32_mask(beyond, _mm512_set1_epi32(-(1 << 25))) == 0)
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(512.0f), _mm512_cvtepi32_ps(b));
  }
  const auto total = [&](__m256i a, __m256i half) {  // all of it exact
    const __m512d b =
        _mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(half), _mm512_set1_pd(2.0)), _mm512_set1_pd(row.sum));
    return _mm512_cvtpd_ps(_mm512_add_pd(_mm512_mul_pd(_mm512_cvtepi32_pd(a), _mm512_set1_pd(512.0)), b));
  };
  return both(total(_mm512_castsi512_si256(a), _mm512_castsi512_si256(half)),
              total(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(half, 1)));
}

// Writes columns [0, to.columns) of a row from its sums; those of its high limb are unused at 8 activation_bits.
template <class Type>
void finish_sums(Type type, const Results& to, const RowState& state, const int32_t* high, const int32_t* low) {
  using Storage = typename Type::Storage;
  Storage* y = static_cast<Storage*>(to.y) + state.row * to.y_row_stride + to.y_column;
  const Storage* x = static_cast<const Storage*>(to.residual);
  if (x != nullptr) x += state.row * to.x.row_stride + to.y_column;
  const RowFinish row(to, state);
  const bool two = to.x.activation_bits == 16;
  for (int j = 0; j < to.columns; j += kColumns) {
    const __mmask16 mask = first16(to.columns - j);
    if (!state.finite) {
      store_same(y + j, mask, Type::kNaN);
      continue;
    }
    const __m512i low_sums = _mm512_load_si512(low + j);
    const __m512 total = two ? rounded_total(row, _mm512_load_si512(high + j), low_sums) : rounded_total(row, low_sums);
    const __m512 g = _mm512_mul_ps(_mm512_mul_ps(total, row.coefficient), row.scale);
    round_to(type, y + j, mask, x == nullptr ? g : _mm512_add_ps(widen(type, x + j, mask), g));
  }
}

// The rows of a tile from sums[limb][tile_rows][sums_stride].
void finish_tile(const Results& to, const RowState* states, int rows, int tile_rows, const int32_t* sums,
                 int64_t sums_stride) {
  const int64_t low_step = to.x.activation_bits == 16 ? tile_rows * sums_stride : 0;
  for (int r = 0; r < rows; ++r) {
    const int32_t* high = sums + r * sums_stride;
    with_type(to.x.dtype, [&](auto type) { finish_sums(type, to, states[r], high, high + low_step); });
  }
}

}  // namespace
}  // namespace poc::cpu
