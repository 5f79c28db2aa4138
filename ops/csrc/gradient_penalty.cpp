// The per-sample maps of gradient_penalty on the CPU. A sample is cut into chunks at fixed places: the sums do not depend
// on the number of threads.
#include "gradient_penalty.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "binding.h"
#include "cpu.h"

namespace gan_ops {
namespace {

constexpr int64_t CHUNK = 32 << 10;  // elements: what is worth a thread, and what is summed at a time

template <class T>
double dot(const T* a, const T* b, int64_t size) {
  const auto product = [&](int64_t i) {
    return __builtin_convertvector(load(a + i), V<double>) * __builtin_convertvector(load(b + i), V<double>);
  };
  V<double> sum[4] = {};  // four, since an addition takes four cycles
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; j++) sum[j] += product(i + j * LANES);
  const V<double> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double result = 0;
  for (; i < size; i++) result += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (int lane = 0; lane < LANES; lane++) result += total[lane];
  return result;
}

// Calls body(sample, begin, end) for chunks of elements, in parallel.
template <class Body>
void for_chunks(const Samples& call, const Body& body) {
  const int64_t chunks = (call.size + CHUNK - 1) / CHUNK;
  at::parallel_for(0, call.n * chunks, std::max<int64_t>(1, CHUNK / call.size), [&](int64_t unit, int64_t units) {
    for (; unit < units; unit++) {
      const int64_t begin = unit % chunks * CHUNK;
      body(unit / chunks, begin, std::min(begin + CHUNK, call.size));
    }
    fence();
  });
}

template <class T>
void sample_dot_cpu(const Samples& call) {
  const int64_t chunks = (call.size + CHUNK - 1) / CHUNK;
  std::vector<double> partial(call.n * chunks);
  for_chunks(call, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t at = sample * call.size + begin;
    const T *a = static_cast<const T*>(call.a) + at, *b = static_cast<const T*>(call.b) + at;
    partial[sample * chunks + begin / CHUNK] = dot(a, b, end - begin);
  });
  for (int64_t i = 0; i < call.n; i++) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) total += partial[i * chunks + chunk];
    static_cast<Accumulator<T>*>(call.y)[i] = total;
  }
}

// y = weight * a, or if there is a b, weight * a + (1 - weight) * b, with the weight of the sample.
template <class T>
void sample_map_cpu(const Samples& call) {
  using A = Accumulator<T>;
  const T *a = static_cast<const T*>(call.a), *b = static_cast<const T*>(call.b);
  const bool streams = call.size % LANES == 0 && call.n * call.size * int64_t(sizeof(T)) > STREAM_BYTES;
  const Writer<T> y{static_cast<T*>(call.y), streams};
  for_chunks(call, [&](int64_t sample, int64_t begin, int64_t end) {
    const A weight = static_cast<const A*>(call.weight)[sample];
    const auto value = [&](int64_t i, auto... n) {
      return b ? weight * load(a + i, n...) + (1 - weight) * load(b + i, n...) : weight * load(a + i, n...);
    };
    int64_t i = sample * call.size + begin;
    end += sample * call.size;
    for (; i + LANES <= end; i += LANES) y.put(i, value(i));
    if (i < end) y.put(i, value(i, end - i), end - i);
  });
}

struct Operands {
  at::Tensor a, b, weight;
  Samples call;

  // b and weight may be undefined. a and b get the same memory order.
  Operands(const at::Tensor& first, const at::Tensor& second, const at::Tensor& weights)
      : a(dense(first, is_channels_last(first))), call{type_of(first), first.size(0), first.numel() / first.size(0), a.const_data_ptr()} {
    if (second.defined()) b = dense(second, is_channels_last(first));
    if (weights.defined()) weight = weights.contiguous();
    call.b = b.defined() ? b.const_data_ptr() : nullptr;
    call.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  }

  at::ScalarType wide() const { return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
};

at::Tensor dot_of(Operands operands) {
  Samples& call = operands.call;
  const at::Tensor y = at::empty({call.n}, operands.a.options().dtype(operands.wide()));
  call.y = y.mutable_data_ptr();
#if defined(GAN_OPS_CUDA)
  if (y.is_cuda()) {
    const at::Tensor workspace = at::empty({sample_dot_cuda_workspace(call)}, y.options().dtype(at::kByte));
    call.workspace = workspace.mutable_data_ptr();
    on_device_of(y, [&](void* stream) { return sample_dot_cuda(call, stream); });
    return y;
  }
#endif
  dispatch(call.type, [&](auto element) { sample_dot_cpu<decltype(element)>(call); });
  return y;
}

at::Tensor sample_squared_norm(const at::Tensor& x) {
  Operands operands(x, {}, {});
  operands.call.b = operands.call.a;
  return dot_of(operands);
}

at::Tensor sample_dot(const at::Tensor& a, const at::Tensor& b) { return dot_of(Operands(a, b, {})); }

at::Tensor map_of(Operands operands) {
  Samples& call = operands.call;
  const at::Tensor y = empty_output(operands.a, is_channels_last(operands.a));
  call.y = y.mutable_data_ptr();
#if defined(GAN_OPS_CUDA)
  if (y.is_cuda()) {
    on_device_of(y, [&](void* stream) { return call.b ? sample_lerp_cuda(call, stream) : sample_scale_cuda(call, stream); });
    return y;
  }
#endif
  dispatch(call.type, [&](auto element) { sample_map_cpu<decltype(element)>(call); });
  return y;
}

at::Tensor sample_scale(const at::Tensor& x, const at::Tensor& weight) { return map_of(Operands(x, {}, weight)); }

at::Tensor sample_lerp(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weight) {
  return map_of(Operands(a, b, weight));
}

}  // namespace
}  // namespace gan_ops

GAN_OPS_IMPL(m, {
  m.impl("sample_squared_norm", &gan_ops::sample_squared_norm);
  m.impl("sample_dot", &gan_ops::sample_dot);
  m.impl("sample_scale", &gan_ops::sample_scale);
  m.impl("sample_lerp", &gan_ops::sample_lerp);
})
