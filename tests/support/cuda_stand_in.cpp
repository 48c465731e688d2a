// A stand-in for libcuda.so.1 on a machine without a GPU: has two devices, refuses what a driver would refuse, keeps
// what it was told, and gives each launch to a callback. Handles are numbers that are no ordinals, so that a mix-up
// shows.
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

using Result = int;
constexpr Result kInvalidValue = 1, kNoDevice = 101, kInvalidContext = 201, kNotFound = 500, kInvalidHandle = 400;
constexpr int kDevices = 2, kFirstDevice = 10;
constexpr unsigned kUsualSharedBytes = 49152, kMostSharedBytes = 232448;  // 227 KiB, an H200's

struct Kernel {
  int library;  // what the callback calls the code
  std::string name;
  unsigned shared_bytes[kDevices] = {kUsualSharedBytes, kUsualSharedBytes};
  bool loaded[kDevices] = {};
};

// Says which code this is: its number, or less than 0.
using Identify = int (*)(const void* code, char* name, int size);
// Runs a launch; its result is that of cuLaunchKernel.
using Run = Result (*)(int library, int device, const unsigned* grid, unsigned threads, unsigned shared_bytes,
                       void* stream, void** arguments);

Identify identify = nullptr;
Run run = nullptr;
int version = 12000;
std::string failing;
Result failure = 0;
long launches = 0;
std::vector<Kernel> kernels;  // never grows beyond what is reserved, so that addresses stay
std::map<std::string, long> calls;
int contexts[kDevices];                  // their addresses are the contexts
thread_local std::vector<int*> current;  // the stack of this thread

Result called(const char* name) {
  ++calls[name];
  return failing == name ? failure : 0;
}

int device_of(const int* context) { return static_cast<int>(context - contexts); }
bool is_device(int handle) { return handle >= kFirstDevice && handle < kFirstDevice + kDevices; }
Kernel* kernel_of(void* handle) {
  for (Kernel& kernel : kernels)
    if (&kernel == handle) return &kernel;
  return nullptr;
}

}  // namespace

#define CALLED(name) \
  if (const Result failed = called(name)) return failed

extern "C" {

void stand_in_reset(Identify new_identify, Run new_run, int new_version) {
  identify = new_identify, run = new_run, version = new_version;
  failing.clear();
  kernels.clear();
  kernels.reserve(4096);
  calls.clear();
  current.clear();
  launches = 0;
}
void stand_in_fail(const char* name, Result result) { failing = name, failure = result; }
long stand_in_calls(const char* name) { return calls[name]; }
long stand_in_launches() { return launches; }
void stand_in_push(int ordinal) { current.push_back(&contexts[ordinal]); }
int stand_in_depth() { return static_cast<int>(current.size()); }

Result cuInit(unsigned flags) {
  CALLED("cuInit");
  return flags ? kInvalidValue : 0;
}
Result cuDriverGetVersion(int* out) {
  *out = version;
  return 0;
}
Result cuGetErrorName(Result error, const char** name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return *name ? 0 : kInvalidValue;
}
Result cuGetErrorString(Result error, const char** text) {
  *text = error == 2 ? "out of memory" : error == kInvalidValue ? "invalid argument" : nullptr;
  return *text ? 0 : kInvalidValue;
}
Result cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return kNoDevice;
  *device = kFirstDevice + ordinal;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) {
  CALLED("cuDevicePrimaryCtxRetain");
  if (!is_device(device)) return kNoDevice;
  *context = &contexts[device - kFirstDevice];
  return 0;
}
Result cuCtxGetCurrent(void** context) {
  *context = current.empty() ? nullptr : current.back();
  return 0;
}
Result cuCtxGetDevice(int* device) {
  if (current.empty()) return kInvalidContext;
  *device = kFirstDevice + device_of(current.back());
  return 0;
}
Result cuCtxPushCurrent_v2(void* context) {
  current.push_back(static_cast<int*>(context));
  return 0;
}
Result cuCtxPopCurrent_v2(void** context) {
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return 0;
}
Result cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned jit, int*, void**, unsigned count) {
  CALLED("cuLibraryLoadData");
  char name[256] = {};
  const int number = identify(code, name, sizeof name);
  if (number < 0 || jit || count || kernels.size() == kernels.capacity()) return kInvalidValue;
  kernels.push_back({number, name});
  *library = &kernels.back().library;
  return 0;
}
Result cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  CALLED("cuLibraryGetKernel");
  for (Kernel& each : kernels)
    if (&each.library == library) {
      *kernel = &each;
      return each.name == name ? 0 : kNotFound;
    }
  return kInvalidHandle;
}
Result cuKernelGetFunction(void** function, void* kernel) {
  CALLED("cuKernelGetFunction");
  if (current.empty()) return kInvalidContext;
  Kernel* found = kernel_of(kernel);
  if (!found) return kInvalidHandle;
  found->loaded[device_of(current.back())] = true;
  *function = kernel;
  return 0;
}
Result cuKernelSetCacheConfig(void* kernel, int config, int device) {
  CALLED("cuKernelSetCacheConfig");
  return kernel_of(kernel) && is_device(device) && config == 1 ? 0 : kInvalidValue;
}
Result cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  CALLED("cuKernelSetAttribute");
  Kernel* found = kernel_of(kernel);
  if (!found || !is_device(device) || attribute != 8 || value < 0 || value > static_cast<int>(kMostSharedBytes))
    return kInvalidValue;
  found->shared_bytes[device - kFirstDevice] = value;
  return 0;
}
Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                      unsigned threads_z, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  if (!failing.empty()) CALLED("cuLaunchKernel");
  if (current.empty()) return kInvalidContext;
  Kernel* found = kernel_of(function);
  if (!found) return kInvalidHandle;
  const int device = device_of(current.back());
  if (!found->loaded[device] || shared_bytes > found->shared_bytes[device] || extra || threads_y != 1 ||
      threads_z != 1 || threads == 0 || threads > 1024 || x == 0 || x > 0x7FFFFFFF || y == 0 || y > 65535 || z != 1)
    return kInvalidValue;
  ++launches;
  const unsigned grid[] = {x, y, z};
  return run ? run(found->library, device, grid, threads, shared_bytes, stream, arguments) : 0;
}

}  // extern "C"
