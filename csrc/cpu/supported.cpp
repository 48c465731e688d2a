// Which instructions this CPU has. Compiled without any of them: what asks must run on every CPU.
#include "kernels.h"

#if defined(POC_KERNELS_AMX)
#include "amx_support.h"
#endif
#if defined(POC_KERNELS_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace poc::cpu {

#if defined(POC_KERNELS_X86)

bool has_avx2() { return __builtin_cpu_supports("avx2"); }

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_vbmi() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }

#if defined(POC_KERNELS_AMX)
bool has_amx() {
#if defined(POC_KERNELS_AMX_MODEL)
  static const bool usable = true;
#else
  static const bool usable = tiles_usable(tile_support());
#endif
  return usable && has_avx512_vbmi();
}
#endif
#endif

#if defined(POC_KERNELS_ARM64)
#if defined(__linux__)
// Bits of the kernel's words on the CPU, asimddp and i8mm of /proc/cpuinfo. With the latter comes the former.
bool has_neon_dotprod() { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }
bool has_neon_i8mm() { return has_neon_dotprod() && (getauxval(AT_HWCAP2) & 1ul << 13) != 0; }
#else
bool has_neon_dotprod() { return false; }
bool has_neon_i8mm() { return false; }
#endif
#endif

}  // namespace poc::cpu
