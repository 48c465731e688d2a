// One product, or one window of entries, of a set of kernels and a form by name, whether or not the CPU says that it
// has the instructions: numbers as arguments, x and the row mask from stdin, the result to stdout.
// tests/kernels/test_arm64.py runs it under an emulator.
//
// one_product forms KERNELS
// one_product project KERNELS dtype rows k bits columns column_start residual masked seed domain coefficient form
// panel_k one_product entries KERNELS seed domain k_start k n_start n
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/project.h"

using namespace poc;

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "one_product: %s\n", what);
  std::exit(2);
}

const cpu::Kernels& kernels_named(const std::string& name) {
  const cpu::KernelList list = cpu::all_kernels();
  for (int i = 0; i < list.count; ++i)
    if (name == list.begin[i]->name) return *list.begin[i];
  fail("no such kernels");
}

std::vector<uint8_t> read_bytes(int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) fail("stdin is too short");
  return bytes;
}

void write_bytes(const std::vector<uint8_t>& bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size() || std::fflush(stdout) != 0)
    fail("stdout takes no more");
}

// The arguments from the third on, one after another.
struct Numbers {
  char** next;
  int64_t integer() { return std::strtoll(*next++, nullptr, 10); }
  uint64_t word() { return std::strtoull(*next++, nullptr, 10); }
  double real() { return std::strtod(*next++, nullptr); }
};

void project(const cpu::Kernels& kernels, Numbers numbers) {
  cpu::Projection p{};
  p.x.dtype = static_cast<DType>(numbers.integer());
  p.rows = numbers.integer();
  p.x.k = p.x.row_stride = numbers.integer();
  p.x.activation_bits = static_cast<int>(numbers.integer());
  p.columns = numbers.integer();
  p.column_start = numbers.integer();
  p.residual = numbers.integer() != 0;
  const bool masked = numbers.integer() != 0;
  const uint64_t seed = numbers.word();
  p.domain = static_cast<uint32_t>(numbers.word());
  p.coefficient = numbers.real();
  p.tiling.form = static_cast<int>(numbers.integer());
  p.tiling.panel_k = numbers.integer();
  p.threads = 2;
  const int64_t element = p.x.dtype == DType::kFloat32 ? 4 : 2;
  const std::vector<uint8_t> x = read_bytes(p.rows * p.x.k * element), mask = read_bytes(masked ? p.rows : 0);
  std::vector<uint8_t> y(static_cast<size_t>(p.rows * p.columns * element));
  p.x.data = x.data();
  p.row_mask = masked ? mask.data() : nullptr;
  p.seed = &seed;
  p.y = y.data();
  std::vector<uint8_t> workspace(static_cast<size_t>(cpu::project_workspace(kernels, p)));
  cpu::project(kernels, p, workspace.data());
  write_bytes(y);
}

void entries(const cpu::Kernels& kernels, Numbers numbers) {
  const uint64_t seed = numbers.word();
  const auto domain = static_cast<uint32_t>(numbers.word());
  const int64_t k_start = numbers.integer(), k = numbers.integer(), n_start = numbers.integer(), n = numbers.integer();
  std::vector<uint8_t> out(static_cast<size_t>(k * n * 2));
  const cpu::Entries e{&seed, domain, k_start, k, n_start, n, reinterpret_cast<int16_t*>(out.data()), /*threads=*/2};
  std::vector<uint8_t> workspace(static_cast<size_t>(cpu::entries_workspace(kernels, e)));
  cpu::entries(kernels, e, workspace.data());
  write_bytes(out);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) fail("takes what to do and the kernels");
  const std::string what = arguments[1];
  const cpu::Kernels& kernels = kernels_named(arguments[2]);
  if (what == "forms" && count == 3) {
    for (int i = 0; i < kernels.form_count; ++i) std::printf("%s\n", kernels.forms[i].name);
  } else if (what == "project" && count == 16) {
    project(kernels, {arguments + 3});
  } else if (what == "entries" && count == 9) {
    entries(kernels, {arguments + 3});
  } else {
    fail("other arguments than those that are listed at the head of its source");
  }
}
