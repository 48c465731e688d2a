// What a product x @ P is made of, for host and device: where the activations lie, and which P it is.
#pragma once

#include <cstdint>

#include "definition.h"

namespace poc {

// Activations x [rows, k], and how they are quantised.
struct Activations {
  const void* data;
  DType dtype;
  int64_t row_stride;  // in elements
  int64_t k;
  int activation_bits;
};

// Everything that the entries of P depend on, except their position.
struct EntryKey {
  uint64_t seed;
  uint32_t domain;
};

// The key of a product whose seed is read where it lies, when the product starts: memory that a captured graph replays
// with may hold another seed by then.
POC_HOST_DEVICE static inline EntryKey read_key(const uint64_t* seed, uint32_t domain) { return {*seed, domain}; }

}  // namespace poc
