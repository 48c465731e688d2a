// The driver that all instruction sets share: rows are quantised in blocks; each task draws the panels of some
// columns, multiplies every row of the block by them, and forgets them.
#include "project.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace poc::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kLimbBudget = 16 << 20;  // bytes of quantised rows that are kept at a time
constexpr int64_t kMinBlockRows = 256;     // with fewer, the time to draw P again would show
constexpr int64_t kCopyRows = 32;          // masked rows that one task copies
constexpr int64_t kEntriesPanel = 512;     // k of a panel that entries are read from
constexpr int64_t kTasksPerThread = 4;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// The shape of a panel of k rows of P from row k_start on.
PanelShape panel_shape(int64_t k_start, int64_t k, int64_t column, int64_t groups, int64_t k_padded) {
  return {static_cast<uint32_t>(k_start / kEntriesPerCall), static_cast<int>(divide_up(k, kEntriesPerCall)),
          static_cast<uint32_t>(column), static_cast<int>(groups), k_padded};
}

// How one call is cut up. Sizes in bytes; all but tile_bytes are multiples of kAlignment.
struct Plan {
  int64_t tile_rows, block_rows, panel_columns, panel_k;
  int64_t column_tasks, row_tasks;
  int64_t tile_bytes, states_bytes, limbs_bytes;   // shared by all threads
  int64_t panel_bytes, sums_bytes, scratch_bytes;  // of each thread

  int64_t shared_bytes() const { return states_bytes + limbs_bytes; }
  int64_t thread_bytes() const { return panel_bytes + sums_bytes + scratch_bytes; }
};

Plan make_plan(const Kernels& kernels, const Projection& p) {
  Plan plan;
  const int64_t k = p.x.k_padded, group = kernels.group_columns;
  plan.tile_rows = p.x.activation_bits == 16 ? kernels.rows_per_tile_16 : kernels.rows_per_tile_8;

  const int64_t fitting_rows = std::max(kMinBlockRows, kLimbBudget / (k * 2));
  plan.block_rows = std::min(p.rows, p.tiling.block_rows > 0 ? p.tiling.block_rows : fitting_rows);
  const int64_t tiles = divide_up(plan.block_rows, plan.tile_rows);

  int64_t groups = kernels.max_groups;
  if (p.tiling.panel_columns > 0) {
    groups = std::min(groups, divide_up(p.tiling.panel_columns, group));
  } else {
    // Narrower panels when there are too few for the threads.
    while (groups > 1 && divide_up(p.columns, groups * group) < 2 * p.threads) --groups;
  }
  groups = std::min(groups, divide_up(p.columns, group));
  plan.panel_columns = groups * group;
  const int64_t fitting_k = kernels.panel_budget / (plan.panel_columns * kernels.entry_bytes);
  plan.panel_k = std::min(k, round_up(p.tiling.panel_k > 0 ? p.tiling.panel_k : fitting_k, kEntriesPerCall));
  plan.column_tasks = divide_up(p.columns, plan.panel_columns);
  // Few columns and many rows: each part of the rows draws the same panels again.
  const int64_t wanted_tasks = p.threads > 1 ? kTasksPerThread * p.threads : 1;
  plan.row_tasks = std::clamp<int64_t>(wanted_tasks / plan.column_tasks, 1, divide_up(plan.block_rows, kMinBlockRows));

  plan.tile_bytes = plan.tile_rows * k * 2;
  plan.states_bytes = round_up(plan.block_rows * static_cast<int64_t>(sizeof(RowState)), kAlignment);
  plan.limbs_bytes = round_up(tiles * plan.tile_bytes, kAlignment);
  plan.panel_bytes = round_up(plan.panel_columns * plan.panel_k * kernels.entry_bytes, kAlignment);
  // Sums of all rows outlive a panel only when the next panel adds to them.
  const int64_t sums_rows = plan.panel_k < k ? tiles * plan.tile_rows : plan.tile_rows;
  plan.sums_bytes = round_up(sums_rows * plan.panel_columns * static_cast<int64_t>(sizeof(double)), kAlignment);
  plan.scratch_bytes = round_up(plan.tile_bytes, kAlignment);
  return plan;
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const uint8_t* residual_row(const Projection& p, int64_t row) {
  return static_cast<const uint8_t*>(p.x.data) + (row * p.x.row_stride + p.column_start) * element_bytes(p.x.dtype);
}

// Rows [first_row, last_row) of x: the states of those to project in order, and their limbs tile by tile.
struct Block {
  int64_t first_row, last_row;
  RowState* states;
  uint8_t* limbs;
  int64_t rows;
};

// What all tasks of a call share.
struct Call {
  const Kernels& kernels;
  const Projection& p;
  const EntryKey key;
  const Plan plan;
  uint8_t* slots;  // the parts of the workspace that each thread has for itself

  uint8_t* panel(int slot) const { return slots + slot * plan.thread_bytes(); }
  double* sums(int slot) const { return reinterpret_cast<double*>(panel(slot) + plan.panel_bytes); }
  int16_t* scratch(int slot) const {
    return reinterpret_cast<int16_t*>(panel(slot) + plan.panel_bytes + plan.sums_bytes);
  }

  void copy_masked_rows(int64_t first_row, int64_t last_row) const {
    const int64_t bytes = p.columns * element_bytes(p.x.dtype);
    for (int64_t row = first_row; row < last_row; ++row)
      if (p.row_mask[row] == 0) std::memcpy(static_cast<uint8_t*>(p.y) + row * bytes, residual_row(p, row), bytes);
  }

  void quantise_tile(const Block& block, int64_t tile, int slot) const {
    const int64_t first = tile * plan.tile_rows;
    kernels.quantise(p.x, block.states + first, static_cast<int>(std::min(plan.tile_rows, block.rows - first)),
                     scratch(slot), block.limbs + tile * plan.tile_bytes);
  }

  // Some columns of the rows of tiles [first_tile, last_tile).
  void multiply(const Block& block, int64_t first_tile, int64_t last_tile, int64_t column, int slot) const {
    const int64_t columns = std::min(plan.panel_columns, p.columns - column);
    const float coefficient = static_cast<float>(p.coefficient);  // here, where subnormals are kept
    const void* residual = p.residual ? residual_row(p, 0) : nullptr;
    const Results results{p.x, residual, p.y, p.columns, column, static_cast<int>(columns), coefficient};

    for (int64_t k = 0; k < p.x.k_padded; k += plan.panel_k) {
      const int64_t panel_k = std::min(plan.panel_k, p.x.k_padded - k);
      const int64_t groups = divide_up(columns, kernels.group_columns);
      const PanelShape shape = panel_shape(k, panel_k, p.column_start + column, groups, p.x.k_padded);
      kernels.draw(key, shape, panel(slot));
      const bool whole = plan.panel_k == p.x.k_padded, last = k + panel_k == p.x.k_padded;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t first = tile * plan.tile_rows;
        const int rows = static_cast<int>(std::min(plan.tile_rows, block.rows - first));
        double* tile_sums = sums(slot) + (whole ? 0 : (tile - first_tile) * plan.tile_rows * plan.panel_columns);
        kernels.multiply(block.limbs + tile * plan.tile_bytes, rows, p.x.activation_bits, panel(slot), shape, tile_sums,
                         plan.panel_columns, k > 0);
        if (last) kernels.finish(results, block.states + first, rows, tile_sums, plan.panel_columns);
      }
    }
  }

  void project_block(const Block& block) const {
    const int64_t tiles = divide_up(block.rows, plan.tile_rows);
    const int64_t copies = p.row_mask == nullptr ? 0 : divide_up(block.last_row - block.first_row, kCopyRows);
    const int64_t parts = std::min(plan.row_tasks, tiles);
    parallel_stages(
        p.threads, tiles + copies,
        [&](int64_t task, int slot) {
          if (task < tiles) return quantise_tile(block, task, slot);
          const int64_t row = block.first_row + (task - tiles) * kCopyRows;
          copy_masked_rows(row, std::min(row + kCopyRows, block.last_row));
        },
        plan.column_tasks * parts,
        [&](int64_t task, int slot) {
          const int64_t part = task % parts;
          multiply(block, part * tiles / parts, (part + 1) * tiles / parts, task / parts * plan.panel_columns, slot);
        });
  }
};

}  // namespace

KernelList all_kernels() {
  static const Kernels* const list[] = {
#if defined(POC_KERNELS_X86)
      &avx512_vbmi_kernels(), &avx512_kernels(), &avx2_kernels(),
#endif
      &portable_kernels()};
  return {list, static_cast<int>(sizeof list / sizeof list[0])};
}

int64_t project_workspace(const Kernels& kernels, const Projection& p) {
  const Plan plan = make_plan(kernels, p);
  return plan.shared_bytes() + p.threads * plan.thread_bytes() + kAlignment;
}

void project(const Kernels& kernels, const Projection& p, void* workspace) {
  const Plan plan = make_plan(kernels, p);
  auto* base = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(workspace), kAlignment));
  const Call call{kernels, p, read_key(p.seed, p.domain), plan, base + plan.shared_bytes()};
  Block block{0, 0, reinterpret_cast<RowState*>(base), base + plan.states_bytes, 0};
  while (block.last_row < p.rows) {
    block.first_row = block.last_row;
    block.rows = 0;
    for (; block.last_row < p.rows && block.rows < plan.block_rows; ++block.last_row)
      if (p.row_mask == nullptr || p.row_mask[block.last_row] != 0) block.states[block.rows++].row = block.last_row;
    call.project_block(block);
  }
}

int64_t entries_workspace(const Kernels& kernels, const Entries& e) {
  return e.threads * kernels.group_columns * kEntriesPanel * kernels.entry_bytes + kAlignment;
}

void entries(const Kernels& kernels, const Entries& e, void* workspace) {
  auto* base = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(workspace), kAlignment));
  const EntryKey key = read_key(e.seed, e.domain);
  const int64_t group = kernels.group_columns, k_end = e.k_start + e.k;
  const int64_t first_call = e.k_start / kEntriesPerCall, panel_calls = kEntriesPanel / kEntriesPerCall;
  const int64_t k_tasks = divide_up(divide_up(k_end, kEntriesPerCall) - first_call, panel_calls);
  const auto write = [&](int64_t task, int slot) {
    uint8_t* panel = base + slot * group * kEntriesPanel * kernels.entry_bytes;
    const int64_t column = task / k_tasks * group, k = (first_call + task % k_tasks * panel_calls) * kEntriesPerCall;
    const int64_t k_begin = std::max(k, e.k_start), k_stop = std::min(k + kEntriesPanel, k_end);
    const PanelShape shape = panel_shape(k, k_stop - k, e.n_start + column, 1, round_up(k_end, kEntriesPerCall));
    kernels.draw(key, shape, panel);
    kernels.unpack(panel, shape, static_cast<int>(k_begin - k), static_cast<int>(k_stop - k),
                   static_cast<int>(std::min(group, e.n - column)), e.out + (k_begin - e.k_start) * e.n + column, e.n);
  };
  parallel_stages(e.threads, 0, write, divide_up(e.n, group) * k_tasks, write);
}

}  // namespace poc::cpu
