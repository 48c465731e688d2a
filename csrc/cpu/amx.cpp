// AMX: tiles of int8, beside AVX-512 with VNNI and VBMI (Sapphire Rapids and later).
//
// A panel is [group][k / 4][16 columns][4 k], so that 64 k of a group are a tile of 1 KiB. A tile of limbs is, for each
// 64 k, two tiles of 16 limb rows: the high and the low limbs of 16 rows, or 32 rows at 8 activation_bits. Two by two
// of these make four tiles of sums. The next panel is drawn, a call or two at a time, between the instructions that
// multiply this one: the units for tiles and for vectors work side by side as long as what they get alternates.
#include "avx512_vbmi_operand.h"
#include "amx_tiles.h"
#include "avx512_few.inl.h"

namespace poc::cpu {
namespace {

constexpr int kPairColumns = 2 * kColumns;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;
constexpr int64_t kSumsBytes = 4 * kTileBytes;  // int32 [32 limb rows][32 columns]

// Configures tiles, those of sums and limbs with that many rows, until the end of the scope. Not to release them would
// cost each switch to another thread 8 KiB and keep the core from its deeper idle states.
class ConfiguredTiles {
 public:
  explicit ConfiguredTiles(int rows) {
    TileConfig config;
    for (int t = 0; t < kTiles; ++t) {
      config.row_bytes[t] = kTileRowBytes;
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileRows);  // 0 to 3 sums, 4 and 5 limbs, 6 and 7 entries
    }
    load_tile_config(config);
  }
  ~ConfiguredTiles() { release_tiles(); }
  ConfiguredTiles(const ConfiguredTiles&) = delete;
  ConfiguredTiles& operator=(const ConfiguredTiles&) = delete;
};

// Draws a panel a few calls at a time.
class PanelInSteps {
 public:
  explicit PanelInSteps(const Drawer& drawer) : drawer_(drawer), group_(drawer.keys, 0) {}

  void start(const PanelShape& shape, uint8_t* panel) {
    scalars_ = drawer_.scalars + shape.call;
    calls_ = shape.calls;
    groups_ = 2 * shape.groups;
    column_ = shape.column;
    call_ = 0;
    out_ = panel;
    group_ = Group(drawer_.keys, column_);
  }
  // Steps that are left.
  template <int kCalls>
  int64_t left() const {
    return (static_cast<int64_t>(groups_) * calls_ - call_) / kCalls;
  }
  template <int kCalls, class Work = NoWork>
  [[gnu::always_inline]] void step(const Work& work = Work()) {
    uint8_t* out = out_;
    draw_words<kCalls>(
        drawer_.keys, scalars_ + call_, group_,
        [out](int i, __m512i words) { _mm512_store_si512(out + i * 64, Operand::entries(words)); }, work);
    out_ += kCalls * kVectorsPerCall * 64;
    call_ += kCalls;
    if (call_ < calls_) return;
    call_ = 0;
    --groups_;
    column_ += kColumns;
    group_ = Group(drawer_.keys, column_);
  }
  template <int kCalls>
  void finish() {
    while (groups_ > 0) step<kCalls>();
  }

 private:
  const Drawer& drawer_;
  const CallScalars* scalars_ = nullptr;
  int calls_ = 0, groups_ = 0, call_ = 0;
  uint32_t column_ = 0;
  uint8_t* out_ = nullptr;
  Group group_;
};

// One step of 64 k, in four parts: limbs are two tiles, `entries` those of two groups.
[[gnu::always_inline]] inline void multiply_part(int part, const uint8_t* limbs, const uint8_t* entries,
                                                 int64_t group_bytes) {
  if (part == 0) {
    load_tile<4>(limbs, kTileRowBytes);
    load_tile<6>(entries, kTileRowBytes);
    multiply_tiles<0, 4, 6>();
  } else if (part == 1) {
    load_tile<7>(entries + group_bytes, kTileRowBytes);
    multiply_tiles<1, 4, 7>();
  } else if (part == 2) {
    load_tile<5>(limbs + kTileBytes, kTileRowBytes);
    multiply_tiles<2, 5, 6>();
  } else {
    multiply_tiles<3, 5, 7>();
  }
}

// The four tiles of sums in memory: rows of 32 columns.
constexpr int64_t kSumsStride = kPairColumns * sizeof(int32_t);

inline void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
}
inline void load_sums(const uint8_t* sums) {
  load_tile<0>(sums, kSumsStride);
  load_tile<1>(sums + kTileRowBytes, kSumsStride);
  load_tile<2>(sums + kTileRows * kSumsStride, kSumsStride);
  load_tile<3>(sums + kTileRows * kSumsStride + kTileRowBytes, kSumsStride);
}
inline void store_sums(uint8_t* sums) {
  store_tile<0>(sums, kSumsStride);
  store_tile<1>(sums + kTileRowBytes, kSumsStride);
  store_tile<2>(sums + kTileRows * kSumsStride, kSumsStride);
  store_tile<3>(sums + kTileRows * kSumsStride + kTileRowBytes, kSumsStride);
}

// Spreads the steps that draw a panel evenly over those of products.
struct Spread {
  const int64_t drawing, products;
  int64_t due = 0;
};

// What finish will read and write of a row: at power-of-two strides its lines are in no cache.
inline void prefetch_row(const Job& job, const RowState& state, int64_t column) {
  const int64_t bytes = job.x.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t j = 0; j < kPairColumns * bytes; j += 64) {
    __builtin_prefetch(static_cast<uint8_t*>(job.y) + (state.row * job.columns + column) * bytes + j, /*write=*/1);
    if (job.residual == nullptr) continue;
    __builtin_prefetch(static_cast<const uint8_t*>(job.residual) + (state.row * job.x.row_stride + column) * bytes + j);
  }
}

// The products of one or two tiles of limbs (two or four parts of a step) with two groups of a panel. Of `rows`, the
// states of those to be finished next, a few are prefetched in each step.
template <int kCalls, int kParts>
void multiply_steps(const Job& job, const uint8_t* limbs, const uint8_t* entries, int64_t steps, Spread& spread,
                    PanelInSteps& next, const RowState* states, int rows, int64_t column) {
  const int64_t group_bytes = steps * kTileBytes, rows_per_step = divide_up(rows, steps);
  const RowState* const end = states + rows;
  for (int64_t step = 0; step < steps; ++step, limbs += 2 * kTileBytes, entries += kTileBytes) {
    for (int64_t i = 0; i < rows_per_step && states < end; ++i) prefetch_row(job, *states++, column);
    spread.due += spread.drawing;
    if (spread.due < spread.products) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) multiply_part(part, limbs, entries, group_bytes);
      continue;
    }
    spread.due -= spread.products;
    next.step<kCalls>([=](int pause) __attribute__((always_inline)) {
      const int part = pause == 5 ? 3 : pause % 2 == 0 ? pause / 2 : kParts;  // after rounds 3, 5, 7 and 8
      if (part < kParts) multiply_part(part, limbs, entries, group_bytes);
    });
    for (; spread.due >= spread.products; spread.due -= spread.products) next.step<kCalls>();
  }
}

// Multiplies the rows of a task by a panel, and draws most of the next one meanwhile.
template <int kCalls>
void multiply_panel(const Job& job, const Task& task, int64_t k, const uint8_t* panel, uint8_t* sums,
                    PanelInSteps& next) {
  const bool first = k == 0, last = k + job.panel_k >= job.k_padded;
  const int64_t steps = lesser(job.panel_k, job.k_padded - k) / 64;
  const int64_t pairs = divide_up(task.columns, kPairColumns);
  Spread spread{next.left<kCalls>(), (task.last_tile - task.first_tile) * pairs * steps};
  for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int rows = rows_of(job, tile);
    const RowState* states = states_at(job, tile);
    const uint8_t* limbs = tile_at(job, tile) + k / 64 * 2 * kTileBytes;
    const bool two_tiles = job.x.activation_bits == 16 || rows > kTileRows;
    const auto multiply = two_tiles ? multiply_steps<kCalls, 4> : multiply_steps<kCalls, 2>;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t column = task.column + pair * kPairColumns;
      uint8_t* to = sums + (whole_k(job) ? 0 : ((tile - task.first_tile) * pairs + pair) * kSumsBytes);
      first ? zero_sums() : load_sums(to);
      multiply(job, limbs, panel + pair * 2 * steps * kTileBytes, steps, spread, next, states, last ? rows : 0, column);
      store_sums(to);
      if (!last) continue;
      finish_tile(results_at(job, column, lesser(kPairColumns, task.column + task.columns - column)), states, rows,
                  kTileRows, reinterpret_cast<const int32_t*>(to), kPairColumns);
    }
  }
}

int64_t panel_bytes(const Job& job) { return job.panel_columns * job.panel_k; }

int64_t tiles_memory_bytes(const Job& job) {
  const int64_t kept = whole_k(job) ? 1 : tiles_of_a_part(job) * job.panel_columns / kPairColumns;
  return round_up(drawer_memory_bytes(job), kAlignment) + 2 * panel_bytes(job) + kept * kSumsBytes;
}

// The next task is taken before the last panel of a task, so that its first panel is drawn meanwhile.
template <int kCalls>
void run_tiles(const Job& job, Tasks& tasks, uint8_t* memory) {
  int64_t index = take(tasks);
  if (index < 0) return;
  const Drawer drawer(job, memory);
  uint8_t* panel = memory + round_up(drawer_memory_bytes(job), kAlignment);
  uint8_t* next_panel = panel + panel_bytes(job);
  uint8_t* sums = next_panel + panel_bytes(job);
  const ConfiguredTiles tiles(static_cast<int>(lesser(kTileRows, job.rows)));
  PanelInSteps next(drawer);
  const auto start = [&](int64_t of_task, int64_t k, uint8_t* to) {
    const Task task = task_at(job, of_task);
    next.start(panel_at(job, k, task.column, divide_up(task.columns, kPairColumns)), to);
  };

  start(index, 0, panel);
  next.finish<kCalls>();
  while (index >= 0) {
    const Task task = task_at(job, index);
    for (int64_t k = 0; k < job.k_padded; k += job.panel_k) {
      const bool last = k + job.panel_k >= job.k_padded;
      if (last) index = take(tasks);
      if (index >= 0) start(index, last ? 0 : k + job.panel_k, next_panel);
      multiply_panel<kCalls>(job, task, k, panel, sums, next);
      next.finish<kCalls>();
      uint8_t* const multiplied = panel;
      panel = next_panel;
      next_panel = multiplied;
    }
  }
}

// For entries, in the layout of the other AVX-512 kernels.
PanelShape in_groups(const PanelShape& shape) { return {shape.call, shape.calls, shape.column, 2 * shape.groups}; }
void draw_pairs(const EntryKey& key, const PanelShape& shape, void* panel) { draw(key, in_groups(shape), panel); }
int half_entry_of_pairs(const void* panel, const PanelShape& shape, int k, int column) {
  return half_entry_at(panel, in_groups(shape), k, column);
}

constexpr int64_t kPanelBudget = 128 << 10;

// Panels are narrow and hold much of k where few tiles of limbs have to stay close, and wide where many have.
constexpr Form tiles_form(const char* name, int max_limb_rows, int max_groups, int min_whole_groups, int64_t task_rows,
                          void (*run)(const Job&, Tasks&, uint8_t*)) {
  return {name,
          max_limb_rows,
          kTileRows,
          2 * kTileRows,
          /*whole_tiles=*/true,
          max_groups,
          min_whole_groups,
          kPanelBudget,
          task_rows,
          task_rows,
          tiles_memory_bytes,
          run};
}
constexpr Form kForms[] = {
    as_drawn_form(/*max_groups=*/2),
    tiles_form("tiles, two calls", /*max_limb_rows=*/64, /*max_groups=*/1, 0, 0, run_tiles<2>),
    tiles_form("tiles, narrow panels", /*max_limb_rows=*/128, /*max_groups=*/1, 0, 0, run_tiles<1>),
    tiles_form("tiles, wide panels", /*max_limb_rows=*/0, /*max_groups=*/8, /*min_whole_groups=*/4, /*task_rows=*/256,
               run_tiles<1>),
};

}  // namespace

const Kernels& amx_kernels() {
  static constexpr Kernels kernels = {"amx",
                                      has_amx,
                                      kPairColumns,
                                      /*k_unit=*/64,
                                      /*entry_bytes=*/1,
                                      /*byte_limbs=*/true,
                                      /*takes_scratch=*/false,
                                      quantise,
                                      draw_pairs,
                                      unpack<half_entry_of_pairs>,
                                      kForms,
                                      sizeof kForms / sizeof kForms[0]};
  return kernels;
}

}  // namespace poc::cpu
