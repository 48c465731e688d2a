// Philox4x32-10 with columns in lanes: what of the first three rounds is computed once per call or once per column.
//
// The counter is (call, n, domain, 0), so rounds 0 and 1 are scalar except one product, and round 2 has one scalar
// product of its two. With (a_r, b_r) the key of round r:
//   column:  c0 = hi(M1 * domain) ^ n ^ a_0, and then h, l = hi, lo of M0 * c0
//   call:    s0 .. s3 below
//   round 2: c2 = h ^ s0, then c0 = hi(M1 * c2) ^ s1, c1 = lo(M1 * c2), c2 = l ^ s2, c3 = s3
// and rounds 3 to 9 are the ordinary ones.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poc::cpu {
namespace {

struct RoundKeys {
  uint64_t a[kPhiloxRounds], b[kPhiloxRounds];  // in 64-bit lanes
  uint32_t column_mask;                         // c0 of a column is n ^ column_mask
  uint32_t c1;                                  // of every column and call after round 0

  explicit RoundKeys(const EntryKey& key) {
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r) {
      a[r] = key0;
      b[r] = key1;
      key0 += kPhiloxW0;
      key1 += kPhiloxW1;
    }
    const uint64_t product = static_cast<uint64_t>(kPhiloxM1) * key.domain;
    column_mask = static_cast<uint32_t>(product >> 32) ^ static_cast<uint32_t>(a[0]);
    c1 = static_cast<uint32_t>(product);
  }
};

// s0 .. s3 of a call, in 64-bit lanes.
struct CallScalars {
  uint64_t s0, s1, s2, s3;
};

inline void fill_scalars(const RoundKeys& keys, uint32_t first_call, int64_t count, CallScalars* scalars) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t first = static_cast<uint64_t>(kPhiloxM0) * (first_call + static_cast<uint32_t>(i));
    const uint32_t c2 = static_cast<uint32_t>(first >> 32) ^ static_cast<uint32_t>(keys.b[0]);
    const uint64_t second = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t c0 = static_cast<uint32_t>(second >> 32) ^ keys.c1 ^ static_cast<uint32_t>(keys.a[1]);
    const uint64_t third = static_cast<uint64_t>(kPhiloxM0) * c0;
    scalars[i].s0 = static_cast<uint32_t>(first) ^ keys.b[1];
    scalars[i].s1 = static_cast<uint32_t>(second) ^ keys.a[2];
    scalars[i].s2 = (third >> 32) ^ keys.b[2];
    scalars[i].s3 = static_cast<uint32_t>(third);
  }
}

// Some columns after rounds 0 and 1. Lanes are the vectors of an instruction set, of 32-bit lanes, or of 64-bit lanes
// whose upper halves are not used in columns and counters.
template <class Lanes>
struct Columns {
  typename Lanes::Vector h, l;

  Columns(const RoundKeys& keys, typename Lanes::Vector n) {
    const auto p0 = Lanes::multiply(Lanes::set1(kPhiloxM0), Lanes::exclusive_or(n, Lanes::set1(keys.column_mask)));
    l = Lanes::low_half(p0);
    h = Lanes::high_half(p0);
  }
};

// Their counters on the way through the other rounds.
template <class Lanes>
struct Counters {
  typename Lanes::Vector c0, c1, c2, c3;

  inline void round2(const Columns<Lanes>& columns, const CallScalars& s) {
    const auto p1 = Lanes::multiply(Lanes::set1(kPhiloxM1), Lanes::exclusive_or(columns.h, Lanes::set1(s.s0)));
    c0 = Lanes::exclusive_or(Lanes::high_half(p1), Lanes::set1(s.s1));
    c1 = Lanes::low_half(p1);
    c2 = Lanes::exclusive_or(columns.l, Lanes::set1(s.s2));
    c3 = Lanes::set1(s.s3);
  }
  inline void round(uint64_t a, uint64_t b) {
    const auto p0 = Lanes::multiply(Lanes::set1(kPhiloxM0), c0);
    const auto p1 = Lanes::multiply(Lanes::set1(kPhiloxM1), c2);
    c0 = Lanes::exclusive_or(Lanes::high_half(p1), c1, Lanes::set1(a));
    c2 = Lanes::exclusive_or(Lanes::high_half(p0), c3, Lanes::set1(b));
    c1 = Lanes::low_half(p1);
    c3 = Lanes::low_half(p0);
  }
};

}  // namespace
}  // namespace poc::cpu
