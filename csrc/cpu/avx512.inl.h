// The AVX-512 VNNI kernels but for one step: the including file defines `struct Operand` with
//   static __m512i bytes(__m512i words)   v + 128 of the four entries of each word, in order, as unsigned
//   bytes.
//
// A panel is [k / 4][group][16 columns][4 k] bytes, a tile [k / 4][row][limb][4 k] signed bytes: one vpdpbusd
// multiplies 4 k of 16 columns with 4 k of one limb. With unsigned entries T = 2 * S - 255 * sum(q). A sum of
// 65536 products stays below 2^31: 251 * 128 * 65536 = 2,105,540,608.
#include <immintrin.h>

#include <cstdint>

#include "philox_lanes.h"
#include "rows.h"

namespace poc::cpu {
namespace {

constexpr int kColumns = 16;
constexpr int kMaxGroups = 4;
constexpr int kMaxLimbRows = 6;  // 6 * 4 accumulators, 4 entries and a broadcast fit in 32 registers

inline __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline __m512i high_half(__m512i a) { return _mm512_srli_epi64(a, 32); }
// Even columns live in one vector of 64-bit lanes, odd columns in another: join their low or high halves.
inline __m512i join_low(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
}
inline __m512i join_high(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xF5));
}

// Half of the columns of a group after rounds 0 and 1; upper halves of lanes hold anything.
struct Columns {
  __m512i h, l;

  Columns(const RoundKeys& keys, __m512i n) {
    l = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM0), _mm512_xor_si512(n, _mm512_set1_epi64(keys.column_mask)));
    h = high_half(l);
  }
};

// Their counters on the way through the other rounds.
struct Counters {
  __m512i c0, c1, c2, c3;

  inline void round2(const Columns& columns, const CallScalars& s, int i) {
    const __m512i p1 =
        _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM1), _mm512_xor_si512(columns.h, _mm512_set1_epi64(s.s0[i])));
    c0 = _mm512_xor_si512(high_half(p1), _mm512_set1_epi64(s.s1[i]));
    c1 = p1;
    c2 = _mm512_xor_si512(columns.l, _mm512_set1_epi64(s.s2[i]));
    c3 = _mm512_set1_epi64(s.s3[i]);
  }
  inline void round(uint64_t a, uint64_t b) {
    const __m512i p0 = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM0), c0);
    const __m512i p1 = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM1), c2);
    c0 = xor3(high_half(p1), c1, _mm512_set1_epi64(a));
    c2 = xor3(high_half(p0), c3, _mm512_set1_epi64(b));
    c1 = p1;
    c3 = p0;
  }
};

// kCalls consecutive calls for one group, side by side so that one's latency hides behind the other's work.
template <int kCalls>
inline void generate_calls(const RoundKeys& keys, const CallScalars& scalars, int i, const Columns& even_columns,
                           const Columns& odd_columns, uint8_t* out, int64_t stride) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i a9 = _mm512_set1_epi32(static_cast<int>(keys.a[kPhiloxRounds - 1]));
  const __m512i b9 = _mm512_set1_epi32(static_cast<int>(keys.b[kPhiloxRounds - 1]));
  Counters even[kCalls], odd[kCalls];
#pragma GCC unroll 2
  for (int c = 0; c < kCalls; ++c) {
    even[c].round2(even_columns, scalars, i + c);
    odd[c].round2(odd_columns, scalars, i + c);
  }
#pragma GCC unroll 8
  for (int r = 3; r < kPhiloxRounds - 1; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kCalls; ++c) {
      even[c].round(keys.a[r], keys.b[r]);
      odd[c].round(keys.a[r], keys.b[r]);
    }
#pragma GCC unroll 2
  for (int c = 0; c < kCalls; ++c) {
    // The last round joins the halves as it goes: two shuffles a word in place of shift, xor and join.
    const __m512i p0e = _mm512_mul_epu32(m0, even[c].c0), p0o = _mm512_mul_epu32(m0, odd[c].c0);
    const __m512i p1e = _mm512_mul_epu32(m1, even[c].c2), p1o = _mm512_mul_epu32(m1, odd[c].c2);
    const __m512i w0 = xor3(join_high(p1e, p1o), join_low(even[c].c1, odd[c].c1), a9);
    const __m512i w2 = xor3(join_high(p0e, p0o), join_low(even[c].c3, odd[c].c3), b9);
    _mm512_store_si512(out + (4 * c + 0) * stride, Operand::bytes(w0));
    _mm512_store_si512(out + (4 * c + 1) * stride, Operand::bytes(join_low(p1e, p1o)));
    _mm512_store_si512(out + (4 * c + 2) * stride, Operand::bytes(w2));
    _mm512_store_si512(out + (4 * c + 3) * stride, Operand::bytes(join_low(p0e, p0o)));
  }
}

void generate(const Stream& stream, const PanelShape& shape, void* panel) {
  const RoundKeys keys(stream);
  const __m512i even_lanes = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
  const int64_t stride = static_cast<int64_t>(shape.groups) * 64;  // bytes from one k / 4 to the next
  for (int begin = 0; begin < shape.calls; begin += CallScalars::kCalls) {
    const int count = shape.calls - begin < CallScalars::kCalls ? shape.calls - begin : CallScalars::kCalls;
    CallScalars scalars;
    scalars.fill(keys, shape.call + static_cast<uint32_t>(begin), count);
    for (int g = 0; g < shape.groups; ++g) {
      const __m512i n =
          _mm512_add_epi64(_mm512_set1_epi64(shape.column + static_cast<uint32_t>(g * kColumns)), even_lanes);
      const Columns even(keys, n), odd(keys, _mm512_add_epi64(n, _mm512_set1_epi64(1)));
      auto* out = static_cast<uint8_t*>(panel) + (static_cast<int64_t>(begin) * 4 * shape.groups + g) * 64;
      int i = 0;
      for (; i + 2 <= count; i += 2) generate_calls<2>(keys, scalars, i, even, odd, out + i * 4 * stride, stride);
      if (i < count) generate_calls<1>(keys, scalars, i, even, odd, out + i * 4 * stride, stride);
    }
  }
}

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

// acc += entries (unsigned bytes) * limb (signed bytes), four to a lane. As an instruction: with the
// intrinsic GCC 12 keeps every accumulator of a block in memory (3 to 4 times slower on Ice Lake).
inline void multiply_add(__m512i& acc, __m512i entries, __m512i limb) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(entries), "v"(limb));
}

template <int kLimbRows, int kVectors>
void multiply_block(const uint32_t* tile, const uint8_t* panel, int64_t stride, int64_t steps, int limbs, double* sums,
                    int64_t sums_stride, bool accumulate) {
  __m512i acc[kLimbRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kLimbRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int64_t step = 0; step < steps; ++step) {
    __m512i entries[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) entries[v] = _mm512_load_si512(panel + v * 64);
#pragma GCC unroll 16
    for (int r = 0; r < kLimbRows; ++r) {
      const __m512i limb = _mm512_set1_epi32(static_cast<int>(tile[r]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) multiply_add(acc[r][v], entries[v], limb);
    }
    panel += stride;
    tile += kLimbRows;
  }
  if (limbs == 1) {
#pragma GCC unroll 16
    for (int r = 0; r < kLimbRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        store_sums(sums + r * sums_stride + v * kColumns, low_doubles(acc[r][v]), high_doubles(acc[r][v]), accumulate);
    return;
  }
  const __m512d high_weight = _mm512_set1_pd(256.0);
#pragma GCC unroll 8
  for (int r = 0; r + 1 < kLimbRows; r += 2)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512d low = _mm512_add_pd(_mm512_mul_pd(low_doubles(acc[r][v]), high_weight), low_doubles(acc[r + 1][v]));
      const __m512d high =
          _mm512_add_pd(_mm512_mul_pd(high_doubles(acc[r][v]), high_weight), high_doubles(acc[r + 1][v]));
      store_sums(sums + r / 2 * sums_stride + v * kColumns, low, high, accumulate);
    }
}

using MultiplyBlock = void (*)(const uint32_t*, const uint8_t*, int64_t, int64_t, int, double*, int64_t, bool);
constexpr MultiplyBlock kBlocks[kMaxLimbRows][kMaxGroups] = {
    {multiply_block<1, 1>, multiply_block<1, 2>, multiply_block<1, 3>, multiply_block<1, 4>},
    {multiply_block<2, 1>, multiply_block<2, 2>, multiply_block<2, 3>, multiply_block<2, 4>},
    {multiply_block<3, 1>, multiply_block<3, 2>, multiply_block<3, 3>, multiply_block<3, 4>},
    {multiply_block<4, 1>, multiply_block<4, 2>, multiply_block<4, 3>, multiply_block<4, 4>},
    {multiply_block<5, 1>, multiply_block<5, 2>, multiply_block<5, 3>, multiply_block<5, 4>},
    {multiply_block<6, 1>, multiply_block<6, 2>, multiply_block<6, 3>, multiply_block<6, 4>},
};

void multiply(const void* tile, int rows, int activation_bits, const void* panel, const PanelShape& shape, double* sums,
              int64_t sums_stride, bool accumulate) {
  const int limbs = activation_bits == 16 ? 2 : 1, limb_rows = rows * limbs;
  kBlocks[limb_rows - 1][shape.groups - 1](
      static_cast<const uint32_t*>(tile) + static_cast<int64_t>(shape.call) * 4 * limb_rows,
      static_cast<const uint8_t*>(panel), static_cast<int64_t>(shape.groups) * 64,
      static_cast<int64_t>(shape.calls) * 4, limbs, sums, sums_stride, accumulate);
}

void unpack(const void* panel, const PanelShape& shape, int k_begin, int k_end, int columns, int16_t* entries,
            int64_t entries_stride) {
  const auto* bytes = static_cast<const uint8_t*>(panel);
  for (int k = k_begin; k < k_end; ++k)
    for (int n = 0; n < columns; ++n) {
      const int64_t vector = static_cast<int64_t>(k / 4) * shape.groups + n / kColumns;
      const int v = bytes[vector * 64 + n % kColumns * 4 + k % 4] - 128;
      entries[(k - k_begin) * entries_stride + n] = static_cast<int16_t>(2 * v + 1);
    }
}

constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
  return {name,
          supported,
          kColumns,
          kMaxGroups,
          /*entry_bytes=*/1,
          kMaxLimbRows / 2,
          kMaxLimbRows,
          /*sum_weight=*/-255,
          /*panel_budget=*/512 << 10,
          quantise,
          generate,
          multiply,
          finish_rows<-255>,
          unpack};
}

}  // namespace
}  // namespace poc::cpu
