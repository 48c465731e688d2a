// The device twin of projection.h and definition.h: every function of them, compiled for the device. Nothing launches
// this yet; it keeps the headers free of what only a host compiles.
#include "../projection.h"

namespace poc::cuda {

template <class Type>
__device__ typename Type::Storage project_one(typename Type::Storage x, int32_t exponent, int activation_bits,
                                              EntryKey key, uint32_t k, uint32_t n, float coefficient) {
  const int32_t shift = activation_shift(activation_bits);
  const float widened = Type::widen(x);
  const int32_t rounded = round_activation(widened, power_of_two(shift - exponent));
  const int32_t q = activation_bits == 16 ? rounded : clamp_byte(rounded);
  const Words words = entry_words(key.seed, key.domain, k, n);
  const int entry = 2 * half_entry(words.w[(k / 4) % 4], static_cast<int>(k % 4)) + 1;
  return Type::round(widened + projected(static_cast<double>(q) * entry, coefficient, power_of_two(exponent - shift)));
}

template <class Type>
__global__ void project_diagonal(const typename Type::Storage* x, typename Type::Storage* y, int activation_bits,
                                 const uint64_t* seed, uint32_t domain, uint32_t k, float coefficient) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= k) return;
  const int32_t exponent = row_exponent(float_to_bits(Type::widen(x[i])) & 0x7FFFFFFFu);
  y[i] = project_one<Type>(x[i], exponent, activation_bits, read_key(seed, domain), i, i, coefficient);
}

template __global__ void project_diagonal<Float32>(const uint32_t*, uint32_t*, int, const uint64_t*, uint32_t, uint32_t,
                                                   float);
template __global__ void project_diagonal<BFloat16>(const uint16_t*, uint16_t*, int, const uint64_t*, uint32_t,
                                                    uint32_t, float);
template __global__ void project_diagonal<Float16>(const uint16_t*, uint16_t*, int, const uint64_t*, uint32_t, uint32_t,
                                                   float);

}  // namespace poc::cuda
