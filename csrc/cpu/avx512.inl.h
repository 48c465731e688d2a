// The AVX-512 VNNI kernels, except `struct Operand`, which the including file defines (avx512_draw.inl.h).
//
// One vpdpbusd multiplies 4 k of 16 columns with 4 k of one limb of a row.
#include "avx512_draw.inl.h"
#include "avx512_rows.inl.h"
#include "panels.h"

namespace poc::cpu {
namespace {

constexpr int kMaxGroups = 4;
constexpr int kMaxLimbRows = 6;  // 6 * 4 accumulators, 4 entries and a broadcast fit in 32 registers

// acc += entries (unsigned bytes) * limb (signed bytes), four per lane. As an instruction: with the intrinsic GCC 12
// keeps every accumulator of a block in memory (3 to 4 times slower on Ice Lake).
inline void multiply_add(__m512i& acc, __m512i entries, __m512i limb) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(entries), "v"(limb));
}

// The keys of a product and the scalars of all its calls, made once per thread.
struct Drawer {
  const RoundKeys keys;
  CallScalars* const scalars;

  Drawer(const Job& job, void* memory) : keys(job.key), scalars(static_cast<CallScalars*>(memory)) {
    fill_scalars(keys, 0, job.k_padded / kEntriesPerCall, scalars);
  }
  void draw(const PanelShape& shape, void* panel) const {
    draw_panel(keys, scalars + shape.call, shape, static_cast<uint8_t*>(panel));
  }
};

int64_t drawer_memory_bytes(const Job& job) {
  return job.k_padded / kEntriesPerCall * static_cast<int64_t>(sizeof(CallScalars));
}

// ---- many rows: panels ----------------------------------------------------------------------------------------------

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
    {multiply_block<1, 1>, multiply_block<1, 2>, multiply_block<1, 3>, multiply_block<1, 4>},
    {multiply_block<2, 1>, multiply_block<2, 2>, multiply_block<2, 3>, multiply_block<2, 4>},
    {multiply_block<3, 1>, multiply_block<3, 2>, multiply_block<3, 3>, multiply_block<3, 4>},
    {multiply_block<4, 1>, multiply_block<4, 2>, multiply_block<4, 3>, multiply_block<4, 4>},
    {multiply_block<5, 1>, multiply_block<5, 2>, multiply_block<5, 3>, multiply_block<5, 4>},
    {multiply_block<6, 1>, multiply_block<6, 2>, multiply_block<6, 3>, multiply_block<6, 4>},
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

// ---- few rows: each vector of entries is multiplied as it is drawn
// ---------------------------------------------------

constexpr int kFewLimbRows = 8;

// acc[r] += entries * the four k of limb row r at limbs; of 64 k per row.
template <int kLimbRows>
[[gnu::always_inline]] inline void multiply_rows(__m512i (&acc)[kLimbRows], __m512i words, const uint8_t* limbs) {
  const __m512i entries = Operand::entries(words);
#pragma GCC unroll 8
  for (int r = 0; r < kLimbRows; ++r)
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(acc[r])
        : "v"(entries), "m"(*reinterpret_cast<const int32_t*>(limbs + r * 64)));
}

// sums[limb row][16 columns] of a tile of kLimbRows and all k.
template <int kLimbRows>
void multiply_as_drawn(const Drawer& drawer, int64_t calls, const Group& group, const uint8_t* tile, int32_t* sums) {
  constexpr int kCalls = 2, kVectors = kCalls * kVectorsPerCall;
  __m512i acc[kLimbRows];
#pragma GCC unroll 8
  for (int r = 0; r < kLimbRows; ++r) acc[r] = _mm512_setzero_si512();
  const auto limbs_of = [&](int64_t call) { return tile + call / 4 * kLimbRows * 64 + call % 4 * 16; };
  if constexpr (kLimbRows <= 2) {
    for (int64_t call = 0; call < calls; call += kCalls) {
      const uint8_t* limbs = limbs_of(call);
      draw_words<kCalls>(drawer.keys, drawer.scalars + call, group,
                         [&](int i, __m512i words) { multiply_rows(acc, words, limbs + 4 * i); });
    }
  } else {
    // The products of the words before are spread over the rounds: with more rows they take longer than the rest hides.
    alignas(64) uint8_t drawn[kVectors][64];
    const auto keep = [&](int i, __m512i words) { _mm512_store_si512(drawn[i], words); };
    draw_words<kCalls>(drawer.keys, drawer.scalars, group, keep);
    const uint8_t* limbs = tile;
    const auto multiply = [&](int i) __attribute__((always_inline)) {
      multiply_rows(acc, _mm512_load_si512(drawn[i]), limbs + 4 * i);
    };
    for (int64_t call = kCalls; call < calls; call += kCalls) {
      draw_words<kCalls>(drawer.keys, drawer.scalars + call, group, keep, [&](int i) __attribute__((always_inline)) {
        multiply(i);
        if (i < kVectors - kDrawingPauses) multiply(kDrawingPauses + i);
      });
      limbs = limbs_of(call);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) multiply(i);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kLimbRows; ++r) _mm512_store_si512(sums + r * kColumns, acc[r]);
}

using MultiplyAsDrawn = void (*)(const Drawer&, int64_t, const Group&, const uint8_t*, int32_t*);
constexpr MultiplyAsDrawn kAsDrawn[kFewLimbRows] = {multiply_as_drawn<1>, multiply_as_drawn<2>, multiply_as_drawn<3>,
                                                    multiply_as_drawn<4>, multiply_as_drawn<5>, multiply_as_drawn<6>,
                                                    multiply_as_drawn<7>, multiply_as_drawn<8>};

void run_as_drawn(const Job& job, Tasks& tasks, uint8_t* memory) {
  const Drawer drawer(job, memory);
  alignas(64) int32_t sums[kFewLimbRows * kColumns];
  for (int64_t index; (index = take(tasks)) >= 0;) {
    const Task task = task_at(job, index);
    for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
      const int rows = rows_of(job, tile);
      const int64_t limb_rows = rows * byte_limbs(job.x.activation_bits);
      for (int64_t j = 0; j < task.columns; j += kColumns) {
        const int64_t column = task.column + j;
        const Group group(drawer.keys, static_cast<uint32_t>(job.column_start + column));
        kAsDrawn[limb_rows - 1](drawer, job.k_padded / kEntriesPerCall, group, tile_at(job, tile), sums);
        finish_tile(results_at(job, column, lesser(kColumns, task.columns - j)), states_at(job, tile), rows, rows, sums,
                    kColumns);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

void quantise(const Activations& x, int64_t k_padded, RowState* states, int rows, int16_t* /*scratch*/, void* tile) {
  quantise_tile(x, k_padded, states, rows, rows, tile);
}

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

constexpr Form kForms[] = {{"as drawn", kFewLimbRows, kFewLimbRows / 2, kFewLimbRows, kMaxGroups, /*panel_budget=*/0,
                            drawer_memory_bytes, run_as_drawn},
                           {"panels", /*max_limb_rows=*/0, kMaxLimbRows / 2, kMaxLimbRows, kMaxGroups,
                            /*panel_budget=*/512 << 10, panels_memory_bytes<Panels>, run_panels<Panels>}};

constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
  return {name,
          supported,
          kColumns,
          /*k_unit=*/64,
          Panels::kEntryBytes,
          /*byte_limbs=*/true,
          quantise,
          draw,
          unpack<half_entry_at>,
          kForms,
          sizeof kForms / sizeof kForms[0]};
}

}  // namespace
}  // namespace poc::cpu
