// When the tiles of AMX may be used: whatever is missing, the answer is no, and nobody is asked for nothing.
#include "cpu/amx_support.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace poc::cpu;

namespace {

int asked = 0;
bool granted() { return ++asked > 0; }
bool refused() { return ++asked < 0; }

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

}  // namespace

int main() {
  constexpr uint32_t kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr uint64_t kConfig = 1u << 17, kData = 1u << 18;
  expect(tiles_usable({kTiles | kInt8, true, kConfig | kData, granted}) && asked == 1,
         "with all of it they are usable");
  expect(!tiles_usable({kTiles | kInt8, true, kConfig | kData, refused}) && asked == 2, "not without permission");
  for (uint32_t features : {0u, kTiles, kInt8})
    expect(!tiles_usable({features, true, kConfig | kData, granted}), "not without the instructions");
  for (uint64_t state : {uint64_t{0}, kConfig, kData})
    expect(!tiles_usable({kTiles | kInt8, true, state, granted}), "not where their state is not saved");
  expect(!tiles_usable({kTiles | kInt8, false, kConfig | kData, granted}), "not without XSAVE");
  expect(asked == 2, "permission is asked for last");
  const bool here = tiles_usable(tile_support());
  expect(here == tiles_usable(tile_support()), "asking again changes nothing");
  std::printf("this CPU %s tiles\n", here ? "lets this process use its" : "has no");
}
