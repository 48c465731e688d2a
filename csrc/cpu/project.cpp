// The driver that all instruction sets share: rows are quantised in blocks; then the threads multiply each block,
// column by column, in one of the forms that the instruction set has.
#include "project.h"

#include <algorithm>
#include <cstring>

#include "job.h"
#include "parallel.h"

namespace poc::cpu {
namespace {

constexpr int64_t kLimbBudget = 16 << 20;  // bytes of quantised rows that are kept at a time
constexpr int64_t kMinBlockRows = 256;     // with fewer, the time to draw P again would show
constexpr int64_t kCopyRows = 32;          // masked rows that one task copies
constexpr int64_t kEntriesPanel = 512;     // k of a panel that entries are read from
constexpr int64_t kTasksPerThread = 4;

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const uint8_t* residual_row(const Projection& p, int64_t row) {
  return static_cast<const uint8_t*>(p.x.data) + (row * p.x.row_stride + p.column_start) * element_bytes(p.x.dtype);
}

const Form& form_of(const Kernels& kernels, const Projection& p) {
  if (p.tiling.form > 0) return kernels.forms[p.tiling.form - 1];
  const int64_t limb_rows = p.rows * byte_limbs(p.x.activation_bits);
  const Form* form = kernels.forms;
  while (form->max_limb_rows > 0 && form->max_limb_rows < limb_rows) ++form;
  return *form;
}

// How one call is cut up, and the parts of its workspace, in bytes.
struct Plan {
  const Kernels& kernels;
  const Form& form;
  int64_t block_rows;
  Job job;                              // of a whole block
  int64_t states_bytes, limbs_bytes;    // shared by all threads
  int64_t memory_bytes, scratch_bytes;  // of each thread

  int64_t shared_bytes() const { return states_bytes + limbs_bytes; }
  int64_t thread_bytes() const { return memory_bytes + scratch_bytes; }
};

Plan make_plan(const Kernels& kernels, const Projection& p) {
  const Form& form = form_of(kernels, p);
  Job job{{0, p.domain}, p.x, round_up(p.x.k, kernels.k_unit), nullptr, p.y, p.columns, p.column_start, p.coefficient};
  if (p.residual) job.residual = residual_row(p, 0);
  const int64_t k = job.k_padded, group = kernels.group_columns;
  const int64_t q_bytes = kernels.byte_limbs ? byte_limbs(p.x.activation_bits) : 2;
  job.tile_rows = p.x.activation_bits == 16 ? form.rows_per_tile_16 : form.rows_per_tile_8;
  job.tile_bytes = job.tile_rows * k * q_bytes;

  const int64_t task_rows = p.x.activation_bits == 16 ? form.task_rows_16 : form.task_rows_8;
  const int64_t fitting_rows = std::max(kMinBlockRows, kLimbBudget / (k * q_bytes));
  int64_t block_rows = fitting_rows;
  if (p.tiling.block_rows > 0) {
    block_rows = p.tiling.block_rows;
  } else if (p.threads == 1 && task_rows > 0) {
    // Limbs are multiplied while they are close; several threads would wait block by block.
    const int64_t blocks = divide_up(p.rows, std::min(task_rows, fitting_rows));
    block_rows = round_up(divide_up(p.rows, blocks), job.tile_rows);
  }
  block_rows = std::min(p.rows, block_rows);
  job.rows = block_rows;

  int64_t groups = form.max_groups;
  if (p.tiling.panel_columns > 0) {
    groups = std::min(groups, divide_up(p.tiling.panel_columns, group));
  } else {
    // Narrower panels when there are too few for the threads.
    while (groups > 1 && divide_up(p.columns, groups * group) < 2 * p.threads) --groups;
  }
  groups = std::min(groups, divide_up(p.columns, group));
  const int64_t whole_groups = form.panel_budget / (k * group * kernels.entry_bytes);
  if (form.min_whole_groups > 0 && whole_groups >= form.min_whole_groups) groups = std::min(groups, whole_groups);
  job.panel_columns = groups * group;
  job.panel_k = k;
  if (form.panel_budget > 0) {
    const int64_t fitting_k = form.panel_budget / (job.panel_columns * kernels.entry_bytes);
    job.panel_k = std::min(k, round_up(p.tiling.panel_k > 0 ? p.tiling.panel_k : fitting_k, kernels.k_unit));
  }
  // Few columns and many rows: each part of the rows draws the same panels again.
  const int64_t wanted_tasks = p.threads > 1 ? kTasksPerThread * p.threads : 1;
  job.parts = std::clamp<int64_t>(wanted_tasks / column_tasks(job), 1, divide_up(block_rows, kMinBlockRows));
  if (task_rows > 0) job.parts = std::max(job.parts, divide_up(block_rows, task_rows));

  Plan plan{kernels, form, block_rows, job, 0, 0, 0, 0};
  plan.states_bytes = round_up(block_rows * static_cast<int64_t>(sizeof(RowState)), kAlignment);
  plan.limbs_bytes = round_up(tiles_of(job) * job.tile_bytes, kAlignment);
  plan.memory_bytes = form.memory_bytes(job);
  plan.scratch_bytes = kernels.takes_scratch ? round_up(job.tile_rows * k * 2, kAlignment) : 0;
  return plan;
}

// Rows [first_row, last_row) of x; states has those to project in order.
struct Block {
  int64_t first_row, last_row;
  RowState* states;
  uint8_t* limbs;
  int64_t rows;
};

void copy_masked_rows(const Projection& p, int64_t first_row, int64_t last_row) {
  const int64_t bytes = p.columns * element_bytes(p.x.dtype);
  for (int64_t row = first_row; row < last_row; ++row)
    if (p.row_mask[row] == 0) std::memcpy(static_cast<uint8_t*>(p.y) + row * bytes, residual_row(p, row), bytes);
}

// `slots` are the parts of the workspace that each thread has for itself.
void project_block(const Plan& plan, const Projection& p, const EntryKey& key, const Block& block, uint8_t* slots) {
  Job job = plan.job;
  job.key = key;
  job.states = block.states;
  job.limbs = block.limbs;
  job.rows = block.rows;
  Tasks tasks{count_tasks(job)};
  const int64_t copies = p.row_mask == nullptr ? 0 : divide_up(block.last_row - block.first_row, kCopyRows);
  parallel_stages(
      p.threads, tiles_of(job) + copies,
      [&](int64_t task, int slot) {
        if (task < tiles_of(job)) {
          auto* scratch = reinterpret_cast<int16_t*>(slots + slot * plan.thread_bytes() + plan.memory_bytes);
          const int rows = rows_of(job, task), room = plan.form.whole_tiles ? static_cast<int>(job.tile_rows) : rows;
          return plan.kernels.quantise(p.x, job.k_padded, block.states + task * job.tile_rows, rows, room, scratch,
                                       block.limbs + task * job.tile_bytes);
        }
        const int64_t row = block.first_row + (task - tiles_of(job)) * kCopyRows;
        copy_masked_rows(p, row, std::min(row + kCopyRows, block.last_row));
      },
      std::min<int64_t>(p.threads, count_tasks(job)),
      [&](int64_t, int slot) { plan.form.run(job, tasks, slots + slot * plan.thread_bytes()); });
}

}  // namespace

KernelList all_kernels() {
  static const Kernels* const list[] = {
#if defined(POC_KERNELS_AMX)
      &amx_kernels(),
#endif
#if defined(POC_KERNELS_X86)
      &avx512_vbmi_kernels(), &avx512_kernels(),       &avx2_kernels(),
#endif
#if defined(POC_KERNELS_ARM64)
      &neon_i8mm_kernels(),   &neon_dotprod_kernels(),
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
  const EntryKey key = read_key(p.seed, p.domain);
  auto* base = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(workspace), kAlignment));
  Block block{0, 0, reinterpret_cast<RowState*>(base), base + plan.states_bytes, 0};
  while (block.last_row < p.rows) {
    block.first_row = block.last_row;
    block.rows = 0;
    for (; block.last_row < p.rows && block.rows < plan.block_rows; ++block.last_row)
      if (p.row_mask == nullptr || p.row_mask[block.last_row] != 0) block.states[block.rows++].row = block.last_row;
    project_block(plan, p, key, block, base + plan.shared_bytes());
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
    const PanelShape shape = {static_cast<uint32_t>(k / kEntriesPerCall),
                              static_cast<int>(divide_up(k_stop - k, kEntriesPerCall)),
                              static_cast<uint32_t>(e.n_start + column), /*groups=*/1};
    kernels.draw(key, shape, panel);
    kernels.unpack(panel, shape, static_cast<int>(k_begin - k), static_cast<int>(k_stop - k),
                   static_cast<int>(std::min(group, e.n - column)), e.out + (k_begin - e.k_start) * e.n + column, e.n);
  };
  parallel_stages(e.threads, 0, write, divide_up(e.n, group) * k_tasks, write);
}

}  // namespace poc::cpu
