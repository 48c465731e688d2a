// Few rows with AVX-512 VNNI: each vector of entries is multiplied as it is drawn, and no panel is kept. What the
// including file has to define is in avx512_draw.inl.h.
#include "avx512_draw.inl.h"
#include "avx512_rows.inl.h"
#include "job.h"

namespace poc::cpu {
namespace {

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

// Tasks of at most max_groups groups.
constexpr Form as_drawn_form(int max_groups) {
  return {"as drawn",
          kFewLimbRows,
          kFewLimbRows / 2,
          kFewLimbRows,
          /*whole_tiles=*/false,
          max_groups,
          /*min_whole_groups=*/0,
          /*panel_budget=*/0,
          /*task_rows_16=*/0,
          /*task_rows_8=*/0,
          drawer_memory_bytes,
          run_as_drawn};
}

// `room` are the rows that the tile has room for.
void quantise(const Activations& x, int64_t k_padded, RowState* states, int rows, int room, int16_t* /*scratch*/,
              void* tile) {
  quantise_tile(x, k_padded, states, rows, room, tile);
}

}  // namespace
}  // namespace poc::cpu
