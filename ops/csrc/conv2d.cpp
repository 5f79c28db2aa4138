// The kernels of conv2d.py once more, for every device: a call of PyTorch's library, without the cost of Python around it.
#include <ATen/ops/as_strided.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/mm.h>

#include "binding.h"

namespace gan_ops {
namespace {

constexpr std::array<int64_t, 2> ONE{1, 1}, ZERO{0, 0};

bool reads_as_channels_last(const at::Tensor& x) { return x.is_contiguous(at::MemoryFormat::ChannelsLast); }

// Is this a matrix product over the pixels of a channels_last tensor?
bool is_product(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef padding, int64_t groups) {
  return kernel == ONE && padding == ZERO && groups == 1 && reads_as_channels_last(x);
}

// [N, C, H, W] in channels_last -> [N * H * W, C], or transposed; a view.
at::Tensor rows(const at::Tensor& x, bool transposed = false) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3), c = x.size(1);
  return transposed ? x.as_strided({c, pixels}, {1, c}) : x.as_strided({pixels, c}, {c, 1});
}

// [O, C, 1, 1] -> [O, C], or transposed; a view.
at::Tensor matrix(const at::Tensor& weight, bool transposed = false) {
  const int first = transposed, second = !transposed;
  return weight.as_strided({weight.size(first), weight.size(second)}, {weight.stride(first), weight.stride(second)});
}

// [N * H * W, C] -> [N, C, H, W] in channels_last; a view.
at::Tensor planes(const at::Tensor& rows, int64_t n, at::IntArrayRef size) {
  const int64_t c = rows.size(1), h = size[0], w = size[1];
  return rows.as_strided({n, c, h, w}, {h * w * c, 1, w * c, c});
}

// One of the gradients by an x and a weight, of which that one's numbers are not read.
at::Tensor gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding,
                    int64_t groups, bool by_x) {
  const auto both =
      at::convolution_backward(dy, x, weight, {}, ONE, padding, ONE, false, ZERO, groups, {by_x, !by_x, false});
  return dense(by_x ? std::get<0>(both) : std::get<1>(both), reads_as_channels_last(dy));
}

at::Tensor placeholder(const at::Tensor& dy, at::IntArrayRef sizes) {
  return empty_output(dy, sizes, reads_as_channels_last(dy), dy.scalar_type());
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding, int64_t groups) {
  if (is_product(x, weight.sizes().slice(2), padding, groups))
    return planes(at::mm(rows(x), matrix(weight, true)), x.size(0), x.sizes().slice(2));
  const at::Tensor y = at::convolution(x, weight, {}, ONE, padding, ONE, false, ZERO, groups);
  return dense(y, reads_as_channels_last(x));
}

at::Tensor conv2d_input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef size,
                                 at::IntArrayRef padding, int64_t groups) {
  if (is_product(dy, weight.sizes().slice(2), padding, groups))
    return planes(at::mm(rows(dy), matrix(weight)), dy.size(0), size);
  const at::Tensor x = placeholder(dy, {dy.size(0), weight.size(1) * groups, size[0], size[1]});
  return gradient(dy, x, weight, padding, groups, true);
}

at::Tensor conv2d_weight_gradient(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef kernel,
                                  at::IntArrayRef padding, int64_t groups) {
  if (is_product(dy, kernel, padding, groups))
    return planes(at::mm(rows(dy, true), rows(dense(x, true))), dy.size(1), kernel);
  const at::Tensor weight = placeholder(dy, {dy.size(1), x.size(1) / groups, kernel[0], kernel[1]});
  return gradient(dy, x, weight, padding, groups, false);
}

}  // namespace
}  // namespace gan_ops

GAN_OPS_IMPL(m, {
  m.impl("conv2d", &gan_ops::conv2d);
  m.impl("conv2d_input_gradient", &gan_ops::conv2d_input_gradient);
  m.impl("conv2d_weight_gradient", &gan_ops::conv2d_weight_gradient);
})
