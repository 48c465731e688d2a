// Random products and entries of every instruction set of this CPU against plain loops, bit for bit, in every form; to
// be built with sanitizers, and with a model of AMX's tiles (CMakeLists.txt). Every buffer is an allocation of its own,
// of exactly the size that kernels may touch.
//
// random_products [FAULT]: with a fault, every product has it, and the sanitizer, or the comparison of bits, must find
// it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/project.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

using namespace poc;

namespace {

constexpr int kProducts = 400;
constexpr int kWindows = 60;

std::mt19937_64 generator(20240501);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
}

// Memory full of one byte.
struct Buffer {
  explicit Buffer(int64_t size, int fill = 0xA5) : bytes(new uint8_t[static_cast<size_t>(size)]) {
    std::memset(bytes.get(), fill, static_cast<size_t>(size));
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(bytes.get());
  }
  std::unique_ptr<uint8_t[]> bytes;
};

struct Case {
  DType dtype;
  int activation_bits;
  int64_t rows, k, row_stride, columns, column_start;
  bool residual, masked;
  uint64_t seed;
  uint32_t domain;
  float coefficient;
  bool largest_sums;  // every product of column 0 has the same sign, and x is as large as its row allows

  int64_t element_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
};

Case random_case() {
  Case c;
  c.dtype = one_of({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  c.activation_bits = one_of({16, 8});
  c.rows = between(1, one_of({3, 14, 40, 70}));
  c.k = one_of<int64_t>({1, 15, 16, 17, 32, 33, 255, 1000, 1030, between(1, 300)});
  c.row_stride = c.k + one_of<int64_t>({0, 0, 7, 64});
  c.residual = one_of({true, false});
  c.masked = c.residual && one_of({true, false});
  if (c.residual) {
    c.column_start = between(0, c.k - 1);
    c.columns = between(1, std::min<int64_t>(c.k - c.column_start, 150));
  } else {
    c.columns = one_of<int64_t>({1, 8, 15, 16, 17, 63, 64, 65, between(1, 150)});
    c.column_start = one_of<int64_t>({0, 5, 0xFFFFFFFF - c.columns, between(0, 1 << 20)});
  }
  c.seed = generator();
  c.domain = static_cast<uint32_t>(one_of<uint64_t>({0, 1, 0xFFFFFFFF, generator()}));
  c.coefficient = one_of({1.0788e-4f, 1.0f, 1e-38f, 1.4e-45f, 1e36f});
  c.largest_sums = false;
  return c;
}

Case case_of_largest_sums(int activation_bits) {
  return {DType::kFloat32,      activation_bits,    /*rows=*/2,       /*k=*/65536, /*row_stride=*/65536, /*columns=*/3,
          /*column_start=*/0,   /*residual=*/false, /*masked=*/false, /*seed=*/7,  /*domain=*/0,         1.0788e-4f,
          /*largest_sums=*/true};
}

int entry(const Case& c, int64_t k, int64_t n) {
  const Words words = entry_words(c.seed, c.domain, static_cast<uint32_t>(k), static_cast<uint32_t>(n));
  return 2 * half_entry(words.w[k / 4 % 4], static_cast<int>(k % 4)) + 1;
}

// One value of x: mostly ordinary numbers, in some rows bits of any kind, rarely NaN or infinity.
template <class Type>
typename Type::Storage activation(int row_kind) {
  using Storage = typename Type::Storage;
  if (row_kind == 0) return static_cast<Storage>(generator());
  const float value = std::normal_distribution<float>()(generator);
  if (row_kind == 1) return Type::round(value * 0x1p-130f);
  if (row_kind == 2) return between(0, 30) == 0 ? Type::kNaN : Type::round(value);
  return Type::round(value);
}

template <class Type>
void fill(const Case& c, void* x) {
  for (int64_t row = 0; row < c.rows; ++row) {
    const int kind = static_cast<int>(between(0, 9));
    auto* to = static_cast<typename Type::Storage*>(x) + row * c.row_stride;
    for (int64_t k = 0; k < c.k; ++k)
      to[k] = c.largest_sums ? Type::round((row == 0) == (entry(c, k, 0) > 0) ? 1.9999f : -1.9999f)
                             : activation<Type>(kind);
  }
}

// The definition in plain loops: integers in 64 bits, and roundings by the C library.
template <class Type>
void reference(const Case& c, const std::vector<int>& entries, const void* x, const uint8_t* mask, void* y) {
  const int shift = activation_shift(c.activation_bits);
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto* from = static_cast<const typename Type::Storage*>(x) + row * c.row_stride;
    auto* to = static_cast<typename Type::Storage*>(y) + row * c.columns;
    if (c.masked && mask[row] == 0) {
      std::memcpy(to, from + c.column_start, static_cast<size_t>(c.columns) * sizeof *to);
      continue;
    }
    double largest = 0;
    bool finite = true;
    for (int64_t k = 0; k < c.k; ++k) {
      const double value = Type::widen(from[k]);
      finite = finite && std::isfinite(value);
      largest = std::max(largest, std::fabs(value));
    }
    const int exponent = finite && largest > 0 ? std::max(std::ilogb(largest), kMinExponent) : kMinExponent;
    std::vector<int64_t> q(static_cast<size_t>(c.k));
    for (int64_t k = 0; finite && k < c.k; ++k) {
      q[k] = std::llrint(std::ldexp(static_cast<double>(Type::widen(from[k])), shift - exponent));
      if (c.activation_bits == 8) q[k] = std::clamp<int64_t>(q[k], -127, 127);
    }
    for (int64_t n = 0; n < c.columns; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < c.k; ++k) sum += q[k] * entries[n * c.k + k];
      const float g = projected(static_cast<double>(sum), c.coefficient, std::ldexp(1.0f, exponent - shift));
      const float result = c.residual ? Type::widen(from[c.column_start + n]) + g : g;
      to[n] = finite ? Type::round(result) : Type::kNaN;
    }
  }
}

void for_dtype(const Case& c, const std::vector<int>* entries, const void* x, const uint8_t* mask, void* to) {
  const auto run = [&](auto type) {
    using Type = decltype(type);
    entries == nullptr ? fill<Type>(c, to) : reference<Type>(c, *entries, x, mask, to);
  };
  if (c.dtype == DType::kFloat32) run(Float32{});
  if (c.dtype == DType::kBFloat16) run(BFloat16{});
  if (c.dtype == DType::kFloat16) run(Float16{});
}

[[noreturn]] void fail(const cpu::Kernels& kernels, const std::string& what) {
  std::printf("%s: %s differs from the reference\n", kernels.name, what.c_str());
  std::exit(1);
}

std::vector<const cpu::Kernels*> kernels_of_this_cpu() {
  const cpu::KernelList list = cpu::all_kernels();
  std::vector<const cpu::Kernels*> kernels;
  for (int i = 0; i < list.count; ++i)
    if (list.begin[i]->supported()) kernels.push_back(list.begin[i]);
  return kernels;
}

void check_product(const Case& c, const std::string& fault) {
  const int64_t element = c.element_bytes(), x_bytes = ((c.rows - 1) * c.row_stride + c.k) * element;
  const int64_t y_bytes = c.rows * c.columns * element;
  Buffer x(x_bytes), mask(c.rows), expected(y_bytes), seed(16);
  uint64_t* seed_at = seed.as<uint64_t>();
  if (fault == "misaligned_seed") seed_at = reinterpret_cast<uint64_t*>(seed.as<uint8_t>() + 1);
  std::memcpy(seed_at, &c.seed, sizeof c.seed);
  for (int64_t row = 0; row < c.rows; ++row) mask.as<uint8_t>()[row] = static_cast<uint8_t>(between(0, 1));
  for_dtype(c, nullptr, nullptr, nullptr, x.as<void>());
  std::vector<int> entries;
  for (int64_t n = 0; n < c.columns; ++n)
    for (int64_t k = 0; k < c.k; ++k) entries.push_back(entry(c, k, c.column_start + n));
  for_dtype(c, &entries, x.as<void>(), mask.as<uint8_t>(), expected.as<void>());
  if (fault == "wrong_bit") expected.as<uint8_t>()[y_bytes - 1] ^= 1;

  // No kernel may read what lies between the rows of x.
  const int64_t gap = (c.row_stride - c.k) * element;
  for (int64_t row = 0; row + 1 < c.rows; ++row)
    ASAN_POISON_MEMORY_REGION(x.as<uint8_t>() + (row * c.row_stride + c.k) * element, static_cast<size_t>(gap));
  Buffer short_x(std::max<int64_t>(x_bytes - element, 1));
  std::memcpy(short_x.as<void>(), x.as<void>(), fault == "short_x" ? static_cast<size_t>(x_bytes - element) : 0);

  for (const cpu::Kernels* kernels : kernels_of_this_cpu()) {
    cpu::Projection p;
    p.x = {fault == "short_x" ? short_x.as<void>() : x.as<void>(), c.dtype, c.row_stride, c.k, c.activation_bits};
    p.rows = c.rows;
    p.row_mask = c.masked ? mask.as<uint8_t>() : nullptr;
    p.residual = c.residual;
    p.columns = c.columns;
    p.column_start = c.column_start;
    p.seed = seed_at;
    p.domain = c.domain;
    p.coefficient = c.coefficient;
    p.threads = one_of({1, 2, 3, 7});
    p.tiling = {one_of<int64_t>({0, between(1, 40)}), one_of<int64_t>({0, between(1, 80)}),
                one_of<int64_t>({0, between(1, c.k + 16)}), static_cast<int>(between(0, kernels->form_count))};
    const int fill = one_of({0x00, 0xA5, 0xFF});
    // Several calls at once: nothing may be shared by their threads except what they read.
    std::vector<Buffer> results;
    std::vector<std::thread> callers;
    const int calls = fault == "shared_y" ? 2 : one_of({1, 1, 3});
    for (int i = 0; i < calls; ++i) results.emplace_back(fault == "short_y" ? y_bytes - element : y_bytes, fill);
    const auto call = [&](int i) {
      cpu::Projection own = p;
      own.y = results[fault == "shared_y" ? 0 : i].as<void>();
      Buffer workspace(cpu::project_workspace(*kernels, own), fill);
      cpu::project(*kernels, own, workspace.as<void>());
    };
    for (int i = 1; i < calls; ++i) callers.emplace_back(call, i);
    call(0);
    for (std::thread& caller : callers) caller.join();
    if (!fault.empty() && fault != "wrong_bit") continue;
    for (const Buffer& y : results)
      if (std::memcmp(y.as<void>(), expected.as<void>(), static_cast<size_t>(y_bytes)) != 0)
        fail(*kernels, "a product of " + std::to_string(c.rows) + " rows, K = " + std::to_string(c.k) + ", " +
                           std::to_string(c.columns) + " columns, " + std::to_string(c.activation_bits) + " bits");
  }
  ASAN_UNPOISON_MEMORY_REGION(x.as<uint8_t>(), static_cast<size_t>(x_bytes));
}

void check_entries() {
  Case c = random_case();
  const int64_t k_start = one_of<int64_t>({0, 5, 1008, between(0, 64000)});
  const int64_t k = one_of<int64_t>({1, 16, 511, 513, between(1, 600)}), n = between(1, 70);
  const int64_t n_start = one_of<int64_t>({0, 0xFFFFFFFF - n, between(0, 1 << 30)});
  for (const cpu::Kernels* kernels : kernels_of_this_cpu()) {
    Buffer out(k * n * 2);
    cpu::Entries e = {&c.seed, c.domain, k_start, k, n_start, n, out.as<int16_t>(), one_of({1, 2, 3, 7})};
    Buffer workspace(cpu::entries_workspace(*kernels, e));
    cpu::entries(*kernels, e, workspace.as<void>());
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (e.out[i * n + j] != entry(c, k_start + i, n_start + j))
          fail(*kernels, "entry " + std::to_string(k_start + i) + ", " + std::to_string(n_start + j));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string fault = count > 1 ? arguments[1] : "";
  for (int i = 0; i < kProducts; ++i) check_product(random_case(), fault);
  for (int activation_bits : {16, 8}) check_product(case_of_largest_sums(activation_bits), fault);
  for (int i = 0; i < kWindows; ++i) check_entries();
  std::string names;
  for (const cpu::Kernels* kernels : kernels_of_this_cpu()) names += std::string(" ") + kernels->name;
  std::printf("%d products and %d windows of entries are right by%s\n", kProducts + 2, kWindows, names.c_str());
}
