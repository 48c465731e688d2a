// AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include <cstdint>

#include "../definition.h"

namespace poc::cpu {
namespace {

// v + 128 by a 7-bit index: a, sign, b from the lowest bit up.
struct ByteTable {
  alignas(64) uint8_t bytes[128];
};

constexpr ByteTable make_table() {
  ByteTable table{};
  for (int index = 0; index < 128; ++index) {
    const int u = table_entry(kTableA, index & 7) + table_entry(kTableB, index >> 4);
    table.bytes[index] = static_cast<uint8_t>((index & 8) != 0 ? 127 - u : 128 + u);
  }
  return table;
}
constexpr ByteTable kTable = make_table();

struct Operand {
  static inline __m512i bytes(__m512i words) {
    // Byte i of a word: its bits from 4 * i on (a, sign), and from 12 + 4 * i on (b in bits 4 to 6).
    const __m512i low = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2C2824200C080400), words);
    const __m512i high = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x3834302C1814100C), words);
    const __m512i index = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x0F), low, high, 0xCA);
    return _mm512_permutex2var_epi8(_mm512_load_si512(kTable.bytes), index, _mm512_load_si512(kTable.bytes + 64));
  }
};

}  // namespace
}  // namespace poc::cpu

#include "avx512.inl.h"

namespace poc::cpu {

const Kernels& avx512_vbmi_kernels() {
  static constexpr Kernels kernels =
      make_kernels("avx512_vbmi", [] { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); });
  return kernels;
}

}  // namespace poc::cpu
