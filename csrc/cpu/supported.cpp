// Which instructions this CPU has. Compiled without any of them: what asks must run on every CPU.
#include "kernels.h"

#if defined(POC_KERNELS_AMX)
#include "amx_support.h"
#endif

namespace poc::cpu {

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

}  // namespace poc::cpu
