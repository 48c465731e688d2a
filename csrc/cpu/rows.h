// Quantise and finish rows in plain loops, compiled once per instruction set (hence the unnamed namespace: no function
// of one set may be linked into the code of another).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poc::cpu {
namespace {

// Calls body with a value of the type of activations: Float32, BFloat16 or Float16.
template <class Body>
inline void with_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) return body(Float32{});
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  body(Float16{});
}

template <class Type>
void quantise_row(const Activations& x, int64_t k_padded, RowState& state, int16_t* q) {
  const auto* row = static_cast<const typename Type::Storage*>(x.data) + state.row * x.row_stride;
  uint32_t largest = 0;
  for (int64_t k = 0; k < x.k; ++k) {
    const uint32_t magnitude = float_to_bits(Type::widen(row[k])) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  state.finite = largest < 0x7F800000u;
  state.exponent = row_exponent(state.finite ? largest : 0);
  const float scale = power_of_two(activation_shift(x.activation_bits) - state.exponent);
  const bool clamped = x.activation_bits == 8;
  const int64_t k_end = state.finite ? x.k : 0;
  int32_t sum = 0;
  for (int64_t k = 0; k < k_end; ++k) {
    int32_t rounded = round_activation(Type::widen(row[k]), scale);
    if (clamped) rounded = clamp_byte(rounded);
    q[k] = static_cast<int16_t>(rounded);
    sum += rounded;
  }
  for (int64_t k = k_end; k < k_padded; ++k) q[k] = 0;
  state.sum = sum;
}

// Writes the q of rows to scratch, k_padded apart.
inline void quantise_rows(const Activations& x, int64_t k_padded, RowState* states, int rows, int16_t* scratch) {
  for (int r = 0; r < rows; ++r)
    with_type(x.dtype,
              [&](auto type) { quantise_row<decltype(type)>(x, k_padded, states[r], scratch + r * k_padded); });
}

template <class Type>
void finish_row(const Results& to, const RowState& state, const double* sums) {
  using Storage = typename Type::Storage;
  Storage* y = static_cast<Storage*>(to.y) + state.row * to.y_row_stride + to.y_column;
  if (!state.finite) {
    for (int j = 0; j < to.columns; ++j) y[j] = Type::kNaN;
    return;
  }
  const float scale = power_of_two(state.exponent - activation_shift(to.x.activation_bits));
  const double offset = state.sum;
  const float coefficient = to.coefficient;
  if (to.residual == nullptr) {
    for (int j = 0; j < to.columns; ++j) y[j] = Type::round(projected(2.0 * sums[j] + offset, coefficient, scale));
    return;
  }
  const Storage* x = static_cast<const Storage*>(to.residual) + state.row * to.x.row_stride + to.y_column;
  for (int j = 0; j < to.columns; ++j)
    y[j] = Type::round(Type::widen(x[j]) + projected(2.0 * sums[j] + offset, coefficient, scale));
}

// From sums of q * v: T = 2 * sum + (sum of q).
inline void finish_rows(const Results& to, const RowState* states, int rows, const double* sums, int64_t sums_stride) {
  for (int r = 0; r < rows; ++r)
    with_type(to.x.dtype, [&](auto type) { finish_row<decltype(type)>(to, states[r], sums + r * sums_stride); });
}

// unpack of Kernels; half_entry_at returns v of a panel at k and a column, both counted from its first.
template <int (*half_entry_at)(const void* panel, const PanelShape&, int k, int column)>
void unpack(const void* panel, const PanelShape& shape, int k_begin, int k_end, int columns, int16_t* entries,
            int64_t entries_stride) {
  for (int k = k_begin; k < k_end; ++k)
    for (int n = 0; n < columns; ++n)
      entries[(k - k_begin) * entries_stride + n] = static_cast<int16_t>(2 * half_entry_at(panel, shape, k, n) + 1);
}

}  // namespace
}  // namespace poc::cpu
