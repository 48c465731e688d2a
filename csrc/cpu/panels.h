// The plain form of a product, compiled once per instruction set: each task draws the panels of its columns one after
// another, multiplies its rows by each, and forgets it.
#pragma once

#include <cstdint>

#include "job.h"

namespace poc::cpu {
namespace {

// `Set` is an instruction set's part in it:
//   kGroupColumns, kEntryBytes    as in its Kernels
//   Sum                           what sums are kept in
//   sums_per_entry(job)           sums that make an entry of the result
//   drawer_bytes(job)             bytes of memory for its drawer
//   Drawer(job, memory)           draws panels: drawer.draw(shape, panel)
//   multiply(job, tile, shape, panel, sums, accumulate)
//   finish(job, results, tile, sums)
template <class Set>
int64_t panels_memory_bytes(const Job& job) {
  const int64_t panel = job.panel_columns * job.panel_k * Set::kEntryBytes;
  // Sums of all rows outlive a panel only when the next panel adds to them.
  const int64_t rows = (whole_k(job) ? 1 : tiles_of_a_part(job)) * job.tile_rows;
  const int64_t sums =
      rows * Set::sums_per_entry(job) * job.panel_columns * static_cast<int64_t>(sizeof(typename Set::Sum));
  return round_up(Set::drawer_bytes(job), kAlignment) + round_up(panel, kAlignment) + round_up(sums, kAlignment);
}

template <class Set>
void run_panels(const Job& job, Tasks& tasks, uint8_t* memory) {
  using Sum = typename Set::Sum;
  typename Set::Drawer drawer(job, memory);
  uint8_t* panel = memory + round_up(Set::drawer_bytes(job), kAlignment);
  auto* sums = reinterpret_cast<Sum*>(panel + round_up(job.panel_columns * job.panel_k * Set::kEntryBytes, kAlignment));
  const int64_t tile_sums = job.tile_rows * Set::sums_per_entry(job) * job.panel_columns;
  for (int64_t index; (index = take(tasks)) >= 0;) {
    const Task task = task_at(job, index);
    const Results results = results_at(job, task.column, task.columns);
    for (int64_t k = 0; k < job.k_padded; k += job.panel_k) {
      const PanelShape shape = panel_at(job, k, task.column, divide_up(task.columns, Set::kGroupColumns));
      drawer.draw(shape, panel);
      const bool last = k + job.panel_k >= job.k_padded;
      for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
        Sum* to = sums + (whole_k(job) ? 0 : (tile - task.first_tile) * tile_sums);
        Set::multiply(job, tile, shape, panel, to, k > 0);
        if (last) Set::finish(job, results, tile, to);
      }
    }
  }
}

}  // namespace
}  // namespace poc::cpu
