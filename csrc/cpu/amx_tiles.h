// The tile instructions of AMX that the kernels use. With POC_KERNELS_AMX_MODEL they are plain code that does the same
// and ends the process where the CPU would raise a fault, so that all else can be tested where there is no AMX.
#pragma once

#include <cstdint>

#if defined(POC_KERNELS_AMX_MODEL)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#endif

namespace poc::cpu {
namespace {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#if defined(POC_KERNELS_AMX_MODEL)

struct TileModel {
  TileConfig config;
  bool configured = false;
  uint8_t tiles[kTiles][kTileRows][kTileRowBytes];

  void require(bool condition, const char* what) const {
    if (condition) return;
    std::fprintf(stderr, "tile instructions: %s\n", what);
    std::abort();
  }
};
static thread_local TileModel model;

inline void load_tile_config(const TileConfig& config) {
  model.require(!model.configured, "configured twice");
  for (int t = 0; t < kTiles; ++t)
    model.require(config.palette == 1 && config.rows[t] >= 1 && config.rows[t] <= kTileRows &&
                      config.row_bytes[t] == kTileRowBytes,
                  "a configuration that is not valid");
  model.config = config;
  model.configured = true;
  std::memset(model.tiles, 0, sizeof model.tiles);
}
inline void release_tiles() {
  model.require(model.configured, "released without a configuration");
  model.configured = false;
}
template <int kTile>
inline void zero_tile() {
  model.require(model.configured, "tilezero without a configuration");
  std::memset(model.tiles[kTile], 0, sizeof model.tiles[kTile]);
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  model.require(model.configured, "tileloadd without a configuration");
  std::memset(model.tiles[kTile], 0, sizeof model.tiles[kTile]);
  for (int r = 0; r < model.config.rows[kTile]; ++r)
    std::memcpy(model.tiles[kTile][r], static_cast<const uint8_t*>(from) + r * stride, kTileRowBytes);
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  model.require(model.configured, "tilestored without a configuration");
  for (int r = 0; r < model.config.rows[kTile]; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, model.tiles[kTile][r], kTileRowBytes);
}
template <int kSums, int kSigned, int kUnsigned>
inline void multiply_tiles() {
  model.require(model.configured, "tdpbsud without a configuration");
  model.require(model.config.rows[kSums] == model.config.rows[kSigned], "tdpbsud of tiles that do not match");
  model.require(model.config.rows[kUnsigned] == kTileRowBytes / 4, "tdpbsud of tiles that do not match");
  for (int r = 0; r < model.config.rows[kSums]; ++r)
    for (int n = 0; n < kTileRowBytes / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, model.tiles[kSums][r] + 4 * n, sizeof sum);
      for (int k = 0; k < kTileRowBytes; ++k)
        sum += static_cast<uint32_t>(static_cast<int8_t>(model.tiles[kSigned][r][k]) *
                                     model.tiles[kUnsigned][k / 4][4 * n + k % 4]);
      std::memcpy(model.tiles[kSums][r] + 4 * n, &sum, sizeof sum);
    }
}

#else

// As assembly: tiles are no variables to a compiler, and intrinsics would need its flags for AMX.
inline void load_tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows of 64 bytes, `stride` bytes apart.
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sums[row][n] += the sum over k of signed[row][k] * unsigned[k / 4][4 * n + k % 4], int32 that wraps.
template <int kSums, int kSigned, int kUnsigned>
inline void multiply_tiles() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kSigned), "i"(kUnsigned));
}

#endif

}  // namespace
}  // namespace poc::cpu
