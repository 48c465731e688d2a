#include "parallel.h"

#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace poc::cpu {
namespace {

// The entry point of GCC's OpenMP, which LLVM's and Intel's offer as well.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
int visit(dl_phdr_info* info, size_t, void* found) {
  const std::string path = info->dlpi_name != nullptr ? info->dlpi_name : "";
  const std::string file = path.substr(path.rfind('/') + 1);
  const bool openmp = file.rfind("libgomp", 0) == 0 || file.rfind("libomp", 0) == 0 || file.rfind("libiomp5", 0) == 0;
  if (!openmp) return 0;
  auto& best = *static_cast<std::string*>(found);
  // Of several, the one that came with torch.
  if (best.empty() || path.find("/torch") != std::string::npos) best = path;
  return 0;
}

Runtime find_runtime() {
  Runtime runtime;
  std::string path;
  dl_iterate_phdr(visit, &path);
  if (path.empty()) return runtime;
  if (void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    runtime.parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    if (runtime.parallel != nullptr) runtime.name = "OpenMP (" + path.substr(path.rfind('/') + 1) + ")";
  }
  return runtime;
}
#else
Runtime find_runtime() { return {}; }
#endif

const Runtime& runtime() {
  static const Runtime found = find_runtime();  // at the first use, when torch is loaded
  return found;
}

}  // namespace

void run_team(int threads, void (*body)(void*), void* context) {
  if (runtime().parallel != nullptr) {
    runtime().parallel(body, context, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  } catch (const std::system_error&) {  // the system gives no more threads: those that run do all the work
  }
  body(context);
  for (std::thread& other : others) other.join();
}

const char* team_runtime() { return runtime().name.c_str(); }

}  // namespace poc::cpu
