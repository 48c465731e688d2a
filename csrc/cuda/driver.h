// Launches code objects through the CUDA driver, which is found at run time: building this takes no toolkit, and
// loading it no driver. No device memory is allocated and no stream is chosen here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>

namespace poc::cuda {

// What cuda.h calls these handles.
using Result = int;
using DeviceHandle = int;
using Context = struct CUctx_st*;
using LibraryHandle = struct CUlib_st*;
using KernelHandle = struct CUkern_st*;
using Function = struct CUfunc_st*;
using Stream = struct CUstream_st*;

// The entry points of the driver that are used, each under its name in libcuda.so.1.
struct EntryPoints {
  Result (*cuInit)(unsigned flags);
  Result (*cuDriverGetVersion)(int* version);
  Result (*cuGetErrorName)(Result error, const char** name);
  Result (*cuGetErrorString)(Result error, const char** text);
  Result (*cuDeviceGet)(DeviceHandle* device, int ordinal);
  Result (*cuDevicePrimaryCtxRetain)(Context* context, DeviceHandle device);
  Result (*cuCtxGetCurrent)(Context* context);
  Result (*cuCtxGetDevice)(DeviceHandle* device);
  Result (*cuCtxPushCurrent)(Context context);
  Result (*cuCtxPopCurrent)(Context* context);
  Result (*cuLibraryLoadData)(LibraryHandle* library, const void* code, int* jit_options, void** jit_values,
                              unsigned jit_count, int* options, void** values, unsigned count);
  Result (*cuLibraryGetKernel)(KernelHandle* kernel, LibraryHandle library, const char* name);
  Result (*cuKernelGetFunction)(Function* function, KernelHandle kernel);
  Result (*cuKernelSetAttribute)(int attribute, int value, KernelHandle kernel, DeviceHandle device);
  Result (*cuKernelSetCacheConfig)(KernelHandle kernel, int config, DeviceHandle device);
  Result (*cuLaunchKernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments,
                           void** extra);
};

// The driver of this process. It stays loaded for as long as the process lives, as do the contexts that it retains.
class Driver {
 public:
  // Throws std::runtime_error, with the reason, where there is no driver that can be used.
  explicit Driver(const std::string& library);

  const EntryPoints& entry_points() const { return entry_points_; }

  // Throws std::runtime_error with the driver's words unless the call succeeded.
  void check(Result result, const char* call, const std::string& of) const;

  DeviceHandle device(int ordinal) const;

  // The context that torch has on a device.
  Context primary_context(int ordinal);

 private:
  EntryPoints entry_points_{};
  std::mutex mutex_;
  std::unordered_map<int, Context> contexts_;
};

// Has calls of this thread go to a device, in a context of it that is current or else in the one that torch has there.
class OnDevice {
 public:
  OnDevice(Driver& driver, int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  Driver& driver_;
  bool pushed_ = false;
};

// A kernel of a code object, for every device and context. It stays loaded: what is in flight on a stream is not known
// here.
class Kernel {
 public:
  Kernel(Driver& driver, const void* code, std::string name, unsigned threads, unsigned shared_bytes);

  const std::string& name() const { return name_; }

  // Loads the kernel on a device, so that its launches there may be captured, and lets it have its shared memory.
  void prepare(int ordinal) const;

  // Puts a launch on a stream of a device; ``arguments`` holds the address of each.
  void launch(int ordinal, Stream stream, unsigned grid_x, unsigned grid_y, void** arguments) const;

 private:
  Driver& driver_;
  std::string name_;
  unsigned threads_, shared_bytes_;
  KernelHandle handle_ = nullptr;
};

}  // namespace poc::cuda
