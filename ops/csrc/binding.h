// From tensors to the plain calls that kernels take.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

#include "common.h"

#if defined(GAN_OPS_CUDA)
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);  // part of libtorch's C ABI
#endif

namespace gan_ops {

inline Type type_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Type::f64;
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: TORCH_CHECK(false, "gan_ops: no kernel for ", x.scalar_type());
  }
}

// NHWC in memory and not NCHW at the same time: what ops/layout.py calls channels_last.
inline bool is_channels_last(const at::Tensor& x) {
  return x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

inline at::Tensor dense(const at::Tensor& x, bool channels_last) {
  return x.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// Whole chunks of malloc. torch asks for aligned ones, of which malloc cuts off what lies before and behind; scraps that
// it then keeps for small requests leave a hole that is too small for the next tensor of the same size. So outputs wandered
// through the heap, always to memory that was in no cache, and a blur took twice the time.
class WholeChunks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const chunk = std::malloc(bytes + LINE);
    TORCH_CHECK(chunk != nullptr, "gan_ops: no memory for ", bytes, " bytes");
    void* const aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(chunk) + LINE - 1) / LINE * LINE);
    return {aligned, chunk, &std::free, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static constexpr uintptr_t LINE = 64;
};

// Memory for what a kernel makes of x: of x's type, or another.
inline at::Tensor empty_output(const at::Tensor& x, at::IntArrayRef sizes, bool channels_last, at::ScalarType type) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (!x.is_cpu()) return at::empty(sizes, x.options().dtype(type), format);
  static WholeChunks chunks;
  return at::detail::empty_generic(sizes, &chunks, c10::DispatchKeySet(c10::DispatchKey::CPU), type, format);
}

inline at::Tensor empty_output(const at::Tensor& x, bool channels_last) {
  return empty_output(x, x.sizes(), channels_last, x.scalar_type());
}

inline at::Tensor empty_bits(const at::Tensor& y) {
  return empty_output(y, {(y.numel() + 7) / 8}, false, at::kByte);
}

// Registers the same functions for every device there are kernels for: they look where their tensors are.
#if defined(GAN_OPS_CUDA)
#define GAN_OPS_IMPL(m, ...)                        \
  TORCH_LIBRARY_IMPL(gan_ops, CPU, m) __VA_ARGS__   \
  TORCH_LIBRARY_IMPL(gan_ops, CUDA, m) __VA_ARGS__
#else
#define GAN_OPS_IMPL(m, ...) TORCH_LIBRARY_IMPL(gan_ops, CPU, m) __VA_ARGS__
#endif

#if defined(GAN_OPS_CUDA)
// Runs launch(stream) on x's device and its current stream.
template <class Launch>
void on_device_of(const at::Tensor& x, const Launch& launch) {
  const c10::DeviceGuard guard(x.device());
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.device().index(), &stream) == 0, "gan_ops: no CUDA stream");
  const char* error = launch(stream);
  TORCH_CHECK(error == nullptr, "gan_ops: on a GPU: ", error);
}
#endif

}  // namespace gan_ops
