// What an instruction set offers to the driver (project.cpp), which knows no layout of limbs or panels.
#pragma once

#include <atomic>
#include <cstdint>

#include "../projection.h"

namespace poc::cpu {

constexpr int64_t kAlignment = 64;  // of every part of the workspace

// A row of activations after quantisation, except its limbs.
struct RowState {
  int64_t row;       // index in x and y
  int32_t exponent;  // E
  int32_t sum;       // sum of q
  int32_t high_sum;  // sum of the high limbs; only where limbs are bytes and q has two
  bool finite;
};

// A panel of P: entries for k in [16 * call, 16 * (call + calls)) of groups * group_columns columns, the first
// `column`.
struct PanelShape {
  uint32_t call;
  int calls;
  uint32_t column;
  int groups;
};

// Where the results of one tile of rows go.
struct Results {
  const Activations& x;
  const void* residual;  // x at the column that belongs to column 0 of y; null without
  void* y;
  int64_t y_row_stride;  // in elements
  int64_t y_column;      // first column of these results in y
  int columns;
  float coefficient;
};

// The columns [column, column + columns) of the rows of tiles [first_tile, last_tile).
struct Task {
  int64_t column, columns, first_tile, last_tile;
};

// What all threads that multiply share: quantised rows, tile by tile, and how the work is cut up (job.h).
struct Job {
  EntryKey key;
  const Activations& x;
  int64_t k_padded;  // limbs from k on are zero
  const void* residual;
  void* y;
  int64_t columns, column_start;
  double coefficient;
  const RowState* states = nullptr;
  int64_t rows = 0;
  const uint8_t* limbs = nullptr;
  int64_t tile_rows = 0, tile_bytes = 0;
  int64_t panel_columns = 0, panel_k = 0;
  int64_t parts = 1;  // of the rows, each a task of its own
};

// Hands the indices of a job's tasks to the threads that ask.
struct Tasks {
  const int64_t count;
  std::atomic<int64_t> next{0};
};

// One way to multiply: which tiles and panels it takes, and its loop over tasks. Every form serves any product, with
// the same bits; the driver takes the first that is meant for the number of rows.
struct Form {
  const char* name;
  int max_limb_rows;  // it is meant for at most this many limb rows (a row at 16 activation_bits has two); 0: for all
  int rows_per_tile_16;  // rows of a tile at 16 activation_bits
  int rows_per_tile_8;   // the same at 8
  bool whole_tiles;      // limbs lie as if every tile had all its rows; otherwise the last tile is as small as its rows
  int max_groups;        // of a panel
  int min_whole_groups;  // a panel is narrowed, down to this many groups, if it then holds all k; 0: it is not
  int64_t panel_budget;  // bytes of a panel that stay close to the core; 0: it keeps no panel, and a task has all k
  int64_t task_rows_16;  // rows of a task whose limbs stay close to the core at 16 activation_bits; 0: all there are
  int64_t task_rows_8;   // the same at 8

  // Bytes that run takes for each thread, a multiple of kAlignment.
  int64_t (*memory_bytes)(const Job&);
  // Does tasks until there are no more; each thread calls it once.
  void (*run)(const Job&, Tasks&, uint8_t* memory);
};

struct Kernels {
  const char* name;
  bool (*supported)();
  int group_columns;   // columns that are drawn together
  int k_unit;          // limbs and the panels of products hold whole multiples of this many k
  int entry_bytes;     // bytes of an entry in a panel
  bool byte_limbs;     // q is kept as bytes, two with 16 activation_bits; otherwise as int16
  bool takes_scratch;  // of quantise

  // Quantises the rows states[i].row of x into a tile of limbs that has room for `room` rows; scratch holds
  // rows * k_padded int16 if it takes_scratch.
  void (*quantise)(const Activations&, int64_t k_padded, RowState* states, int rows, int room, int16_t* scratch,
                   void* tile);
  void (*draw)(const EntryKey&, const PanelShape&, void* panel);
  // Writes e of [k_begin, k_end) of the panel's k, counted from its first, and of its columns [0, columns), row-major.
  void (*unpack)(const void* panel, const PanelShape&, int k_begin, int k_end, int columns, int16_t* entries,
                 int64_t entries_stride);
  const Form* forms;
  int form_count;
};

const Kernels& portable_kernels();
#if defined(POC_KERNELS_X86)
// The `supported` of those below (supported.cpp).
bool has_avx2();
bool has_avx512_vnni();
bool has_avx512_vbmi();
bool has_amx();

const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vbmi_kernels();
#endif
#if defined(POC_KERNELS_AMX)
const Kernels& amx_kernels();
#endif
#if defined(POC_KERNELS_ARM64)
bool has_neon_dotprod();
bool has_neon_i8mm();

const Kernels& neon_dotprod_kernels();
const Kernels& neon_i8mm_kernels();
#endif

}  // namespace poc::cpu
