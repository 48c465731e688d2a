// What an instruction set offers to the driver (project.cpp). Layouts of limbs and panels are its own affair.
#pragma once

#include <cstdint>

#include "../definition.h"

namespace poc::cpu {

// An activation row after quantisation, all but its limbs.
struct RowState {
  int64_t row;       // index in x and y
  int32_t exponent;  // E
  int32_t sum;       // sum of q
  bool finite;
};

// Where activations come from.
struct Activations {
  const void* data;
  DType dtype;
  int64_t row_stride;  // in elements
  int64_t k;
  int64_t k_padded;  // k rounded up to whole Philox calls; limbs beyond k are zero
  int activation_bits;
};

// Which P: everything that its entries depend on besides their position.
struct Stream {
  uint64_t seed;
  uint32_t domain;
};

// Entries for k in [16 * call, 16 * (call + calls)) of groups * group_columns columns from `column` on.
struct PanelShape {
  uint32_t call;
  int calls;
  uint32_t column;
  int groups;
  int64_t k_padded;  // of a whole row
};

// Where the results of one tile of rows go.
struct Results {
  void* y;
  int64_t y_row_stride;  // in elements
  int64_t y_column;      // first column of this panel in y
  const void* x;         // residual: x at the column that belongs to y's column 0; else null
  int64_t x_row_stride;
  DType dtype;
  int columns;
  float coefficient;
  int activation_bits;
};

struct Kernels {
  const char* name;
  bool (*supported)();
  int group_columns;     // columns that are generated together
  int max_groups;        // groups of a panel, at most
  int entry_bytes;       // bytes of an entry in a panel
  int rows_per_tile_16;  // by activation_bits
  int rows_per_tile_8;
  int sum_weight;        // T = 2 * (what multiply sums) + sum_weight * (sum of q)
  int64_t panel_budget;  // bytes of a panel that stay close to the core

  // Quantise the rows named by states[i].row into a tile; scratch holds rows * k_padded int16.
  void (*quantise)(const Activations&, RowState* states, int rows, int16_t* scratch, void* tile);
  void (*generate)(const Stream&, const PanelShape&, void* panel);
  // sums[row * sums_stride + column] (+)= sum over the panel's k; `tile` is the whole tile, k from 0 on.
  void (*multiply)(const void* tile, int rows, int activation_bits, const void* panel, const PanelShape&, double* sums,
                   int64_t sums_stride, bool accumulate);
  void (*finish)(const Results&, const RowState* states, int rows, const double* sums, int64_t sums_stride);
  // e of the panel's k in [k_begin, k_end) (counted from its first) and its columns [0, columns), row-major.
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
