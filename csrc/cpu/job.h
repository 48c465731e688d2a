// How a job is cut up, compiled once per instruction set (hence the unnamed namespace, and nothing of the standard
// library: no function of one set may be linked into the code of another).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poc::cpu {
namespace {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
inline int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Limbs of a q that are kept as bytes.
inline int64_t byte_limbs(int activation_bits) { return activation_bits == 16 ? 2 : 1; }

inline int64_t tiles_of(const Job& job) { return divide_up(job.rows, job.tile_rows); }
inline int64_t tiles_of_a_part(const Job& job) { return divide_up(tiles_of(job), job.parts); }  // at most
inline const uint8_t* tile_at(const Job& job, int64_t tile) { return job.limbs + tile * job.tile_bytes; }
inline const RowState* states_at(const Job& job, int64_t tile) { return job.states + tile * job.tile_rows; }
inline int rows_of(const Job& job, int64_t tile) {
  return static_cast<int>(lesser(job.tile_rows, job.rows - tile * job.tile_rows));
}

inline int64_t column_tasks(const Job& job) { return divide_up(job.columns, job.panel_columns); }
inline int64_t count_tasks(const Job& job) { return column_tasks(job) * lesser(job.parts, tiles_of(job)); }
inline Task task_at(const Job& job, int64_t index) {
  const int64_t part = index / column_tasks(job), parts = lesser(job.parts, tiles_of(job)), tiles = tiles_of(job);
  const int64_t column = index % column_tasks(job) * job.panel_columns;
  return {column, lesser(job.panel_columns, job.columns - column), part * tiles / parts, (part + 1) * tiles / parts};
}
// The index of the next task, or -1 when there are no more.
inline int64_t take(Tasks& tasks) {
  const int64_t index = tasks.next.fetch_add(1);
  return index < tasks.count ? index : -1;
}

// Whether a panel holds all k of its columns.
inline bool whole_k(const Job& job) { return job.panel_k >= job.k_padded; }
inline PanelShape panel_at(const Job& job, int64_t k, int64_t column, int64_t groups) {
  return {static_cast<uint32_t>(k / kEntriesPerCall),
          static_cast<int>(lesser(job.panel_k, job.k_padded - k) / kEntriesPerCall),
          static_cast<uint32_t>(job.column_start + column), static_cast<int>(groups)};
}

// The results of some columns; to be called where subnormals are kept.
inline Results results_at(const Job& job, int64_t column, int64_t columns) {
  return {
      job.x, job.residual, job.y, job.columns, column, static_cast<int>(columns), static_cast<float>(job.coefficient)};
}

}  // namespace
}  // namespace poc::cpu
