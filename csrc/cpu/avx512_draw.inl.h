// Drawing panels of P with AVX-512, except one step: the including file defines `struct Operand` with
//   static __m512i bytes(__m512i words)   v + 128 of the four entries of each word, in order, as unsigned bytes.
//
// A panel is [k / 4][group][16 columns][4 k] unsigned bytes, as vpdpbusd (and a tile of AMX) takes them.
#include <immintrin.h>

#include <cstdint>

#include "philox_lanes.h"

namespace poc::cpu {
namespace {

constexpr int kColumns = 16;
constexpr int kMaxGroups = 4;

struct Lanes {
  using Vector = __m512i;
  static inline Vector set1(uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); }
  static inline Vector multiply(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
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

// kCalls consecutive calls for one group, side by side so that the latency of one hides behind the work of the other.
template <int kCalls>
inline void draw_calls(const RoundKeys& keys, const CallScalars& scalars, int i, const Columns<Lanes>& even_columns,
                       const Columns<Lanes>& odd_columns, uint8_t* out, int64_t stride) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i a9 = _mm512_set1_epi32(static_cast<int>(keys.a[kPhiloxRounds - 1]));
  const __m512i b9 = _mm512_set1_epi32(static_cast<int>(keys.b[kPhiloxRounds - 1]));
  Counters<Lanes> even[kCalls], odd[kCalls];
#pragma GCC unroll 2
  for (int c = 0; c < kCalls; ++c) {
    even[c].round2(even_columns, scalars, i + c);
    odd[c].round2(odd_columns, scalars, i + c);
  }
#pragma GCC unroll 8
  for (int r = 3; r < kPhiloxRounds - 1; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kCalls; ++c) {
      even[c].round(keys.a[r], keys.b[r]);
      odd[c].round(keys.a[r], keys.b[r]);
    }
#pragma GCC unroll 2
  for (int c = 0; c < kCalls; ++c) {
    // The last round joins the halves as it goes: two shuffles per word in place of shift, xor and join.
    const __m512i p0e = _mm512_mul_epu32(m0, even[c].c0), p0o = _mm512_mul_epu32(m0, odd[c].c0);
    const __m512i p1e = _mm512_mul_epu32(m1, even[c].c2), p1o = _mm512_mul_epu32(m1, odd[c].c2);
    const __m512i w0 = Lanes::exclusive_or(join_high(p1e, p1o), join_low(even[c].c1, odd[c].c1), a9);
    const __m512i w2 = Lanes::exclusive_or(join_high(p0e, p0o), join_low(even[c].c3, odd[c].c3), b9);
    _mm512_store_si512(out + (4 * c + 0) * stride, Operand::bytes(w0));
    _mm512_store_si512(out + (4 * c + 1) * stride, Operand::bytes(join_low(p1e, p1o)));
    _mm512_store_si512(out + (4 * c + 2) * stride, Operand::bytes(w2));
    _mm512_store_si512(out + (4 * c + 3) * stride, Operand::bytes(join_low(p0e, p0o)));
  }
}

void draw(const EntryKey& key, const PanelShape& shape, void* panel) {
  const RoundKeys keys(key);
  const __m512i even_lanes = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
  const int64_t stride = static_cast<int64_t>(shape.groups) * 64;  // bytes from one k / 4 to the next
  for (int begin = 0; begin < shape.calls; begin += CallScalars::kCalls) {
    const int count = shape.calls - begin < CallScalars::kCalls ? shape.calls - begin : CallScalars::kCalls;
    CallScalars scalars;
    scalars.fill(keys, shape.call + static_cast<uint32_t>(begin), count);
    for (int g = 0; g < shape.groups; ++g) {
      const __m512i n =
          _mm512_add_epi64(_mm512_set1_epi64(shape.column + static_cast<uint32_t>(g * kColumns)), even_lanes);
      const Columns<Lanes> even(keys, n), odd(keys, _mm512_add_epi64(n, _mm512_set1_epi64(1)));
      auto* out = static_cast<uint8_t*>(panel) + (static_cast<int64_t>(begin) * 4 * shape.groups + g) * 64;
      int i = 0;
      for (; i + 2 <= count; i += 2) draw_calls<2>(keys, scalars, i, even, odd, out + i * 4 * stride, stride);
      if (i < count) draw_calls<1>(keys, scalars, i, even, odd, out + i * 4 * stride, stride);
    }
  }
}

int half_entry_at(const void* panel, const PanelShape& shape, int k, int column) {
  const int64_t vector = static_cast<int64_t>(k / 4) * shape.groups + column / kColumns;
  return static_cast<const uint8_t*>(panel)[vector * 64 + column % kColumns * 4 + k % 4] - 128;
}

}  // namespace
}  // namespace poc::cpu
