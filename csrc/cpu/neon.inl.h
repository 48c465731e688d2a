// The NEON kernels for arm64, except `struct Operand`, which the including file defines:
//
// - `kEntryRun`, 4 or 8: a panel is [group][k / kEntryRun][16 columns][kEntryRun] signed bytes, v.
// - `kLimbRun`, 16 or 8: a tile of limbs is [k / kLimbRun][limb row][kLimbRun] signed bytes.
// - `kLimbRowUnit`, 1 or 2: a tile has room for a whole multiple of this many limb rows.
// - `store(entries, to)` stores the vectors of 4 columns that a call draws; `to` is the place of the first.
// - `multiply<kLimbRows>(limbs, entries, calls, sums, sums_stride, accumulate)` multiplies a group of a panel: sums of
//   16 columns, int32, for each limb row.
//
// The k of each four are in the order 0, 2, 1, 3 in panels and limbs alike; as k is summed away, any would do. With 16
// activation_bits the limb rows 2 * r and 2 * r + 1 are the high and low limb of row r. T = 2 * S + sum(q), and a sum
// stays below 2^31: 128 * 124 * 65536 = 1,040,187,392.
#include <arm_neon.h>

#include <cstdint>

#include "panels.h"
#include "philox_lanes.h"
#include "rows.h"

namespace poc::cpu {
namespace {

constexpr int kColumns = 16;
constexpr int kVectors = 4;  // of 4 columns each, in a group
constexpr int kMaxGroups = 4;
constexpr int kMaxLimbRows = 6;  // 6 * 4 accumulators, their limbs and an entry fit in 32 registers
constexpr int kCallBytes = kColumns * static_cast<int>(kEntriesPerCall);
constexpr int kOrder[4] = {0, 2, 1, 3};  // position p of four bytes has k kOrder[p], and k has position kOrder[k]

struct Lanes {
  using Vector = uint32x4_t;
  struct Product {
    uint64x2_t first, second;
  };
  static inline Vector set1(uint64_t value) { return vdupq_n_u32(static_cast<uint32_t>(value)); }
  static inline Product multiply(Vector a, Vector b) {
    return {vmull_u32(vget_low_u32(a), vget_low_u32(b)), vmull_high_u32(a, b)};
  }
  static inline Vector low_half(const Product& p) {
    return vuzp1q_u32(vreinterpretq_u32_u64(p.first), vreinterpretq_u32_u64(p.second));
  }
  static inline Vector high_half(const Product& p) {
    return vuzp2q_u32(vreinterpretq_u32_u64(p.first), vreinterpretq_u32_u64(p.second));
  }
  static inline Vector exclusive_or(Vector a, Vector b) { return veorq_u32(a, b); }
  static inline Vector exclusive_or(Vector a, Vector b, Vector c) { return veorq_u32(veorq_u32(a, b), c); }
};

// What a and what b add to v, by an index of 3 bits below the sign: v is a + b, or ~(a + b) = ~a + -b.
struct SignedTables {
  int8_t a[16], b[16];
};

constexpr SignedTables make_tables() {
  SignedTables tables{};
  for (uint32_t i = 0; i < 8; ++i) {
    const int a = table_entry(kTableA, i), b = table_entry(kTableB, i);
    tables.a[i] = static_cast<int8_t>(a);
    tables.a[8 + i] = static_cast<int8_t>(~a);
    tables.b[i] = static_cast<int8_t>(b);
    tables.b[8 + i] = static_cast<int8_t>(-b);
  }
  return tables;
}
constexpr SignedTables kTables = make_tables();

// v of the four entries of each word.
inline int8x16_t half_entries(uint32x4_t words) {
  const uint8x16_t bytes = vreinterpretq_u8_u32(words);
  const uint16x8_t even = vreinterpretq_u16_u8(vandq_u8(bytes, vdupq_n_u8(0x0F)));
  const uint16x8_t odd = vreinterpretq_u16_u8(vshrq_n_u8(bytes, 4));
  // The lower half of a word has index a and sign of its entries in its nibbles, the upper half index b.
  const uint8x16_t a = vreinterpretq_u8_u16(vtrn1q_u16(even, odd)), b = vreinterpretq_u8_u16(vtrn2q_u16(even, odd));
  const uint8x16_t signed_b = vbslq_u8(vdupq_n_u8(8), a, b);
  return vaddq_s8(vqtbl1q_s8(vld1q_s8(kTables.a), a), vqtbl1q_s8(vld1q_s8(kTables.b), signed_b));
}

void draw(const EntryKey& key, const PanelShape& shape, void* panel) {
  constexpr int kCalls = 64;  // whose scalars are made at once
  constexpr uint32_t kFirst[4] = {0, 1, 2, 3};
  const RoundKeys keys(key);
  for (int begin = 0; begin < shape.calls; begin += kCalls) {
    const int count = shape.calls - begin < kCalls ? shape.calls - begin : kCalls;
    CallScalars scalars[kCalls];
    fill_scalars(keys, shape.call + static_cast<uint32_t>(begin), count, scalars);
    for (int g = 0; g < shape.groups; ++g) {
      int8_t* out = static_cast<int8_t*>(panel) + (static_cast<int64_t>(g) * shape.calls + begin) * kCallBytes;
      const uint32x4_t n =
          vaddq_u32(Lanes::set1(shape.column + static_cast<uint32_t>(g * kColumns)), vld1q_u32(kFirst));
      const Columns<Lanes> columns[kVectors] = {{keys, n},
                                                {keys, vaddq_u32(n, Lanes::set1(4))},
                                                {keys, vaddq_u32(n, Lanes::set1(8))},
                                                {keys, vaddq_u32(n, Lanes::set1(12))}};
      for (int i = 0; i < count; ++i, out += kCallBytes) {
        Counters<Lanes> counters[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) counters[v].round2(columns[v], scalars[i]);
#pragma GCC unroll 8
        for (int r = 3; r < kPhiloxRounds; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) counters[v].round(keys.a[r], keys.b[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int8x16_t entries[4] = {half_entries(counters[v].c0), half_entries(counters[v].c1),
                                        half_entries(counters[v].c2), half_entries(counters[v].c3)};
          Operand::store(entries, out + v * 4 * Operand::kEntryRun);
        }
      }
    }
  }
}

int half_entry_at(const void* panel, const PanelShape& shape, int k, int column) {
  constexpr int kRun = Operand::kEntryRun;
  const int64_t group = static_cast<int64_t>(column / kColumns) * shape.calls * kCallBytes;
  const int64_t in_group = (k / kRun * kColumns + column % kColumns) * kRun + k % kRun / 4 * 4 + kOrder[k % 4];
  return static_cast<const int8_t*>(panel)[group + in_group];
}

int64_t limb_rows_of(const Activations& x, int rows) {
  return (rows * byte_limbs(x.activation_bits) + Operand::kLimbRowUnit - 1) / Operand::kLimbRowUnit *
         Operand::kLimbRowUnit;
}

// Writes 16 consecutive k of a limb row; `step` is what lies between its runs.
inline void store_limbs(int8x16_t limbs, int8_t* to, int64_t step) {
  constexpr uint8_t kPositions[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  const int8x16_t ordered = vqtbl1q_s8(limbs, vld1q_u8(kPositions));
  if constexpr (Operand::kLimbRun == 16) {
    vst1q_s8(to, ordered);
  } else {
    vst1_s8(to, vget_low_s8(ordered));
    vst1_s8(to + step, vget_high_s8(ordered));
  }
}

void quantise(const Activations& x, int64_t k_padded, RowState* states, int rows, int /*room*/, int16_t* scratch,
              void* tile) {
  quantise_rows(x, k_padded, states, rows, scratch);
  const int64_t limbs = byte_limbs(x.activation_bits), step = limb_rows_of(x, rows) * Operand::kLimbRun;
  for (int r = 0; r < rows; ++r) {
    const int16_t* q = scratch + r * k_padded;
    int8_t* high = static_cast<int8_t*>(tile) + r * limbs * Operand::kLimbRun;
    int8_t* low = high + (limbs - 1) * Operand::kLimbRun;
    for (int64_t k = 0; k < k_padded; k += 16) {
      const int64_t at = k / Operand::kLimbRun * step;
      const int16x8_t first = vld1q_s16(q + k), second = vld1q_s16(q + k + 8);
      // q = 256 * ((q + 128) >> 8) + its lowest byte, as a signed one
      if (limbs == 2) store_limbs(vrshrn_high_n_s16(vrshrn_n_s16(first, 8), second, 8), high + at, step);
      store_limbs(vmovn_high_s16(vmovn_s16(first), second), low + at, step);
    }
  }
}

using Multiply = void (*)(const int8_t*, const int8_t*, int64_t, int32_t*, int64_t, bool);
constexpr Multiply kMultiply[kMaxLimbRows] = {Operand::multiply<1>, Operand::multiply<2>, Operand::multiply<3>,
                                              Operand::multiply<4>, Operand::multiply<5>, Operand::multiply<6>};

struct Panels {
  static constexpr int kGroupColumns = kColumns;
  static constexpr int kEntryBytes = 1;
  using Sum = int32_t;

  struct Drawer {
    const EntryKey key;
    Drawer(const Job& job, void* /*memory*/) : key(job.key) {}
    void draw(const PanelShape& shape, void* panel) const { cpu::draw(key, shape, panel); }
  };
  static int64_t drawer_bytes(const Job&) { return 0; }
  static int64_t sums_per_entry(const Job& job) { return byte_limbs(job.x.activation_bits); }

  static void multiply(const Job& job, int64_t tile, const PanelShape& shape, const void* panel, int32_t* sums,
                       bool accumulate) {
    const int64_t limb_rows = rows_of(job, tile) * byte_limbs(job.x.activation_bits);
    const auto* limbs = reinterpret_cast<const int8_t*>(tile_at(job, tile)) +
                        shape.call * kEntriesPerCall * limb_rows_of(job.x, rows_of(job, tile));
    for (int g = 0; g < shape.groups; ++g)
      kMultiply[limb_rows - 1](limbs,
                               static_cast<const int8_t*>(panel) + static_cast<int64_t>(g) * shape.calls * kCallBytes,
                               shape.calls, sums + g * kColumns, job.panel_columns, accumulate);
  }
  static void finish(const Job& job, const Results& to, int64_t tile, const int32_t* sums) {
    const int64_t limbs = byte_limbs(job.x.activation_bits);
    double exact[kMaxGroups * kColumns];
    for (int r = 0; r < rows_of(job, tile); ++r) {
      const int32_t* high = sums + r * limbs * job.panel_columns;
      const int32_t* low = high + (limbs - 1) * job.panel_columns;
      for (int j = 0; j < to.columns; ++j) exact[j] = limbs == 2 ? 256.0 * high[j] + low[j] : low[j];
      finish_rows(to, states_at(job, tile) + r, 1, exact, 0);
    }
  }
};

constexpr Form kForms[] = {{"panels", /*max_limb_rows=*/0, kMaxLimbRows / 2, kMaxLimbRows, /*whole_tiles=*/false,
                            kMaxGroups, /*min_whole_groups=*/0, /*panel_budget=*/256 << 10, /*task_rows_16=*/384,
                            /*task_rows_8=*/768, panels_memory_bytes<Panels>, run_panels<Panels>}};

constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
  return {name,
          supported,
          kColumns,
          /*k_unit=*/16,
          Panels::kEntryBytes,
          /*byte_limbs=*/true,
          /*takes_scratch=*/true,
          quantise,
          draw,
          unpack<half_entry_at>,
          kForms,
          sizeof kForms / sizeof kForms[0]};
}

}  // namespace
}  // namespace poc::cpu
