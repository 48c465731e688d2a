// What an instruction set offers to the driver (project.cpp), which knows no layout of limbs or panels.
#pragma once

#include <cstdint>

#include "../projection.h"

namespace poc::cpu {

// A row of activations after quantisation, except its limbs.
struct RowState {
  int64_t row;       // index in x and y
  int32_t exponent;  // E
  int32_t sum;       // sum of q
  bool finite;
};

// A panel of P: entries for k in [16 * call, 16 * (call + calls)) of groups * group_columns columns, the first
// `column`.
struct PanelShape {
  uint32_t call;
  int calls;
  uint32_t column;
  int groups;
  int64_t k_padded;  // of a whole row of x
};

// Where the results of one tile of rows go.
struct Results {
  const Activations& x;
  const void* residual;  // x at the column that belongs to column 0 of y; null without
  void* y;
  int64_t y_row_stride;  // in elements
  int64_t y_column;      // first column of this panel in y
  int columns;
  float coefficient;
};

struct Kernels {
  const char* name;
  bool (*supported)();
  int group_columns;     // columns that are drawn together
  int max_groups;        // of a panel
  int entry_bytes;       // bytes of an entry in a panel
  int rows_per_tile_16;  // rows of a tile at 16 activation_bits
  int rows_per_tile_8;   // the same at 8
  int sum_weight;        // T = 2 * (what multiply sums) + sum_weight * (sum of q)
  int64_t panel_budget;  // bytes of a panel that stay close to the core

  // Quantises the rows states[i].row of x into a tile of limbs; scratch holds rows * k_padded int16.
  void (*quantise)(const Activations&, RowState* states, int rows, int16_t* scratch, void* tile);
  void (*draw)(const EntryKey&, const PanelShape&, void* panel);
  // sums[row * sums_stride + column] = (or += with accumulate) the sum over the k of the panel; `tile` holds all k.
  void (*multiply)(const void* tile, int rows, int activation_bits, const void* panel, const PanelShape&, double* sums,
                   int64_t sums_stride, bool accumulate);
  void (*finish)(const Results&, const RowState* states, int rows, const double* sums, int64_t sums_stride);
  // Writes e of [k_begin, k_end) of the panel's k, counted from its first, and of its columns [0, columns), row-major.
  void (*unpack)(const void* panel, const PanelShape&, int k_begin, int k_end, int columns, int16_t* entries,
                 int64_t entries_stride);
};

const Kernels& portable_kernels();
#if defined(POC_KERNELS_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vbmi_kernels();
#endif

}  // namespace poc::cpu
