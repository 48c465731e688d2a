// Plain C++ for any CPU: 16-bit activations times 16-bit v.
//
// A panel is [column][k] int16, a tile [row][k] int16. T = 2 * S + sum(q).
#include <cstdint>

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

void quantise(const Activations& x, RowState* states, int rows, int16_t* /*scratch*/, void* tile) {
  quantise_rows(x, states, rows, static_cast<int16_t*>(tile));
}

int32_t dot(const int16_t* a, const int16_t* b, int64_t length) {
  int32_t sum = 0;
  for (int64_t i = 0; i < length; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
  return sum;
}

void multiply(const void* tile, int rows, int /*activation_bits*/, const void* panel, const PanelShape& shape,
              double* sums, int64_t sums_stride, bool accumulate) {
  const int64_t length = static_cast<int64_t>(shape.calls) * kEntriesPerCall;
  for (int column = 0; column < shape.groups * kColumns; ++column) {
    const int16_t* entries = static_cast<const int16_t*>(panel) + column * length;
    for (int r = 0; r < rows; ++r) {
      const int16_t* q = static_cast<const int16_t*>(tile) + r * shape.k_padded + shape.call * kEntriesPerCall;
      double sum = accumulate ? sums[r * sums_stride + column] : 0.0;
      for (int64_t k = 0; k < length; k += kFlush)
        sum += dot(q + k, entries + k, length - k < kFlush ? length - k : kFlush);
      sums[r * sums_stride + column] = sum;
    }
  }
}

int half_entry_at(const void* panel, const PanelShape& shape, int k, int column) {
  return static_cast<const int16_t*>(panel)[column * shape.calls * kEntriesPerCall + k];
}

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels = {"portable",
                                      [] { return true; },
                                      kColumns,
                                      /*max_groups=*/4,
                                      /*entry_bytes=*/2,
                                      kRowsPerTile,
                                      kRowsPerTile,
                                      /*sum_weight=*/1,
                                      /*panel_budget=*/256 << 10,
                                      quantise,
                                      draw,
                                      multiply,
                                      finish_rows<1>,
                                      unpack<half_entry_at>};
  return kernels;
}

}  // namespace poc::cpu
