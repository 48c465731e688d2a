// The driver's launches for poc_kernels._native: code objects, addresses and numbers in, the GIL released while the
// driver works. All checks of their values are in ops.py.
#include "bindings.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "driver.h"

namespace py = pybind11;

namespace poc::cuda {

namespace {

constexpr size_t kMaxParameters = 64;

// What a kernel takes, a letter for each parameter: p (an address), i (32 bits, signed), 0 (an address that is null and
// that no caller gives).
class BoundKernel {
 public:
  BoundKernel(std::shared_ptr<Driver> driver, const py::bytes& code, std::string name, std::string parameters,
              unsigned threads, unsigned shared_bytes)
      : driver_(std::move(driver)),
        parameters_(std::move(parameters)),
        kernel_(*driver_, std::string(code).data(), std::move(name), threads, shared_bytes) {
    if (parameters_.size() > kMaxParameters || parameters_.find_first_not_of("pi0") != std::string::npos)
      throw py::value_error("parameters must be at most " + std::to_string(kMaxParameters) +
                            " of the letters p, i and 0, got " + parameters_);
    given_ = parameters_.size() - std::count(parameters_.begin(), parameters_.end(), '0');
  }

  void prepare(int device) const {
    py::gil_scoped_release release;
    kernel_.prepare(device);
  }

  void launch(int device, uintptr_t stream, unsigned grid_x, unsigned grid_y, const py::args& given) const {
    if (given.size() != given_)
      throw py::type_error(kernel_.name() + " takes " + std::to_string(given_) + " arguments, got " +
                           std::to_string(given.size()));
    uint64_t values[kMaxParameters] = {};
    void* arguments[kMaxParameters];
    size_t next = 0;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      arguments[i] = &values[i];
      if (parameters_[i] != '0') values[i] = value(given[next++], parameters_[i]);
    }
    py::gil_scoped_release release;
    kernel_.launch(device, reinterpret_cast<Stream>(stream), grid_x, grid_y, arguments);
  }

 private:
  uint64_t value(const py::handle& given, char kind) const {
    const long long number =
        kind == 'p' ? static_cast<long long>(PyLong_AsUnsignedLongLong(given.ptr())) : PyLong_AsLongLong(given.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    if (kind == 'i' && number != static_cast<int32_t>(number))
      throw py::value_error(kernel_.name() + " takes numbers of 32 bits, got " + std::to_string(number));
    return static_cast<uint64_t>(number);
  }

  std::shared_ptr<Driver> driver_;
  std::string parameters_;
  Kernel kernel_;
  size_t given_ = 0;
};

}  // namespace

void bind(py::module_& m) {
  py::class_<Driver, std::shared_ptr<Driver>>(m, "CudaDriver").def(py::init<std::string>(), py::arg("library"));
  py::class_<BoundKernel>(m, "CudaKernel")
      .def(py::init<std::shared_ptr<Driver>, const py::bytes&, std::string, std::string, unsigned, unsigned>(),
           py::kw_only(), py::arg("driver"), py::arg("code"), py::arg("name"), py::arg("parameters"),
           py::arg("threads"), py::arg("shared_bytes"))
      .def("prepare", &BoundKernel::prepare, py::arg("device"))
      .def("launch", &BoundKernel::launch);
}

}  // namespace poc::cuda
