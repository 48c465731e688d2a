// poc_kernels._native: addresses, sizes and numbers in, nothing allocated, the GIL released. All checks are in ops.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/parallel.h"
#include "cpu/project.h"
#include "definition.h"
#ifdef POC_KERNELS_DRIVER
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace poc;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const cpu::Kernels& kernels_named(const std::string& name) {
  const cpu::KernelList list = cpu::all_kernels();
  for (int i = 0; i < list.count; ++i) {
    if (name != list.begin[i]->name) continue;
    if (!list.begin[i]->supported()) throw py::value_error("this CPU lacks the instructions of " + name);
    return *list.begin[i];
  }
  throw py::value_error("instruction_set must be one of this build's, got " + name);
}

// The names of the instruction sets of this build, best first, each with whether this CPU has it.
py::list instruction_sets() {
  py::list names;
  const cpu::KernelList list = cpu::all_kernels();
  for (int i = 0; i < list.count; ++i) names.append(py::make_tuple(list.begin[i]->name, list.begin[i]->supported()));
  return names;
}

// The names of the forms of an instruction set; Projection takes their numbers, from 1 on.
py::list forms(const std::string& instruction_set) {
  py::list names;
  const cpu::Kernels& kernels = kernels_named(instruction_set);
  for (int i = 0; i < kernels.form_count; ++i) names.append(kernels.forms[i].name);
  return names;
}

void check_form(const cpu::Projection& p, const cpu::Kernels& kernels) {
  const std::string count = std::to_string(kernels.form_count), form = std::to_string(p.tiling.form);
  if (p.tiling.form < 0 || p.tiling.form > kernels.form_count)
    throw py::value_error("form must be in [0, " + count + "], got " + form);
}
void check_form(const cpu::Entries&, const cpu::Kernels&) {}

// Binds what the driver makes of a Call: the bytes of workspace that it needs, and its run.
template <class Call>
void bind_run(py::class_<Call>& bound, int64_t (*workspace_bytes)(const cpu::Kernels&, const Call&),
              void (*run)(const cpu::Kernels&, const Call&, void* workspace)) {
  bound.def("workspace_bytes", [workspace_bytes](const Call& call, const std::string& instruction_set) {
    const cpu::Kernels& chosen = kernels_named(instruction_set);
    check_form(call, chosen);
    return workspace_bytes(chosen, call);
  });
  bound.def("run", [run](const Call& call, const std::string& instruction_set, uintptr_t workspace) {
    const cpu::Kernels& chosen = kernels_named(instruction_set);
    check_form(call, chosen);
    py::gil_scoped_release release;
    run(chosen, call, pointer<void>(workspace));
  });
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  const Words out = philox4x32_10({{c0, c1, c2, c3}}, key0, key1);
  return py::make_tuple(out.w[0], out.w[1], out.w[2], out.w[3]);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("DEFINITION") = kDefinition;
  m.attr("CUDA_COMPILER") = POC_KERNELS_CUDA_COMPILER;
  m.def("instruction_sets", &instruction_sets);
  m.def("forms", &forms);
  m.def("team_runtime", [] { return std::string(cpu::team_runtime()); });
  m.def("philox4x32_10", &philox);

  py::class_<cpu::Projection> projection(m, "Projection");
  projection.def(py::init([](uintptr_t x, int dtype, int64_t rows, int64_t k, int64_t row_stride, uintptr_t row_mask,
                             uintptr_t y, int64_t columns, int64_t column_start, bool residual, uintptr_t seed,
                             uint32_t domain, double coefficient, int activation_bits, int threads, int64_t block_rows,
                             int64_t panel_columns, int64_t panel_k, int form) {
                   cpu::Projection p;
                   p.x = {pointer<const void>(x), static_cast<DType>(dtype), row_stride, k, activation_bits};
                   p.rows = rows;
                   p.row_mask = pointer<const uint8_t>(row_mask);
                   p.residual = residual;
                   p.y = pointer<void>(y);
                   p.columns = columns;
                   p.column_start = column_start;
                   p.seed = pointer<const uint64_t>(seed);
                   p.domain = domain;
                   p.coefficient = coefficient;
                   p.threads = threads;
                   p.tiling = {block_rows, panel_columns, panel_k, form};
                   return p;
                 }),
                 py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("k"), py::arg("row_stride"),
                 py::arg("row_mask"), py::arg("y"), py::arg("columns"), py::arg("column_start"), py::arg("residual"),
                 py::arg("seed"), py::arg("domain"), py::arg("coefficient"), py::arg("activation_bits"),
                 py::arg("threads"), py::arg("block_rows"), py::arg("panel_columns"), py::arg("panel_k"),
                 py::arg("form"));
  bind_run(projection, &cpu::project_workspace, &cpu::project);

  py::class_<cpu::Entries> entries(m, "Entries");
  entries.def(py::init([](uintptr_t seed, uint32_t domain, int64_t k_start, int64_t k, int64_t n_start, int64_t n,
                          uintptr_t out, int threads) {
                return cpu::Entries{pointer<const uint64_t>(seed), domain, k_start, k, n_start, n,
                                    pointer<int16_t>(out),         threads};
              }),
              py::kw_only(), py::arg("seed"), py::arg("domain"), py::arg("k_start"), py::arg("k"), py::arg("n_start"),
              py::arg("n"), py::arg("out"), py::arg("threads"));
  bind_run(entries, &cpu::entries_workspace, &cpu::entries);
#ifdef POC_KERNELS_DRIVER
  cuda::bind(m);
#endif
}
