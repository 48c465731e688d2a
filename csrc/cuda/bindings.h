#pragma once

#include <pybind11/pybind11.h>

namespace poc::cuda {

// Adds CudaDriver and CudaKernel to the module.
void bind(pybind11::module_& m);

}  // namespace poc::cuda
