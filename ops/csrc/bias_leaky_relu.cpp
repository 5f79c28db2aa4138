// bias + leaky ReLU on the CPU: one pass forward, and one backward that takes the bias gradient along. Sums are cut at
// places that do not depend on the number of threads, so neither does the result.
#include "bias_leaky_relu.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "binding.h"
#include "cpu.h"

namespace gan_ops {
namespace {

constexpr int64_t GRAIN = 32 << 10;  // elements that are worth a thread
constexpr int64_t CHUNK = 16 << 10;  // elements that are summed at a time
constexpr int64_t FLUSH = 64;        // additions in float before the sum goes on in double

template <class A>
struct Activated {
  V<A> y;
  uint8_t bits;  // bit i: was number i positive?
};

// leaky_relu(v) * gain, in the order of operations that torch has.
inline Activated<float> leaky_relu(V<float> v, float slope, float gain) {
#if defined(__AVX512VL__)
  const __m256 x = as<__m256>(v);
  const __mmask8 rest = _mm256_cmp_ps_mask(x, _mm256_setzero_ps(), _CMP_NGT_UQ);
  const __m256 y = _mm256_mask_mul_ps(x, rest, x, _mm256_set1_ps(slope));
  return {as<V<float>>(_mm256_mul_ps(y, _mm256_set1_ps(gain))), static_cast<uint8_t>(~rest)};
#elif defined(__AVX__)
  const __m256 x = as<__m256>(v), above = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ);
  const __m256 y = _mm256_blendv_ps(_mm256_mul_ps(x, _mm256_set1_ps(slope)), x, above);
  return {as<V<float>>(_mm256_mul_ps(y, _mm256_set1_ps(gain))), static_cast<uint8_t>(_mm256_movemask_ps(above))};
#else
  uint8_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (v[i] > 0) << i;
  return {(v > 0 ? v : v * slope) * gain, bits};
#endif
}

inline Activated<double> leaky_relu(V<double> v, double slope, double gain) {
  uint8_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (v[i] > 0) << i;
  return {(v > 0 ? v : v * slope) * gain, bits};
}

// The same of sixteen, and their bits to bits[0] and bits[1].
template <class A>
ALWAYS_INLINE V16<A> leaky_relu(const V16<A>& v, A slope, A gain, uint8_t* bits) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    const __m512 x = as<__m512>(v);
    const __mmask16 rest = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NGT_UQ);
    const auto above = static_cast<uint16_t>(~rest);
    std::memcpy(bits, &above, 2);
    return as<V16<A>>(_mm512_mul_ps(_mm512_mask_mul_ps(x, rest, x, _mm512_set1_ps(slope)), _mm512_set1_ps(gain)));
  }
#endif
  const Activated<A> low = leaky_relu(low_half<A>(v), slope, gain), high = leaky_relu(high_half<A>(v), slope, gain);
  bits[0] = low.bits;
  bits[1] = high.bits;
  return join<A>(low.y, high.y);
}

template <class T>
struct Forward {
  using A = Accumulator<T>;
  const T* x;
  Writer<T> y;
  uint8_t* bits;
  A slope, gain;

  inline void group(int64_t i, V<A> bias) const {
    const Activated<A> activated = leaky_relu(load(x + i) + bias, slope, gain);
    bits[i / LANES] = activated.bits;
    y.put(i, activated.y);
  }

  inline void two_groups(int64_t i, const V16<A>& bias) const {
    y.put(i, leaky_relu<A>(load_two(x + i) + bias, slope, gain, bits + i / LANES));
  }

  // n elements from i on, of [channels][inner], each with its own bias.
  void ragged_group(int64_t i, int64_t n, const std::vector<A>& bias, int64_t inner) const {
    V<A> v = load(x + i, n);
    for (int64_t lane = 0; lane < n; lane++) v[lane] += bias[(i + lane) / inner % bias.size()];
    const Activated<A> activated = leaky_relu(v, slope, gain);
    bits[i / LANES] = activated.bits & ((1 << n) - 1);
    y.put(i, activated.y, n);
  }
};

template <class T>
void forward(const BiasLeakyRelu& call) {
  using A = Accumulator<T>;
  const int64_t size = call.outer * call.channels * call.inner;
  const bool streams = size * int64_t(sizeof(T)) > STREAM_BYTES;
  const Forward<T> to{static_cast<const T*>(call.x), {static_cast<T*>(call.y), streams}, call.bits, A(call.slope),
                      A(call.gain)};
  std::vector<A> bias(call.channels, A(0));
  if (call.bias)
    for (int64_t c = 0; c < call.channels; c++) bias[c] = static_cast<const T*>(call.bias)[c];
  std::vector<A> cycle(bias);  // wherever a group begins, its eight biases are neighbors here
  for (int64_t i = 0; i < 2 * LANES; i++) cycle.push_back(bias[i % call.channels]);

  at::parallel_for(0, size / LANES, GRAIN / LANES, [&](int64_t first, int64_t last) {
    const int64_t end = last * LANES, channels = call.channels, inner = call.inner;
    const Forward<T> own(to);  // for all the compiler knows, bits are written over what is not in this function
    const A* const biases = cycle.data();
    int64_t i = first * LANES;
    if (inner == 1)
      for (int64_t c = i % channels; i + 2 * LANES <= end;) {
        for (; c < channels && i + 2 * LANES <= end; c += 2 * LANES, i += 2 * LANES) own.two_groups(i, load_two(biases + c));
        while (c >= channels) c -= channels;
      }
    int64_t plane = i / inner, c = plane % channels;
    while (i < end) {
      const int64_t stop = std::min((plane + 1) * inner, end);
      const V<A> shift = V<A>{} + biases[c];
      for (const V16<A> shifts = join<A>(shift, shift); i + 2 * LANES <= stop; i += 2 * LANES) own.two_groups(i, shifts);
      if (i + LANES <= stop) own.group(i, shift), i += LANES;
      if (i < stop) {  // this group goes on into the next plane, or several
        own.ragged_group(i, LANES, bias, inner), i += LANES;
        plane = i / inner, c = plane % channels;
      } else {
        plane++, c = c + 1 < channels ? c + 1 : 0;
      }
    }
    fence();
  });
  if (const int64_t rest = size % LANES) to.ragged_group(size - rest, rest, bias, call.inner);
}

template <class T>
struct Backward {
  using A = Accumulator<T>;
  using Mask = typename Vector<std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>>::type;
  const T* dy;
  Writer<T> dx;
  const uint8_t* bits;
  int64_t size;
  A slope, gain;

  // Elements [i, i + n): writes dx and returns it. A plane of an odd size begins in the middle of a byte.
  inline V<A> group(int64_t i, int64_t n = LANES) const {
    const int64_t byte = i / LANES;
    const int shift = i % LANES;
    unsigned eight = bits[byte] >> shift;
    if (shift && (byte + 1) * LANES < size) eight |= bits[byte + 1] << (LANES - shift);
    const V<A> v = n < LANES ? load(dy + i, n) : load(dy + i);
    const Mask each = {1, 2, 4, 8, 16, 32, 64, 128};
    const V<A> result = (((each & int(eight)) != 0) ? v : v * slope) * gain;
    dx.put(i, result, n);
    return result;
  }
};

// One number per plane, in chunks that are summed apart.
template <class T>
void backward_planes(const BiasLeakyRelu& call, const Backward<T>& to, std::vector<double>& sums) {
  using A = Accumulator<T>;
  const int64_t chunks = (call.inner + CHUNK - 1) / CHUNK, units = call.outer * call.channels * chunks;
  std::vector<double> partial(units);
  at::parallel_for(0, units, std::max<int64_t>(1, GRAIN / std::min(call.inner, CHUNK)), [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; unit++) {
      int64_t i = unit / chunks * call.inner + unit % chunks * CHUNK;
      const int64_t end = std::min(i + CHUNK, (unit / chunks + 1) * call.inner);
      double total = 0;
      while (i < end) {
        V<A> sum = {};
        const int64_t stop = std::min(i + FLUSH * LANES, end);
        for (; i + LANES <= stop; i += LANES) sum += to.group(i);
        if (i < stop) sum += to.group(i, stop - i), i = stop;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
      }
      partial[unit] = total;
    }
    fence();
  });
  for (int64_t unit = 0; unit < units; unit++) sums[unit / chunks % call.channels] += partial[unit];
}

// One number per channel of neighboring channels, in chunks of pixels that are summed apart.
template <class T>
void backward_pixels(const BiasLeakyRelu& call, const Backward<T>& to, std::vector<double>& sums) {
  using A = Accumulator<T>;
  const int64_t channels = call.channels, rows = std::max<int64_t>(1, CHUNK / channels);
  const int64_t units = (call.outer + rows - 1) / rows;
  std::vector<double> partial(units * channels);
  at::parallel_for(0, units, std::max<int64_t>(1, GRAIN / CHUNK), [&](int64_t first, int64_t last) {
    std::vector<A> sum(channels + LANES);
    for (int64_t unit = first; unit < last; unit++) {
      const int64_t end = std::min((unit + 1) * rows, call.outer);
      for (int64_t row = unit * rows; row < end;) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (const int64_t stop = std::min(row + FLUSH, end); row < stop; row++) {
          int64_t c = 0;
          for (; c + LANES <= channels; c += LANES) store(&sum[c], load(&sum[c]) + to.group(row * channels + c));
          if (c < channels) store(&sum[c], load(&sum[c]) + to.group(row * channels + c, channels - c));
        }
        for (int64_t c = 0; c < channels; c++) partial[unit * channels + c] += sum[c];
      }
    }
    fence();
  });
  for (int64_t i = 0; i < units * channels; i++) sums[i % channels] += partial[i];
}

template <class T>
void backward(const BiasLeakyRelu& call) {
  using A = Accumulator<T>;
  const int64_t size = call.outer * call.channels * call.inner;
  const bool aligned = (call.inner == 1 ? call.channels : call.inner) % LANES == 0;
  const bool streams = aligned && size * int64_t(sizeof(T)) > STREAM_BYTES;
  const Backward<T> to{static_cast<const T*>(call.x), {static_cast<T*>(call.y), streams}, call.bits, size, A(call.slope),
                       A(call.gain)};
  std::vector<double> sums(call.channels);
  call.inner == 1 ? backward_pixels(call, to, sums) : backward_planes(call, to, sums);
  if (call.dbias)
    for (int64_t c = 0; c < call.channels; c++) static_cast<T*>(call.dbias)[c] = static_cast<T>(sums[c]);
}

BiasLeakyRelu call_of(const at::Tensor& x, const at::Tensor& y, bool channels_last, const void* bias, uint8_t* bits,
                      double slope, double gain) {
  const int64_t inner = channels_last ? 1 : x.numel() / (x.size(0) * x.size(1));
  const int64_t outer = x.numel() / (x.size(1) * inner);
  return {type_of(x), outer, x.size(1), inner, x.const_data_ptr(), y.mutable_data_ptr(), bias, bits, slope, gain};
}

std::tuple<at::Tensor, at::Tensor> bias_leaky_relu(const at::Tensor& input, const std::optional<at::Tensor>& bias,
                                                   double slope, double gain) {
  const bool channels_last = is_channels_last(input);
  const at::Tensor x = dense(input, channels_last), y = empty_output(x, channels_last), bits = empty_bits(y);
  const at::Tensor shift = bias ? bias->contiguous() : at::Tensor();
  const void* const biases = bias ? shift.const_data_ptr() : nullptr;
  const BiasLeakyRelu call = call_of(x, y, channels_last, biases, bits.mutable_data_ptr<uint8_t>(), slope, gain);
#if defined(GAN_OPS_CUDA)
  if (x.is_cuda()) {
    on_device_of(x, [&](void* stream) { return bias_leaky_relu_cuda(call, stream); });
    return {y, bits};
  }
#endif
  dispatch(call.type, [&](auto element) { forward<decltype(element)>(call); });
  return {y, bits};
}

std::tuple<at::Tensor, at::Tensor> bias_leaky_relu_backward(const at::Tensor& gradient, const at::Tensor& bits,
                                                            bool channels_last, bool with_bias, double slope, double gain) {
  const at::Tensor dy = dense(gradient, channels_last), dx = empty_output(dy, channels_last);
  const at::Tensor dbias = at::empty({with_bias ? dy.size(1) : 0}, dy.options());
  uint8_t* const packed = const_cast<uint8_t*>(bits.const_data_ptr<uint8_t>());  // read only: BiasLeakyRelu serves both ways
  BiasLeakyRelu call = call_of(dy, dx, channels_last, nullptr, packed, slope, gain);
  call.dbias = with_bias ? dbias.mutable_data_ptr() : nullptr;
#if defined(GAN_OPS_CUDA)
  if (dy.is_cuda()) {
    const at::Tensor workspace = at::empty({with_bias ? bias_leaky_relu_cuda_workspace(call) : 0}, bits.options());
    call.workspace = workspace.mutable_data_ptr();
    on_device_of(dy, [&](void* stream) { return bias_leaky_relu_backward_cuda(call, stream); });
    return {dx, dbias};
  }
#endif
  dispatch(call.type, [&](auto element) { backward<decltype(element)>(call); });
  return {dx, dbias};
}

}  // namespace
}  // namespace gan_ops

GAN_OPS_IMPL(m, {
  m.impl("bias_leaky_relu", &gan_ops::bias_leaky_relu);
  m.impl("bias_leaky_relu_backward", &gan_ops::bias_leaky_relu_backward);
})
