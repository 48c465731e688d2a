// The AVX-512 VNNI kernels, except `struct Operand`, which the including file defines (avx512_draw.inl.h).
//
// One vpdpbusd multiplies 4 k of 16 columns with 4 k of one limb of a row.
#include "avx512_few.inl.h"
#include "panels.h"

namespace poc::cpu {
namespace {

// A panel of two groups and 1024 k is 32 KiB, as large as the nearest cache of Zen 4: wider ones, whose products take
// fewer loads, are slower there.
constexpr int kMaxGroups = 2;
constexpr int kMaxLimbRows = 8;

// acc += entries (unsigned bytes) * limb (signed bytes), four per lane. As an instruction: with the intrinsic GCC 12
// keeps every accumulator of a block in memory (3 to 4 times slower on Ice Lake).
inline void multiply_add(__m512i& acc, __m512i entries, __m512i limb) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(entries), "v"(limb));
}

template <int kLimbRows, int kVectors>
void multiply_block(const uint8_t* tile, const uint8_t* panel, int64_t stride, int64_t steps, int32_t* sums,
                    int64_t sums_stride, bool accumulate) {
  __m512i acc[kLimbRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kLimbRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = accumulate ? _mm512_load_si512(sums + r * sums_stride + v * kColumns) : _mm512_setzero_si512();
  for (int64_t step = 0; step < steps; step += 16, tile += kLimbRows * 64)
    for (int k = 0; k < 64; k += 4, panel += stride) {
      __m512i entries[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) entries[v] = _mm512_load_si512(panel + v * 64);
#pragma GCC unroll 16
      for (int r = 0; r < kLimbRows; ++r) {
        int32_t four;
        memcpy(&four, tile + r * 64 + k, sizeof four);
        const __m512i limb = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) multiply_add(acc[r][v], entries[v], limb);
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < kLimbRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_store_si512(sums + r * sums_stride + v * kColumns, acc[r][v]);
}

using MultiplyBlock = void (*)(const uint8_t*, const uint8_t*, int64_t, int64_t, int32_t*, int64_t, bool);
constexpr MultiplyBlock kBlocks[kMaxLimbRows][kMaxGroups] = {
    {multiply_block<1, 1>, multiply_block<1, 2>}, {multiply_block<2, 1>, multiply_block<2, 2>},
    {multiply_block<3, 1>, multiply_block<3, 2>}, {multiply_block<4, 1>, multiply_block<4, 2>},
    {multiply_block<5, 1>, multiply_block<5, 2>}, {multiply_block<6, 1>, multiply_block<6, 2>},
    {multiply_block<7, 1>, multiply_block<7, 2>}, {multiply_block<8, 1>, multiply_block<8, 2>},
};

struct Panels {
  static constexpr int kGroupColumns = kColumns;
  static constexpr int kEntryBytes = 1;
  using Sum = int32_t;
  using Drawer = cpu::Drawer;
  static int64_t drawer_bytes(const Job& job) { return drawer_memory_bytes(job); }
  static int64_t sums_per_entry(const Job& job) { return byte_limbs(job.x.activation_bits); }

  static void multiply(const Job& job, int64_t tile, const PanelShape& shape, const uint8_t* panel, int32_t* sums,
                       bool accumulate) {
    const int64_t limb_rows = rows_of(job, tile) * byte_limbs(job.x.activation_bits);
    kBlocks[limb_rows - 1][shape.groups - 1](
        tile_at(job, tile) + shape.call / 4 * limb_rows * 64, panel, static_cast<int64_t>(shape.groups) * 64,
        static_cast<int64_t>(shape.calls) * kVectorsPerCall, sums, job.panel_columns, accumulate);
  }
  static void finish(const Job& job, const Results& to, int64_t tile, const int32_t* sums) {
    const int rows = rows_of(job, tile);
    finish_tile(to, states_at(job, tile), rows, rows, sums, job.panel_columns);
  }
};

constexpr Form kForms[] = {as_drawn_form(/*max_groups=*/4),
                           {"panels", /*max_limb_rows=*/0, kMaxLimbRows / 2, kMaxLimbRows, /*whole_tiles=*/false,
                            kMaxGroups, /*min_whole_groups=*/0, /*panel_budget=*/512 << 10, /*task_rows_16=*/384,
                            /*task_rows_8=*/768, panels_memory_bytes<Panels>, run_panels<Panels>}};

constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
  return {name,
          supported,
          kColumns,
          /*k_unit=*/64,
          Panels::kEntryBytes,
          /*byte_limbs=*/true,
          /*takes_scratch=*/false,
          quantise,
          draw,
          unpack<half_entry_at>,
          kForms,
          sizeof kForms / sizeof kForms[0]};
}

}  // namespace
}  // namespace poc::cpu
