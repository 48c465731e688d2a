// NEON with SDOT: Graviton2, Neoverse N1, Apple M1. One SDOT multiplies 4 k of 4 columns with 4 k of one limb row.
#include <arm_neon.h>

#include <cstdint>

namespace poc::cpu {
namespace {

struct Operand {
  static constexpr int kEntryRun = 4, kLimbRun = 16, kLimbRowUnit = 1;

  static inline void store(const int8x16_t (&entries)[4], int8_t* to) {
    for (int i = 0; i < 4; ++i) vst1q_s8(to + i * 64, entries[i]);
  }

  // Adds the products of word kWord of each call.
  template <int kWord, int kLimbRows>
  static inline void multiply_word(int32x4_t (&acc)[kLimbRows][4], const int8x16_t (&limbs)[kLimbRows],
                                   const int8_t* entries) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int8x16_t four_columns = vld1q_s8(entries + kWord * 64 + v * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kLimbRows; ++r) acc[r][v] = vdotq_laneq_s32(acc[r][v], four_columns, limbs[r], kWord);
    }
  }

  template <int kLimbRows>
  static void multiply(const int8_t* limbs, const int8_t* entries, int64_t calls, int32_t* sums, int64_t sums_stride,
                       bool accumulate) {
    int32x4_t acc[kLimbRows][4];
#pragma GCC unroll 6
    for (int r = 0; r < kLimbRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = accumulate ? vld1q_s32(sums + r * sums_stride + v * 4) : vdupq_n_s32(0);
    for (int64_t call = 0; call < calls; ++call, limbs += kLimbRows * kLimbRun, entries += 256) {
      int8x16_t limb[kLimbRows];
#pragma GCC unroll 6
      for (int r = 0; r < kLimbRows; ++r) limb[r] = vld1q_s8(limbs + r * kLimbRun);
      multiply_word<0>(acc, limb, entries);
      multiply_word<1>(acc, limb, entries);
      multiply_word<2>(acc, limb, entries);
      multiply_word<3>(acc, limb, entries);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kLimbRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) vst1q_s32(sums + r * sums_stride + v * 4, acc[r][v]);
  }
};

}  // namespace
}  // namespace poc::cpu

#include "neon.inl.h"

namespace poc::cpu {

const Kernels& neon_dotprod_kernels() {
  static constexpr Kernels kernels = make_kernels("neon_dotprod", has_neon_dotprod);
  return kernels;
}

}  // namespace poc::cpu
