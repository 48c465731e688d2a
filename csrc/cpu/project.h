// x @ P and x + x @ P on the CPU, and the entries of P. Nothing is allocated: the caller brings the workspace.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poc::cpu {

// How the work is cut up; 0 leaves the choice to the driver. No choice changes a bit.
struct Tiling {
  int64_t block_rows;     // rows that are quantised at a time
  int64_t panel_columns;  // rounded up to a group of columns
  int64_t panel_k;        // rounded up to the instruction set's k_unit
  int form;               // which of the instruction set's forms, from 1 on
};

struct Projection {
  Activations x;
  int64_t rows;
  const uint8_t* row_mask;  // null, or a byte per row; 0: the row of y is that of x
  bool residual;
  void* y;  // [rows, columns], contiguous
  int64_t columns;
  int64_t column_start;
  const uint64_t* seed;
  uint32_t domain;
  double coefficient;  // a float32 value
  int threads;
  Tiling tiling;
};

// Every set of kernels that this build has, the best first, whether or not this CPU runs it.
struct KernelList {
  const Kernels* const* begin;
  int count;
};
KernelList all_kernels();

// Bytes of the workspace.
int64_t project_workspace(const Kernels&, const Projection&);
void project(const Kernels&, const Projection&, void* workspace);

// out[i, j] (int16, contiguous) = e[k_start + i, n_start + j], for i < k and j < n
struct Entries {
  const uint64_t* seed;
  uint32_t domain;
  int64_t k_start, k, n_start, n;
  int16_t* out;
  int threads;
};

int64_t entries_workspace(const Kernels&, const Entries&);
void entries(const Kernels&, const Entries&, void* workspace);

}  // namespace poc::cpu
