// AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
#include "avx512_vbmi_operand.h"
#include "avx512.inl.h"

namespace poc::cpu {

const Kernels& avx512_vbmi_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512_vbmi", has_avx512_vbmi);
  return kernels;
}

}  // namespace poc::cpu
