// The projection, definition 1 (docs/definition.md): words -> entries, activations -> integers, sums -> result.
// Host and device twins: every native kernel computes with these functions or with vector forms of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace poc {

constexpr int kDefinition = 1;
constexpr int64_t kEntriesPerCall = 16;  // consecutive k of one column that one Philox call makes
constexpr int32_t kMinExponent = -100;   // E of a row of zeros, and the smallest E
constexpr int32_t kMaxByteActivation = 127;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// ---- entries of P ---------------------------------------------------------------------------------------------------

// Eight bytes as one 64-bit constant: entry i is (table >> 8 * i) & 255, without memory, on host and device.
constexpr uint64_t pack_table(int t0, int t1, int t2, int t3, int t4, int t5, int t6, int t7) {
  return static_cast<uint64_t>(t0) | static_cast<uint64_t>(t1) << 8 | static_cast<uint64_t>(t2) << 16 |
         static_cast<uint64_t>(t3) << 24 | static_cast<uint64_t>(t4) << 32 | static_cast<uint64_t>(t5) << 40 |
         static_cast<uint64_t>(t6) << 48 | static_cast<uint64_t>(t7) << 56;
}
constexpr uint64_t kTableA = pack_table(0, 2, 4, 11, 23, 28, 39, 51);
constexpr uint64_t kTableB = pack_table(0, 1, 5, 8, 11, 15, 21, 72);

POC_HOST_DEVICE constexpr int table_entry(uint64_t table, uint32_t index) {
  return static_cast<int>((table >> (8 * index)) & 255);
}

POC_HOST_DEVICE static inline Words entry_words(uint64_t seed, uint32_t domain, uint32_t k, uint32_t n) {
  return philox4x32_10({{k / 16, n, domain, 0}}, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// v of position i = k & 3 in its word: a signed byte, and e = 2 * v + 1.
POC_HOST_DEVICE static inline int half_entry(uint32_t word, int i) {
  const int u = table_entry(kTableA, (word >> (4 * i)) & 7) + table_entry(kTableB, (word >> (16 + 4 * i)) & 7);
  return (word >> (4 * i + 3)) & 1 ? ~u : u;
}

// ---- floats and their bits ------------------------------------------------------------------------------------------

POC_HOST_DEVICE static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

POC_HOST_DEVICE static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^exponent for a normal result: -126 <= exponent <= 127.
POC_HOST_DEVICE static inline float power_of_two(int32_t exponent) {
  return bits_to_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// One type of activations: exact widening, rounding to nearest even with subnormals kept, and the quiet NaN.
namespace {

struct Float32 {
  using Storage = uint32_t;
  static constexpr Storage kNaN = 0x7FC00000u;
  POC_HOST_DEVICE static inline float widen(Storage s) { return bits_to_float(s); }
  POC_HOST_DEVICE static inline Storage round(float value) { return float_to_bits(value); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr Storage kNaN = 0x7FC0u;
  POC_HOST_DEVICE static inline float widen(Storage s) { return bits_to_float(static_cast<uint32_t>(s) << 16); }
  // Not for NaN: no result is NaN, except in rows that are kNaN throughout.
  POC_HOST_DEVICE static inline Storage round(float value) {
    const uint32_t bits = float_to_bits(value);
    return static_cast<Storage>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr Storage kNaN = 0x7E00u;
  POC_HOST_DEVICE static inline float widen(Storage s) {
    const uint32_t magnitude = static_cast<uint32_t>(s & 0x7FFFu) << 13;
    const uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);  // exact, subnormals too
    const uint32_t bits = (s & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : scaled;
    return bits_to_float(bits | static_cast<uint32_t>(s & 0x8000u) << 16);
  }
  // Not for NaN, as above.
  POC_HOST_DEVICE static inline Storage round(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // Adding 1/2 leaves multiples of 2^-24, the unit of half's subnormals, in the low bits.
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t half = magnitude >= 0x47800000u ? 0x7C00u : finite;
    return static_cast<Storage>(half | ((bits >> 16) & 0x8000u));
  }
};

}  // namespace

// ---- activations ----------------------------------------------------------------------------------------------------

// E of a row, from the largest of its |x| as float32 bits (bits of finite magnitudes order as the magnitudes do).
POC_HOST_DEVICE static inline int32_t row_exponent(uint32_t largest_magnitude_bits) {
  const int32_t exponent = static_cast<int32_t>(largest_magnitude_bits >> 23) - 127;
  return exponent < kMinExponent ? kMinExponent : exponent;
}

// Fraction bits of q below E: q = rint(x * 2^(shift - E)).
POC_HOST_DEVICE static inline int32_t activation_shift(int activation_bits) { return activation_bits == 16 ? 13 : 6; }

// q before the clamp of 8 bits; scale = 2^(shift - E). Adding 3 * 2^22 rounds to an integer, halves to even.
POC_HOST_DEVICE static inline int32_t round_activation(float x, float scale) {
  constexpr float kRounder = 12582912.0f;
  const float scaled = x * scale;
  return static_cast<int32_t>(float_to_bits(scaled + kRounder) - 0x4B400000u);
}

POC_HOST_DEVICE static inline int32_t clamp_byte(int32_t q) {
  return q > kMaxByteActivation ? kMaxByteActivation : (q < -kMaxByteActivation ? -kMaxByteActivation : q);
}

// ---- result ---------------------------------------------------------------------------------------------------------

// g of the exact sum T (an integer below 2^40, so exact as a double); scale = 2^(E - shift).
POC_HOST_DEVICE static inline float projected(double sum, float coefficient, float scale) {
  const float rounded = static_cast<float>(sum);
  const float product = rounded * coefficient;
  return product * scale;
}

}  // namespace poc
