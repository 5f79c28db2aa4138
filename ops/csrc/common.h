// What both sides of an op share. No torch and no CUDA header here: g++ compiles the .cpp files without CUDA, and nvcc
// the .cu files without torch, in seconds and without a GPU.
#pragma once
#include <cstdint>

namespace gan_ops {

enum class Type { f64, f32, bf16, f16 };

}  // namespace gan_ops
