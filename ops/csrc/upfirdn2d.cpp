// upfirdn2d on the CPU. An output pixel is a sum over at most ceil(taps / up) inputs per axis, with weights that repeat:
// the polyphase form, in which no inserted zero is ever multiplied. upfirdn2d_lines.h has the kernels for everything,
// upfirdn2d_registers.h and upfirdn2d_mirrored.h faster ones for what is most common, where there is AVX-512.
#include "upfirdn2d.h"

#include <ATen/core/Tensor.h>

#include "binding.h"
#include "upfirdn2d_lines.h"
#include "upfirdn2d_mirrored.h"
#include "upfirdn2d_registers.h"

namespace gan_ops {
namespace {

template <class T>
void run(const Upfirdn2d& call) {
  const Plan<T> plan(call);
  const int64_t row = call.channels_last ? call.c : call.horizontal.out;
  // Several rows are written in turns, and from several more is read: the cache is of less help than to a single run.
  const int64_t bytes = call.n * call.c * call.vertical.out * call.horizontal.out * sizeof(T);
  const bool streams = 2 * bytes >= STREAM_BYTES && row % LANES == 0;
#if defined(REGISTERS)
  if constexpr (std::is_same_v<T, float>)
    if (is_small(plan)) return run_small(plan);
  if constexpr (!std::is_same_v<T, double>)
    if (has_mirrored_form(plan)) {
      if (is_mirrored(plan)) return run_mirrored(plan, streams);
      if (is_doubled(plan)) return run_doubled(plan, streams);
    }
#endif
  if (call.channels_last) run_nhwc(plan, streams);
  else run_nchw(plan, streams);
}

Axis axis_of(int64_t in, int64_t up, int64_t down, int64_t before, int64_t after, int64_t taps) {
  const int64_t out = (in * up + before + after - taps) / down + 1;
  return {in, out, static_cast<int>(up), static_cast<int>(down), static_cast<int>(taps), before};
}

at::Tensor upfirdn2d(const at::Tensor& input, const at::Tensor& filter, at::IntArrayRef up, at::IntArrayRef down,
                     at::IntArrayRef padding, bool flip, double gain) {
  const bool channels_last = is_channels_last(input);
  const at::Tensor x = dense(input, channels_last);
  const auto precision = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor taps = (filter.scalar_type() == precision ? filter : filter.to(precision)).contiguous();
  Upfirdn2d call{type_of(x), channels_last, x.size(0), x.size(1)};
  call.vertical = axis_of(x.size(2), up[0], down[0], padding[0], padding[1], taps.size(0));
  call.horizontal = axis_of(x.size(3), up[1], down[1], padding[2], padding[3], taps.size(-1));
  const at::Tensor y = empty_output(x, {x.size(0), x.size(1), call.vertical.out, call.horizontal.out}, channels_last, x.scalar_type());
  call.x = x.const_data_ptr();
  call.filter = taps.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.separable = taps.dim() == 1;
  call.flip = flip;
  call.gain = gain;
#if defined(GAN_OPS_CUDA)
  if (x.is_cuda()) {
    on_device_of(x, [&](void* stream) { return upfirdn2d_cuda(call, stream); });
    return y;
  }
#endif
  dispatch(call.type, [&](auto element) { run<decltype(element)>(call); });
  return y;
}

}  // namespace
}  // namespace gan_ops

GAN_OPS_IMPL(m, { m.impl("upfirdn2d", &gan_ops::upfirdn2d); })
