#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <utility>

namespace poc::cuda {

namespace {

constexpr int kOldestDriver = 12000;           // of CUDA 12.0: the first with libraries, which belong to no context
constexpr unsigned kUsualSharedBytes = 49152;  // more has to be asked for
constexpr int kMaxDynamicSharedBytes = 8;      // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kPreferShared = 1;               // CU_FUNC_CACHE_PREFER_SHARED

template <class EntryPoint>
void find(void* library, const char* name, EntryPoint& entry_point) {
  entry_point = reinterpret_cast<EntryPoint>(dlsym(library, name));
  if (!entry_point) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
}

}  // namespace

Driver::Driver(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(std::string("there is no NVIDIA driver: ") + dlerror());
  EntryPoints& e = entry_points_;
  find(handle, "cuDriverGetVersion", e.cuDriverGetVersion);
  find(handle, "cuGetErrorName", e.cuGetErrorName);
  find(handle, "cuGetErrorString", e.cuGetErrorString);
  int version = 0;
  check(e.cuDriverGetVersion(&version), "cuDriverGetVersion", library);
  if (version < kOldestDriver)
    throw std::runtime_error("needs an NVIDIA driver of CUDA 12.0 or later, got one of " +
                             std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
  find(handle, "cuInit", e.cuInit);
  find(handle, "cuDeviceGet", e.cuDeviceGet);
  find(handle, "cuDevicePrimaryCtxRetain", e.cuDevicePrimaryCtxRetain);
  find(handle, "cuCtxGetCurrent", e.cuCtxGetCurrent);
  find(handle, "cuCtxGetDevice", e.cuCtxGetDevice);
  find(handle, "cuCtxPushCurrent_v2", e.cuCtxPushCurrent);
  find(handle, "cuCtxPopCurrent_v2", e.cuCtxPopCurrent);
  find(handle, "cuLibraryLoadData", e.cuLibraryLoadData);
  find(handle, "cuLibraryGetKernel", e.cuLibraryGetKernel);
  find(handle, "cuKernelGetFunction", e.cuKernelGetFunction);
  find(handle, "cuKernelSetAttribute", e.cuKernelSetAttribute);
  find(handle, "cuKernelSetCacheConfig", e.cuKernelSetCacheConfig);
  find(handle, "cuLaunchKernel", e.cuLaunchKernel);
  check(e.cuInit(0), "cuInit", library);
}

void Driver::check(Result result, const char* call, const std::string& of) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  entry_points_.cuGetErrorName(result, &name);
  entry_points_.cuGetErrorString(result, &text);
  throw std::runtime_error(std::string(call) + " of " + of + ": " + (text ? text : "unknown error") + " (" +
                           (name ? name : std::to_string(result)) + ")");
}

DeviceHandle Driver::device(int ordinal) const {
  DeviceHandle handle = 0;
  check(entry_points_.cuDeviceGet(&handle, ordinal), "cuDeviceGet", "device " + std::to_string(ordinal));
  return handle;
}

Context Driver::primary_context(int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Context& context = contexts_[ordinal];
  if (!context)
    check(entry_points_.cuDevicePrimaryCtxRetain(&context, device(ordinal)), "cuDevicePrimaryCtxRetain",
          "device " + std::to_string(ordinal));
  return context;
}

OnDevice::OnDevice(Driver& driver, int ordinal) : driver_(driver) {
  const EntryPoints& e = driver.entry_points();
  const auto of = [ordinal] { return "device " + std::to_string(ordinal); };
  Context current = nullptr;
  if (e.cuCtxGetCurrent(&current) == 0 && current) {
    DeviceHandle device = 0;
    if (e.cuCtxGetDevice(&device) == 0 && device == driver.device(ordinal)) return;
  }
  driver.check(e.cuCtxPushCurrent(driver.primary_context(ordinal)), "cuCtxPushCurrent", of());
  pushed_ = true;
}

OnDevice::~OnDevice() {
  Context popped = nullptr;
  if (pushed_) driver_.entry_points().cuCtxPopCurrent(&popped);
}

Kernel::Kernel(Driver& driver, const void* code, std::string name, unsigned threads, unsigned shared_bytes)
    : driver_(driver), name_(std::move(name)), threads_(threads), shared_bytes_(shared_bytes) {
  const EntryPoints& e = driver_.entry_points();
  LibraryHandle library = nullptr;
  driver_.check(e.cuLibraryLoadData(&library, code, nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData",
                name_);
  driver_.check(e.cuLibraryGetKernel(&handle_, library, name_.c_str()), "cuLibraryGetKernel", name_);
}

void Kernel::prepare(int ordinal) const {
  const EntryPoints& e = driver_.entry_points();
  const OnDevice on_device(driver_, ordinal);
  Function function = nullptr;
  driver_.check(e.cuKernelGetFunction(&function, handle_), "cuKernelGetFunction", name_);
  if (shared_bytes_ <= kUsualSharedBytes) return;
  const DeviceHandle device = driver_.device(ordinal);
  driver_.check(e.cuKernelSetCacheConfig(handle_, kPreferShared, device), "cuKernelSetCacheConfig", name_);
  driver_.check(e.cuKernelSetAttribute(kMaxDynamicSharedBytes, static_cast<int>(shared_bytes_), handle_, device),
                "cuKernelSetAttribute", name_);
}

void Kernel::launch(int ordinal, Stream stream, unsigned grid_x, unsigned grid_y, void** arguments) const {
  const OnDevice on_device(driver_, ordinal);
  // Where the driver takes a function it takes a kernel too, and launches it in the context of the stream.
  driver_.check(driver_.entry_points().cuLaunchKernel(reinterpret_cast<Function>(handle_), grid_x, grid_y, 1, threads_,
                                                      1, 1, shared_bytes_, stream, arguments, nullptr),
                "cuLaunchKernel", name_);
}

}  // namespace poc::cuda
