// NEON with I8MM: Graviton3, Grace, Neoverse V1, V2 and N2, Apple M2. One SMMLA multiplies 8 k of 2 columns with 8 k of
// 2 limb rows.
#include <arm_neon.h>

#include <cstdint>

namespace poc::cpu {
namespace {

struct Operand {
  static constexpr int kEntryRun = 8, kLimbRun = 8, kLimbRowUnit = 2;
  static constexpr int kColumnPairs = 8;  // of a group

  static inline void store(const int8x16_t (&entries)[4], int8_t* to) {
    for (int i = 0; i < 2; ++i) {
      const int32x4_t first = vreinterpretq_s32_s8(entries[2 * i]), second = vreinterpretq_s32_s8(entries[2 * i + 1]);
      vst1q_s8(to + i * 128, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
      vst1q_s8(to + i * 128 + 16, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
    }
  }

  // Halves of two vectors of sums: those of a row of 4 columns from two accumulators, or the other way round.
  static inline int32x4_t low_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static inline int32x4_t high_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }

  // The last of an odd number of limb rows has a partner whose limbs may be anything, and whose sums nobody reads.
  template <int kLimbRows>
  static void multiply(const int8_t* limbs, const int8_t* entries, int64_t calls, int32_t* sums, int64_t sums_stride,
                       bool accumulate) {
    multiply_pairs<(kLimbRows + 1) / 2>(limbs, entries, calls, sums, sums_stride, accumulate);
  }

  template <int kPairs>
  static void multiply_pairs(const int8_t* limbs, const int8_t* entries, int64_t calls, int32_t* sums,
                             int64_t sums_stride, bool accumulate) {
    int32x4_t acc[kPairs][kColumnPairs];
#pragma GCC unroll 3
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
      for (int c = 0; c < kColumnPairs; c += 2) {
        const int32_t* at = sums + 2 * p * sums_stride + 2 * c;
        const int32x4_t first = accumulate ? vld1q_s32(at) : vdupq_n_s32(0);
        const int32x4_t second = accumulate ? vld1q_s32(at + sums_stride) : vdupq_n_s32(0);
        acc[p][c] = low_halves(first, second);
        acc[p][c + 1] = high_halves(first, second);
      }
    for (int64_t step = 0; step < 2 * calls; ++step, limbs += kPairs * 16, entries += kColumnPairs * 16) {
      int8x16_t pair[kPairs];
#pragma GCC unroll 3
      for (int p = 0; p < kPairs; ++p) pair[p] = vld1q_s8(limbs + p * 16);
#pragma GCC unroll 8
      for (int c = 0; c < kColumnPairs; ++c) {
        const int8x16_t two_columns = vld1q_s8(entries + c * 16);
#pragma GCC unroll 3
        for (int p = 0; p < kPairs; ++p) acc[p][c] = vmmlaq_s32(acc[p][c], pair[p], two_columns);
      }
    }
#pragma GCC unroll 3
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
      for (int c = 0; c < kColumnPairs; c += 2) {
        int32_t* at = sums + 2 * p * sums_stride + 2 * c;
        vst1q_s32(at, low_halves(acc[p][c], acc[p][c + 1]));
        vst1q_s32(at + sums_stride, high_halves(acc[p][c], acc[p][c + 1]));
      }
  }
};

}  // namespace
}  // namespace poc::cpu

#include "neon.inl.h"

namespace poc::cpu {

const Kernels& neon_i8mm_kernels() {
  static constexpr Kernels kernels = make_kernels("neon_i8mm", has_neon_i8mm);
  return kernels;
}

}  // namespace poc::cpu
