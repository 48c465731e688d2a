// AVX2: 16-bit activations times 16-bit v, two k at a time (vpmaddwd). vpmaddubsw would need bytes, and saturates.
//
// A panel is [k / 2][group][8 columns][2 k] int16, a tile [k / 2][row][2 k] int16. T = 2 * S + sum(q).
#include <immintrin.h>

#include <cstdint>

#include "panels.h"
#include "philox_lanes.h"
#include "rows.h"

namespace poc::cpu {
namespace {

constexpr int kColumns = 8;
constexpr int kMaxGroups = 4;
constexpr int kMaxRows = 6;
constexpr int kCalls = 64;            // whose scalars are made at once
constexpr int kVectors = 2;           // groups that a block multiplies at once
constexpr int64_t kFlushSteps = 512;  // of 2 k: 2 * 16384 * 124 * 512 = 2,080,374,784 stays below 2^31

struct Lanes {
  using Vector = __m256i;
  static inline Vector set1(uint64_t value) { return _mm256_set1_epi64x(static_cast<int64_t>(value)); }
  static inline Vector multiply(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
  static inline Vector low_half(Vector a) { return a; }  // the upper halves are not used
  static inline Vector high_half(Vector a) { return _mm256_srli_epi64(a, 32); }
  static inline Vector exclusive_or(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static inline Vector exclusive_or(Vector a, Vector b, Vector c) { return exclusive_or(exclusive_or(a, b), c); }
};

// Even columns live in one vector of 64-bit lanes, odd columns in another: join their low or high halves.
inline __m256i join_low(__m256i even, __m256i odd) {
  return _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
}
inline __m256i join_high(__m256i even, __m256i odd) {
  return _mm256_blend_epi32(odd, _mm256_shuffle_epi32(even, 0xF5), 0x55);
}

inline __m256i both_lanes(__m128i a) { return _mm256_broadcastsi128_si256(a); }

// The four nibbles of the upper or lower half of each word, one per byte: `halves` holds each byte of that half twice.
inline __m256i nibbles(__m256i halves) {
  const __m256i shifted = _mm256_blendv_epi8(halves, _mm256_srli_epi16(halves, 4), _mm256_set1_epi16(-256));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(0x0F));
}

// v of the four entries of each word, in order, as signed bytes.
inline __m256i half_entries(__m256i words) {
  const __m256i low = both_lanes(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
  const __m256i high = both_lanes(_mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
  const __m256i a = nibbles(_mm256_shuffle_epi8(words, low)), b = nibbles(_mm256_shuffle_epi8(words, high));
  // Eight entries, then the same again: bit 3 of a is the sign, bit 3 of b is not used.
  const __m256i u =
      _mm256_add_epi8(_mm256_shuffle_epi8(Lanes::set1(kTableA), a), _mm256_shuffle_epi8(Lanes::set1(kTableB), b));
  return _mm256_xor_si256(u, _mm256_shuffle_epi8(both_lanes(_mm_set_epi64x(-1, 0)), a));
}

// Entries 0, 1 of each word, and 2, 3, as pairs of int16.
inline void store_pairs(int16_t* first, int16_t* second, __m256i words) {
  const __m256i v = half_entries(words);
  const __m256i to_first = both_lanes(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
  const __m256i to_second = both_lanes(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
  _mm256_store_si256(reinterpret_cast<__m256i*>(first), _mm256_srai_epi16(_mm256_shuffle_epi8(v, to_first), 8));
  _mm256_store_si256(reinterpret_cast<__m256i*>(second), _mm256_srai_epi16(_mm256_shuffle_epi8(v, to_second), 8));
}

void draw(const EntryKey& key, const PanelShape& shape, void* panel) {
  const RoundKeys keys(key);
  const __m256i m0 = Lanes::set1(kPhiloxM0), m1 = Lanes::set1(kPhiloxM1);
  const int64_t stride = static_cast<int64_t>(shape.groups) * 16;  // int16 from one k / 2 to the next
  for (int begin = 0; begin < shape.calls; begin += kCalls) {
    const int count = shape.calls - begin < kCalls ? shape.calls - begin : kCalls;
    CallScalars scalars[kCalls];
    fill_scalars(keys, shape.call + static_cast<uint32_t>(begin), count, scalars);
    for (int g = 0; g < shape.groups; ++g) {
      const __m256i n = _mm256_add_epi64(Lanes::set1(shape.column + static_cast<uint32_t>(g * kColumns)),
                                         _mm256_setr_epi64x(0, 2, 4, 6));
      const Columns<Lanes> even_columns(keys, n), odd_columns(keys, _mm256_add_epi64(n, Lanes::set1(1)));
      Counters<Lanes> even, odd;
      auto* out = static_cast<int16_t*>(panel) + (static_cast<int64_t>(begin) * 8 * shape.groups + g) * 16;
      for (int i = 0; i < count; ++i) {
        even.round2(even_columns, scalars[i]);
        odd.round2(odd_columns, scalars[i]);
#pragma GCC unroll 8
        for (int r = 3; r < kPhiloxRounds - 1; ++r) {
          even.round(keys.a[r], keys.b[r]);
          odd.round(keys.a[r], keys.b[r]);
        }
        const __m256i p0e = _mm256_mul_epu32(m0, even.c0), p0o = _mm256_mul_epu32(m0, odd.c0);
        const __m256i p1e = _mm256_mul_epu32(m1, even.c2), p1o = _mm256_mul_epu32(m1, odd.c2);
        const __m256i w0 = Lanes::exclusive_or(join_high(p1e, p1o), join_low(even.c1, odd.c1),
                                               _mm256_set1_epi32(static_cast<int>(keys.a[kPhiloxRounds - 1])));
        const __m256i w2 = Lanes::exclusive_or(join_high(p0e, p0o), join_low(even.c3, odd.c3),
                                               _mm256_set1_epi32(static_cast<int>(keys.b[kPhiloxRounds - 1])));
        store_pairs(out + 0 * stride, out + 1 * stride, w0);
        store_pairs(out + 2 * stride, out + 3 * stride, join_low(p1e, p1o));
        store_pairs(out + 4 * stride, out + 5 * stride, w2);
        store_pairs(out + 6 * stride, out + 7 * stride, join_low(p0e, p0o));
        out += 8 * stride;
      }
    }
  }
}

void quantise(const Activations& x, int64_t k_padded, RowState* states, int rows, int /*room*/, int16_t* scratch,
              void* tile) {
  quantise_rows(x, k_padded, states, rows, scratch);
  for (int r = 0; r < rows; ++r) {
    const int16_t* q = scratch + r * k_padded;
    auto* out = static_cast<int16_t*>(tile) + 2 * r;
    for (int64_t k = 0; k < k_padded; k += 2) {
      memcpy(out, q + k, 2 * sizeof(int16_t));
      out += 2 * rows;
    }
  }
}

// acc += entries * q, a pair of int16 per lane. As instructions: from intrinsics GCC 12 forms all products first and
// keeps the accumulators in memory.
inline void multiply_add(__m256i& acc, __m256i entries, __m256i q) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(entries), "x"(q));
}

template <int kRows, int kWidth>
void multiply_block(const int16_t* tile, const int16_t* panel, int64_t stride, int64_t steps, double* sums,
                    int64_t sums_stride, bool accumulate) {
  for (int64_t begin = 0; begin < steps; begin += kFlushSteps) {
    const int64_t end = begin + kFlushSteps < steps ? begin + kFlushSteps : steps;
    __m256i acc[kRows][kWidth];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) acc[r][v] = _mm256_setzero_si256();
    for (int64_t step = begin; step < end; ++step) {
      __m256i entries[kWidth];
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) entries[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel) + v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, tile + 2 * r, sizeof pair);
        const __m256i q = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < kWidth; ++v) multiply_add(acc[r][v], entries[v], q);
      }
      panel += stride;
      tile += 2 * kRows;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) {
        double* to = sums + r * sums_stride + v * kColumns;
        __m256d low = _mm256_cvtepi32_pd(_mm256_castsi256_si128(acc[r][v]));
        __m256d high = _mm256_cvtepi32_pd(_mm256_extracti128_si256(acc[r][v], 1));
        if (accumulate || begin > 0) {
          low = _mm256_add_pd(low, _mm256_loadu_pd(to));
          high = _mm256_add_pd(high, _mm256_loadu_pd(to + 4));
        }
        _mm256_storeu_pd(to, low);
        _mm256_storeu_pd(to + 4, high);
      }
  }
}

using MultiplyBlock = void (*)(const int16_t*, const int16_t*, int64_t, int64_t, double*, int64_t, bool);
constexpr MultiplyBlock kBlocks[kMaxRows][kVectors] = {
    {multiply_block<1, 1>, multiply_block<1, 2>}, {multiply_block<2, 1>, multiply_block<2, 2>},
    {multiply_block<3, 1>, multiply_block<3, 2>}, {multiply_block<4, 1>, multiply_block<4, 2>},
    {multiply_block<5, 1>, multiply_block<5, 2>}, {multiply_block<6, 1>, multiply_block<6, 2>},
};

int half_entry_at(const void* panel, const PanelShape& shape, int k, int column) {
  const int64_t vector = static_cast<int64_t>(k / 2) * shape.groups + column / kColumns;
  return static_cast<const int16_t*>(panel)[vector * 16 + column % kColumns * 2 + k % 2];
}

struct Panels {
  static constexpr int kGroupColumns = kColumns;
  static constexpr int kEntryBytes = 2;
  using Sum = double;

  struct Drawer {
    const EntryKey key;
    Drawer(const Job& job, void* /*memory*/) : key(job.key) {}
    void draw(const PanelShape& shape, void* panel) const { cpu::draw(key, shape, panel); }
  };
  static int64_t drawer_bytes(const Job&) { return 0; }
  static int64_t sums_per_entry(const Job&) { return 1; }

  static void multiply(const Job& job, int64_t tile, const PanelShape& shape, const void* panel, double* sums,
                       bool accumulate) {
    const int rows = rows_of(job, tile);
    const auto* q = reinterpret_cast<const int16_t*>(tile_at(job, tile)) + static_cast<int64_t>(shape.call) * 16 * rows;
    for (int g = 0; g < shape.groups; g += kVectors) {
      const int width = shape.groups - g < kVectors ? shape.groups - g : kVectors;
      kBlocks[rows - 1][width - 1](q, static_cast<const int16_t*>(panel) + g * 16,
                                   static_cast<int64_t>(shape.groups) * 16, static_cast<int64_t>(shape.calls) * 8,
                                   sums + g * kColumns, job.panel_columns, accumulate);
    }
  }
  static void finish(const Job& job, const Results& to, int64_t tile, const double* sums) {
    finish_rows(to, states_at(job, tile), rows_of(job, tile), sums, job.panel_columns);
  }
};

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Form forms[] = {{"panels", /*max_limb_rows=*/0, kMaxRows, kMaxRows, /*whole_tiles=*/false,
                                    kMaxGroups, /*min_whole_groups=*/0, /*panel_budget=*/256 << 10,
                                    /*task_rows_16=*/384, /*task_rows_8=*/384, panels_memory_bytes<Panels>,
                                    run_panels<Panels>}};
  static constexpr Kernels kernels = {"avx2",
                                      has_avx2,
                                      kColumns,
                                      /*k_unit=*/16,
                                      Panels::kEntryBytes,
                                      /*byte_limbs=*/false,
                                      /*takes_scratch=*/true,
                                      quantise,
                                      draw,
                                      unpack<half_entry_at>,
                                      forms,
                                      sizeof forms / sizeof forms[0]};
  return kernels;
}

}  // namespace poc::cpu
