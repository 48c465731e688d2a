// x @ P and x + x @ P on the CPU, and the entries of P. Nothing is allocated: the caller brings the
// workspace.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poc::cpu {

// Rows, columns and k that the work is cut into; 0 leaves the choice to the driver. No choice changes a bit.
struct Tiling {
  int64_t rows;     // quantised at a time
  int64_t columns;  // of a panel; rounded up to a group of columns
  int64_t k;        // of a panel; rounded up to 16
};

struct Projection {
  Activations x;
  int64_t rows;
  const uint8_t* row_mask;  // null, or a byte a row; 0: the row of y is that of x
  bool residual;
  void* y;  // [rows, columns], contiguous
  int64_t columns;
  int64_t column_start;
  Stream stream;
  double coefficient;  // a float32 value
  int threads;
  Tiling tiling;
};

// Every set of kernels that this build has, the best first, whether or not this processor runs it.
struct KernelList {
  const Kernels* const* begin;
  int count;
};
KernelList all_kernels();

int64_t project_workspace(const Kernels&, const Projection&);
void project(const Kernels&, const Projection&, void* workspace);

// entries[k, n] (int16, contiguous) = e[k_start + k, n_start + n]
struct Entries {
  Stream stream;
  int64_t k_start, k, n_start, n;
  int16_t* out;
  int threads;
};

int64_t entries_workspace(const Kernels&, const Entries&);
void entries(const Kernels&, const Entries&, void* workspace);

}  // namespace poc::cpu
