// Plain C++ for any CPU: 16-bit activations times 16-bit v.
//
// A panel is [column][k] int16, a tile [row][k] int16. T = 2 * S + sum(q).
#include <cstdint>

#include "panels.h"
#include "rows.h"

namespace poc::cpu {
namespace {

constexpr int kColumns = 8;
constexpr int kRowsPerTile = 4;
constexpr int64_t kFlush = 1024;  // 16384 * 124 * 1024 = 2,080,374,784 stays below 2^31

void draw(const EntryKey& key, const PanelShape& shape, void* panel) {
  auto* out = static_cast<int16_t*>(panel);
  for (int column = 0; column < shape.groups * kColumns; ++column)
    for (int call = 0; call < shape.calls; ++call) {
      const Words words = entry_words(key.seed, key.domain, (shape.call + call) * kEntriesPerCall,
                                      shape.column + static_cast<uint32_t>(column));
      for (int i = 0; i < 16; ++i) *out++ = static_cast<int16_t>(half_entry(words.w[i / 4], i % 4));
    }
}

void quantise(const Activations& x, int64_t k_padded, RowState* states, int rows, int /*room*/, int16_t* /*scratch*/,
              void* tile) {
  quantise_rows(x, k_padded, states, rows, static_cast<int16_t*>(tile));
}

int32_t dot(const int16_t* a, const int16_t* b, int64_t length) {
  int32_t sum = 0;
  for (int64_t i = 0; i < length; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
  return sum;
}

int half_entry_at(const void* panel, const PanelShape& shape, int k, int column) {
  return static_cast<const int16_t*>(panel)[column * shape.calls * kEntriesPerCall + k];
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
    const int64_t length = static_cast<int64_t>(shape.calls) * kEntriesPerCall;
    const int16_t* rows = reinterpret_cast<const int16_t*>(tile_at(job, tile)) + shape.call * kEntriesPerCall;
    for (int column = 0; column < shape.groups * kColumns; ++column) {
      const int16_t* entries = static_cast<const int16_t*>(panel) + column * length;
      for (int r = 0; r < rows_of(job, tile); ++r) {
        const int16_t* q = rows + r * job.k_padded;
        double sum = accumulate ? sums[r * job.panel_columns + column] : 0.0;
        for (int64_t k = 0; k < length; k += kFlush)
          sum += dot(q + k, entries + k, length - k < kFlush ? length - k : kFlush);
        sums[r * job.panel_columns + column] = sum;
      }
    }
  }
  static void finish(const Job& job, const Results& to, int64_t tile, const double* sums) {
    finish_rows(to, states_at(job, tile), rows_of(job, tile), sums, job.panel_columns);
  }
};

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Form forms[] = {{"panels", /*max_limb_rows=*/0, kRowsPerTile, kRowsPerTile, /*whole_tiles=*/false,
                                    /*max_groups=*/4, /*min_whole_groups=*/0, /*panel_budget=*/256 << 10,
                                    /*task_rows_16=*/0, /*task_rows_8=*/0, panels_memory_bytes<Panels>,
                                    run_panels<Panels>}};
  static constexpr Kernels kernels = {"portable",
                                      [] { return true; },
                                      kColumns,
                                      /*k_unit=*/16,
                                      Panels::kEntryBytes,
                                      /*byte_limbs=*/false,
                                      /*takes_scratch=*/false,
                                      quantise,
                                      draw,
                                      unpack<half_entry_at>,
                                      forms,
                                      sizeof forms / sizeof forms[0]};
  return kernels;
}

}  // namespace poc::cpu
