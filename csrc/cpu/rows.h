// Quantise and finish rows in plain loops, compiled once per instruction set (hence the unnamed namespace: no function
// of one set may be linked into the code of another).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace poc::cpu {
namespace {

template <class Type>
void quantise_row(const Activations& x, RowState& state, int16_t* q) {
  const auto* row = static_cast<const typename Type::Storage*>(x.data) + state.row * x.row_stride;
  uint32_t largest = 0;
  for (int64_t k = 0; k < x.k; ++k) {
    const uint32_t magnitude = float_to_bits(Type::widen(row[k])) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  state.finite = largest < 0x7F800000u;
  state.exponent = row_exponent(state.finite ? largest : 0);
  const float scale = power_of_two(activation_shift(x.activation_bits) - state.exponent);
  int32_t sum = 0;
  if (!state.finite) {
    for (int64_t k = 0; k < x.k; ++k) q[k] = 0;
  } else if (x.activation_bits == 16) {
    for (int64_t k = 0; k < x.k; ++k) {
      const int32_t rounded = round_activation(Type::widen(row[k]), scale);
      q[k] = static_cast<int16_t>(rounded);
      sum += rounded;
    }
  } else {
    for (int64_t k = 0; k < x.k; ++k) {
      const int32_t rounded = clamp_byte(round_activation(Type::widen(row[k]), scale));
      q[k] = static_cast<int16_t>(rounded);
      sum += rounded;
    }
  }
  for (int64_t k = x.k; k < x.k_padded; ++k) q[k] = 0;
  state.sum = sum;
}

// Writes the q of rows to scratch, k_padded apart.
void quantise_rows(const Activations& x, RowState* states, int rows, int16_t* scratch) {
  for (int r = 0; r < rows; ++r) {
    int16_t* q = scratch + r * x.k_padded;
    switch (x.dtype) {
      case DType::kFloat32:
        quantise_row<Float32>(x, states[r], q);
        break;
      case DType::kBFloat16:
        quantise_row<BFloat16>(x, states[r], q);
        break;
      case DType::kFloat16:
        quantise_row<Float16>(x, states[r], q);
        break;
    }
  }
}

template <class Type, int kSumWeight>
void finish_row(const Results& to, const RowState& state, const double* sums) {
  using Storage = typename Type::Storage;
  Storage* y = static_cast<Storage*>(to.y) + state.row * to.y_row_stride + to.y_column;
  if (!state.finite) {
    for (int j = 0; j < to.columns; ++j) y[j] = Type::kNaN;
    return;
  }
  const float scale = power_of_two(state.exponent - activation_shift(to.activation_bits));
  const double offset = static_cast<double>(kSumWeight) * state.sum;
  const float coefficient = to.coefficient;
  if (to.x == nullptr) {
    for (int j = 0; j < to.columns; ++j) y[j] = Type::round(projected(2.0 * sums[j] + offset, coefficient, scale));
    return;
  }
  const Storage* x = static_cast<const Storage*>(to.x) + state.row * to.x_row_stride + to.y_column;
  for (int j = 0; j < to.columns; ++j)
    y[j] = Type::round(Type::widen(x[j]) + projected(2.0 * sums[j] + offset, coefficient, scale));
}

template <int kSumWeight>
void finish_rows(const Results& to, const RowState* states, int rows, const double* sums, int64_t sums_stride) {
  for (int r = 0; r < rows; ++r) {
    const double* row_sums = sums + r * sums_stride;
    switch (to.dtype) {
      case DType::kFloat32:
        finish_row<Float32, kSumWeight>(to, states[r], row_sums);
        break;
      case DType::kBFloat16:
        finish_row<BFloat16, kSumWeight>(to, states[r], row_sums);
        break;
      case DType::kFloat16:
        finish_row<Float16, kSumWeight>(to, states[r], row_sums);
        break;
    }
  }
}

}  // namespace
}  // namespace poc::cpu
