// The AVX-512 VNNI kernels, except `struct Operand`, which the including file defines (avx512_draw.inl.h).
//
// One vpdpbusd multiplies 4 k of 16 columns of a panel with 4 k of one limb of a row. With unsigned entries
// T = 2 * S - 255 * sum(q). A sum of 65536 products stays below 2^31: 251 * 128 * 65536 = 2,105,540,608.
#include "avx512_draw.inl.h"
#include "avx512_rows.inl.h"

namespace poc::cpu {
namespace {

constexpr int kMaxLimbRows = 6;  // 6 * 4 accumulators, 4 entries and a broadcast fit in 32 registers

// acc += entries (unsigned bytes) * limb (signed bytes), four per lane. As an instruction: with the intrinsic GCC 12
// keeps every accumulator of a block in memory (3 to 4 times slower on Ice Lake).
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

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
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
          draw,
          multiply,
          finish_rows<-255>,
          unpack<half_entry_at>};
}

}  // namespace
}  // namespace poc::cpu
