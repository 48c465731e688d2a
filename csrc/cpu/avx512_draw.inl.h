// Drawing P with AVX-512, except what the including file defines as members of `struct Operand`:
//
// - `kOrder`, four constants: position p of a word's bytes has entry kOrder[p].
// - `entries(words)` gives v + 128 of the four entries of each word, as unsigned bytes in that order.
// - `limbs(q, high, low)` gives the limbs of 64 q, int32 in four vectors, as signed bytes in the same order of k.
// - `bytes(q)` does likewise with q of 8 bits.
//
// A vector of entries is [16 columns][4 k] unsigned bytes, as vpdpbusd and a tile of AMX take them.
#include <immintrin.h>

#include <cstdint>

#include "philox_lanes.h"

namespace poc::cpu {
namespace {

constexpr int kColumns = 16;
constexpr int kVectorsPerCall = 4;  // of entries

struct Lanes {
  using Vector = __m512i;
  static inline Vector set1(uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); }
  static inline Vector multiply(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
  static inline Vector low_half(Vector a) { return a; }  // the upper halves are not used
  static inline Vector high_half(Vector a) { return _mm512_srli_epi64(a, 32); }
  static inline Vector exclusive_or(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
  static inline Vector exclusive_or(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
};

// Even columns live in one vector of 64-bit lanes, odd columns in another: join their low or high halves.
inline __m512i join_low(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
}
inline __m512i join_high(__m512i even, __m512i odd) {
  return _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xF5));
}

// 16 columns after rounds 0 and 1.
struct Group {
  Columns<Lanes> even, odd;

  Group(const RoundKeys& keys, uint32_t column) : even(keys, lanes(column)), odd(keys, lanes(column + 1)) {}
  static inline __m512i lanes(uint32_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
  }
};

constexpr int kDrawingPauses = 6;

struct NoWork {
  inline void operator()(int) const {}
};

// Draws the words of kCalls consecutive calls of a group, side by side so that the latency of one hides behind the work
// of the other: sink(i, words) gets those of k from 4 * i on. Between rounds it calls work(i) for i < kDrawingPauses,
// for what else the core has to do meanwhile. Always inlined, so that what these keep stays in registers.
template <int kCalls, class Sink, class Work = NoWork>
[[gnu::always_inline]] inline void draw_words(const RoundKeys& keys, const CallScalars* scalars, const Group& group,
                                              const Sink& sink, const Work& work = Work()) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i a9 = _mm512_set1_epi32(static_cast<int>(keys.a[kPhiloxRounds - 1]));
  const __m512i b9 = _mm512_set1_epi32(static_cast<int>(keys.b[kPhiloxRounds - 1]));
  Counters<Lanes> even[kCalls], odd[kCalls];
#pragma GCC unroll 2
  for (int c = 0; c < kCalls; ++c) {
    even[c].round2(group.even, scalars[c]);
    odd[c].round2(group.odd, scalars[c]);
  }
#pragma GCC unroll 8
  for (int r = 3; r < kPhiloxRounds - 1; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kCalls; ++c) {
      even[c].round(keys.a[r], keys.b[r]);
      odd[c].round(keys.a[r], keys.b[r]);
    }
    work(r - 3);
  }
#pragma GCC unroll 2
  for (int c = 0; c < kCalls; ++c) {
    // The last round joins the halves as it goes: two shuffles per word in place of shift, xor and join.
    const __m512i p0e = _mm512_mul_epu32(m0, even[c].c0), p0o = _mm512_mul_epu32(m0, odd[c].c0);
    const __m512i p1e = _mm512_mul_epu32(m1, even[c].c2), p1o = _mm512_mul_epu32(m1, odd[c].c2);
    sink(4 * c + 0, Lanes::exclusive_or(join_high(p1e, p1o), join_low(even[c].c1, odd[c].c1), a9));
    sink(4 * c + 1, join_low(p1e, p1o));
    sink(4 * c + 2, Lanes::exclusive_or(join_high(p0e, p0o), join_low(even[c].c3, odd[c].c3), b9));
    sink(4 * c + 3, join_low(p0e, p0o));
  }
}

// A panel of [k / 4][group][16 columns][4 k]; scalars are those of its first call on.
void draw_panel(const RoundKeys& keys, const CallScalars* scalars, const PanelShape& shape, uint8_t* panel) {
  const int64_t stride = static_cast<int64_t>(shape.groups) * 64;  // bytes from one k / 4 to the next
  for (int g = 0; g < shape.groups; ++g) {
    const Group group(keys, shape.column + static_cast<uint32_t>(g * kColumns));
    uint8_t* out = panel + g * 64;
    const auto store = [&](int i, __m512i words) { _mm512_store_si512(out + i * stride, Operand::entries(words)); };
    int call = 0;
    for (; call + 2 <= shape.calls; call += 2, out += 8 * stride) draw_words<2>(keys, scalars + call, group, store);
    if (call < shape.calls) draw_words<1>(keys, scalars + call, group, store);
  }
}

// Draws without scalars made before: for entries, whose panels are small.
void draw(const EntryKey& key, const PanelShape& shape, void* panel) {
  constexpr int kCalls = 64;
  const RoundKeys keys(key);
  const int64_t call_bytes = static_cast<int64_t>(shape.groups) * 64 * kVectorsPerCall;
  for (int begin = 0; begin < shape.calls; begin += kCalls) {
    PanelShape part = shape;
    part.call += static_cast<uint32_t>(begin);
    part.calls = shape.calls - begin < kCalls ? shape.calls - begin : kCalls;
    CallScalars scalars[kCalls];
    fill_scalars(keys, part.call, part.calls, scalars);
    draw_panel(keys, scalars, part, static_cast<uint8_t*>(panel) + begin * call_bytes);
  }
}

int half_entry_at(const void* panel, const PanelShape& shape, int k, int column) {
  int position = 0;
  while (Operand::kOrder[position] != k % 4) ++position;
  const int64_t vector = static_cast<int64_t>(k / 4) * shape.groups + column / kColumns;
  return static_cast<const uint8_t*>(panel)[vector * 64 + column % kColumns * 4 + position] - 128;
}

}  // namespace
}  // namespace poc::cpu
