// Whether the tiles of AMX may be used: what the CPU has, what the operating system saves, what it permits.
#pragma once

#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace poc::cpu {
namespace {

struct TileSupport {
  uint32_t features;         // EDX of CPUID leaf 7
  bool saves_state;          // the operating system uses XSAVE
  uint64_t saved_state;      // XCR0; 0 unless saves_state
  bool (*ask_permission)();  // asked only where the others have what it takes
};

inline bool tiles_usable(const TileSupport& support) {
  constexpr uint32_t kTilesAndInt8 = 3u << 24;
  constexpr uint64_t kTileState = 3u << 17;
  return (support.features & kTilesAndInt8) == kTilesAndInt8 && support.saves_state &&
         (support.saved_state & kTileState) == kTileState && support.ask_permission();
}

// Linux (5.16 and later) permits a process to use tiles when it asks, once or often; its threads inherit that. It
// refuses where a thread's alternate signal stack is too small, and a sandbox may refuse as well.
inline bool ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline TileSupport tile_support() {
  TileSupport support{0, false, 0, ask_for_tiles};
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) != 0) support.saves_state = (c & (1u << 27)) != 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) support.features = d;
  if (support.saves_state) {
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    support.saved_state = static_cast<uint64_t>(d) << 32 | a;
  }
  return support;
}

}  // namespace
}  // namespace poc::cpu
