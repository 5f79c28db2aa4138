// What both sides of an op share. No torch and no CUDA header here: g++ compiles the .cpp files without CUDA, and nvcc
// the .cu files without torch, in seconds and without a GPU.
#pragma once
#include <cstdint>

namespace gan_ops {

enum class Type { f64, f32, bf16, f16 };

// y = leaky_relu(x + bias) * gain, and one bit per element: is x + bias positive? Bit i % 8 of byte i / 8 belongs to
// element i in the memory order of y.
struct Activation {
  const void* bias = nullptr;  // [C] in x's type, or null
  uint8_t* bits = nullptr;     // [ceil(numel / 8)]
  double slope = 1, gain = 1;
};

}  // namespace gan_ops
