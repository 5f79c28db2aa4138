// upfirdn2d with the filter of the networks in registers, with AVX-512: four weights a, b, b, a per axis, to blur, to halve
// or to double planes of any size.
#pragma once
#include "upfirdn2d_registers.h"

#if defined(REGISTERS)
namespace gan_ops {

// Whichever of the three; is_mirrored and is_doubled tell.
template <class T>
bool has_mirrored_form(const Plan<T>& plan) {
  const Upfirdn2d& call = plan.call;
  return call.separable && (!call.channels_last || call.c % SIXTEEN == 0) &&
         is_symmetric(plan.row_weights) && is_symmetric(plan.column_weights);
}

// A blur, or down by two.
template <class T>
bool is_mirrored(const Plan<T>& plan) {
  const int stride = plan.vertical.stride;
  return plan.vertical.phases == 1 && plan.horizontal.phases == 1 && (stride == 1 || stride == 2) &&
         plan.horizontal.stride == stride;
}

// Lanes BY, BY + 1, ..., of low and then of high. With a mask of all lanes, as gcc 12 warns of its own header without one.
template <int BY>
inline __m512 shifted(__m512 low, __m512 high) {
  return as<__m512>(_mm512_maskz_alignr_epi32(0xffff, as<__m512i>(high), as<__m512i>(low), BY));
}

// Thirty-two neighbors: those at even places to `low`, at odd places to `high`.
inline void split_pairs(__m512& low, __m512& high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 both = low;
  low = _mm512_permutex2var_ps(both, even, high);
  high = _mm512_permutex2var_ps(both, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

// Which of sixteen from x on are at 0 to size - 1.
inline __mmask16 inside(int64_t x, int64_t size) {
  if (x >= 0 && x + SIXTEEN <= size) return 0xffff;
  const auto before = [](int64_t n) { return n <= 0 ? 0u : n >= SIXTEEN ? 0xffffu : (1u << n) - 1; };
  return static_cast<__mmask16>(before(size - x) & ~before(-x));
}

// The weights of both axes.
struct Mirrored {
  __m512 row[2], column[2];

  template <class T>
  explicit Mirrored(const Plan<T>& plan) {
    for (int k = 0; k < 2; k++) {
      row[k] = _mm512_set1_ps(plan.row_weights[k]);
      column[k] = _mm512_set1_ps(plan.column_weights[k]);
    }
  }
};

// NHWC: for BLOCKS times sixteen channels, a walk along a row, on which an output is made of the sums over rows of four
// pixels. Tiles are narrow, so that the four rows of one stay in the first-level cache until the next rows have been made.
template <class T, int STEP, int BLOCKS>
void run_mirrored_nhwc(const Plan<T>& plan, bool streams) {
  const Upfirdn2d& call = plan.call;
  const int64_t tile = std::clamp<int64_t>(1024 / call.c, 8, 32), tiles = (call.horizontal.out + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (tile * call.c));
  at::parallel_for(0, call.n * tiles * call.vertical.out, grain, [&](int64_t unit, int64_t units) {
    const int64_t height = call.vertical.in, width = call.horizontal.in, channels = call.c;
    const int64_t out_height = call.vertical.out, out_width = call.horizontal.out;
    const Mirrored by(plan);
    const Zeros<T> zeros(width * channels);
    for (; unit < units; unit++) {
      const int64_t r = unit % out_height, left = unit / out_height % tiles * tile, image = unit / out_height / tiles;
      const int64_t size = std::min(tile, out_width - left), first = plan.horizontal.first(left);
      // Outputs of the tile from `begin` to `end` add no pixel that is left or right of the image.
      const int64_t begin = std::clamp<int64_t>((2 * STEP - 5 - first) / STEP, 0, size);
      const int64_t end = std::clamp<int64_t>((width - first + STEP - 4) / STEP, begin, size);
      const Rows<T> rows{static_cast<const T*>(call.x) + image * height * width * channels, zeros.data(), height, width * channels};
      const T* from[4];
      for (int k = 0; k < 4; k++) from[k] = rows[plan.vertical.first(r) + k];
      const Sixteens<T> out{plan.writer(((image * out_height + r) * out_width + left) * channels, streams)};
      for (int64_t c = 0; c < channels; c += BLOCKS * SIXTEEN) {
        __m512 sums[4][BLOCKS];
        const auto each = [](const auto& body) {
#pragma GCC unroll 2  // or they would be kept in memory
          for (int b = 0; b < BLOCKS; b++) body(b);
        };
        const auto sum = [&](int64_t x, int k) {
          each([&](int b) {
            const int64_t at = x * channels + c + b * SIXTEEN;
            if (STEP == 1) _mm_prefetch(from[3] + at + width * channels, _MM_HINT_T0);  // what the next row of outputs adds
            sums[k][b] = mirrored(by.row, load16(from[0] + at), load16(from[1] + at), load16(from[2] + at), load16(from[3] + at));
          });
        };
        const auto checked = [&](int64_t x, int k) {
          if (x >= 0 && x < width) sum(x, k);
          else each([&](int b) { sums[k][b] = _mm512_setzero_ps(); });
        };
        const auto walk = [&](int64_t o, int64_t end, const auto& pixel) {
          for (; o < end; o++) {
            for (int k = 0; k + STEP < 4; k++) each([&](int b) { sums[k][b] = sums[k + STEP][b]; });
            for (int k = 4 - STEP; k < 4; k++) pixel(first + o * STEP + k, k);
            each([&](int b) {
              out.put(o * channels + c + b * SIXTEEN, mirrored(by.column, sums[0][b], sums[1][b], sums[2][b], sums[3][b]));
            });
          }
        };
        for (int k = STEP; k < 4; k++) checked(first + k - STEP, k);
        walk(0, begin, checked);
        walk(begin, end, sum);
        walk(end, size, checked);
      }
    }
    fence();
  });
}

// NCHW: sums over rows of sixteen columns, for ROWS rows of outputs at a time, which share rows of inputs; an output takes
// the last sums and those before them, shifted into each other.
template <class T, int STEP, int ROWS = 4 / STEP>
void run_mirrored_nchw(const Plan<T>& plan, bool streams) {
  constexpr int LOADS = ROWS * STEP + 4 - STEP;
  const Upfirdn2d& call = plan.call;
  const int64_t groups = (call.vertical.out + ROWS - 1) / ROWS;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (ROWS * call.horizontal.out));
  at::parallel_for(0, call.n * call.c * groups, grain, [&](int64_t unit, int64_t units) {
    const int64_t height = call.vertical.in, width = call.horizontal.in, left = plan.horizontal.first(0);
    const int64_t out_height = call.vertical.out, out_width = call.horizontal.out;
    const Mirrored by(plan);
    const Zeros<T> zeros(width);
    for (; unit < units; unit++) {
      const int64_t plane = unit / groups, begin = unit % groups * ROWS;
      const int rows_left = static_cast<int>(std::min<int64_t>(ROWS, out_height - begin));
      const Rows<T> rows{static_cast<const T*>(call.x) + plane * height * width, zeros.data(), height, width};
      const T* from[LOADS];
      for (int k = 0; k < LOADS; k++) from[k] = rows[plan.vertical.first(begin) + k];
      const Sixteens<T> out{plan.writer((plane * out_height + begin) * out_width, streams)};

      // The sums over rows of the sixteen columns from x on.
      const auto sum = [&](int64_t x, __m512 (&sums)[ROWS]) {
        __m512 loaded[LOADS];
        const __mmask16 which = inside(x, width);
        for (int k = 0; k < LOADS; k++) loaded[k] = load16(from[k] + x, which);
        // What the next rows of outputs add.
        for (int k = LOADS - ROWS * STEP; k < LOADS; k++) _mm_prefetch(from[k] + x + ROWS * STEP * width, _MM_HINT_T0);
        for (int q = 0; q < ROWS; q++) {
          const __m512* const four = loaded + q * STEP;
          sums[q] = mirrored(by.row, four[0], four[1], four[2], four[3]);
        }
      };
      // `whole`: there is room for all sixteen.
      const auto put = [&](auto whole, int64_t o, int q, __m512 sum) {
        if (q >= rows_left) return;
        if constexpr (whole()) out.put(q * out_width + o, sum);
        else out.put(q * out_width + o, sum, out_width - o);
      };
      const auto walk = [&](const auto& step) {
        int64_t o = 0;
        for (; o + SIXTEEN <= out_width; o += SIXTEEN) step(std::true_type(), o);
        if (o < out_width) step(std::false_type(), o);
      };

      if constexpr (STEP == 1) {
        __m512 now[ROWS], next[ROWS];
        sum(left, now);
        walk([&](auto whole, int64_t o) {
          sum(left + o + SIXTEEN, next);
#pragma GCC unroll 4  // or they would be kept in memory
          for (int q = 0; q < ROWS; q++) {
            put(whole, o, q, mirrored(by.column, now[q], shifted<1>(now[q], next[q]), shifted<2>(now[q], next[q]), shifted<3>(now[q], next[q])));
            now[q] = next[q];
          }
        });
      } else {
        __m512 even[ROWS], odd[ROWS], next_even[ROWS], next_odd[ROWS];
        const auto split = [&](int64_t x, __m512 (&evens)[ROWS], __m512 (&odds)[ROWS]) {
          sum(x, evens), sum(x + SIXTEEN, odds);
          for (int q = 0; q < ROWS; q++) split_pairs(evens[q], odds[q]);
        };
        split(left, even, odd);
        walk([&](auto whole, int64_t o) {
          split(left + 2 * (o + SIXTEEN), next_even, next_odd);
#pragma GCC unroll 4
          for (int q = 0; q < ROWS; q++) {
            put(whole, o, q, mirrored(by.column, even[q], odd[q], shifted<1>(even[q], next_even[q]), shifted<1>(odd[q], next_odd[q])));
            even[q] = next_even[q], odd[q] = next_odd[q];
          }
        });
      }
    }
    fence();
  });
}

template <class T, int STEP>
void run_mirrored(const Plan<T>& plan, bool streams) {
  if (!plan.call.channels_last) run_mirrored_nchw<T, STEP>(plan, streams);
  else if (plan.call.c % (2 * SIXTEEN) == 0) run_mirrored_nhwc<T, STEP, 2>(plan, streams);
  else run_mirrored_nhwc<T, STEP, 1>(plan, streams);
}

template <class T>
void run_mirrored(const Plan<T>& plan, bool streams) {
  if (plan.vertical.stride == 1) run_mirrored<T, 1>(plan, streams);
  else run_mirrored<T, 2>(plan, streams);
}

// Doubling: an even output is a of the input before it and b of its own, an odd one b of its own and a of the next.
template <class T>
bool is_doubled(const Plan<T>& plan) {
  const auto fits = [](const Polyphase& axis) {
    return axis.phases == 2 && axis.stride == 1 && axis.axis.out % 2 == 0 && axis.first(1) == axis.first(0) + 1;
  };
  return fits(plan.vertical) && fits(plan.horizontal);
}

struct Pair {  // of neighboring outputs
  __m512 even, odd;
};

// `most`: the own input's product.
inline Pair doubled(const __m512* weights, __m512 before, __m512 after, __m512 most) {
  return {_mm512_fmadd_ps(weights[0], before, most), _mm512_fmadd_ps(weights[0], after, most)};
}

// NHWC: for each sixteen channels, a walk along two rows of outputs, two pixels of each at a time.
template <class T>
void run_doubled_nhwc(const Plan<T>& plan, bool streams) {
  const Upfirdn2d& call = plan.call;
  const int64_t pairs = call.horizontal.out / 2, row_pairs = call.vertical.out / 2;
  const int64_t tile = std::clamp<int64_t>(1024 / call.c, 8, 32), tiles = (pairs + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (4 * tile * call.c));
  at::parallel_for(0, call.n * tiles * row_pairs, grain, [&](int64_t unit, int64_t units) {
    const int64_t height = call.vertical.in, width = call.horizontal.in, channels = call.c, pitch = 2 * pairs * channels;
    const Mirrored by(plan);
    const Zeros<T> zeros(width * channels);
    for (; unit < units; unit++) {
      const int64_t r = unit % row_pairs, left = unit / row_pairs % tiles * tile, image = unit / row_pairs / tiles;
      const int64_t size = std::min(tile, pairs - left), own = plan.horizontal.first(1) + left;
      const Rows<T> rows{static_cast<const T*>(call.x) + image * height * width * channels, zeros.data(), height, width * channels};
      const T* from[3];
      for (int k = 0; k < 3; k++) from[k] = rows[plan.vertical.first(0) + r + k];
      const Sixteens<T> out{plan.writer((image * row_pairs + r) * 2 * pitch + 2 * left * channels, streams)};
      for (int64_t c = 0; c < channels; c += SIXTEEN) {
        const auto sums = [&](int64_t x) {
          if (x < 0 || x >= width) return Pair{_mm512_setzero_ps(), _mm512_setzero_ps()};
          const int64_t at = x * channels + c;
          return doubled(by.row, load16(from[0] + at), load16(from[2] + at), _mm512_mul_ps(by.row[1], load16(from[1] + at)));
        };
        Pair before = sums(own - 1), now = sums(own);
        for (int64_t o = 0; o < size; o++) {
          const Pair after = sums(own + o + 1);
          const Pair upper = doubled(by.column, before.even, after.even, _mm512_mul_ps(by.column[1], now.even));
          const Pair lower = doubled(by.column, before.odd, after.odd, _mm512_mul_ps(by.column[1], now.odd));
          const int64_t at = 2 * o * channels + c;
          out.put(at, upper.even);
          out.put(at + channels, upper.odd);
          out.put(at + pitch, lower.even);
          out.put(at + pitch + channels, lower.odd);
          before = now, now = after;
        }
      }
    }
    fence();
  });
}

// Even and odd outputs to thirty-two neighbors.
inline Pair interleaved(const Pair& pair) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(pair.even, low, pair.odd),
          _mm512_permutex2var_ps(pair.even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), pair.odd)};
}

// NCHW: sixteen columns of three rows of inputs make thirty-two of two rows of outputs.
template <class T>
void run_doubled_nchw(const Plan<T>& plan, bool streams) {
  const Upfirdn2d& call = plan.call;
  const int64_t row_pairs = call.vertical.out / 2, grain = std::max<int64_t>(1, GRAIN / (2 * call.horizontal.out));
  at::parallel_for(0, call.n * call.c * row_pairs, grain, [&](int64_t unit, int64_t units) {
    const int64_t height = call.vertical.in, width = call.horizontal.in, out_width = call.horizontal.out;
    const int64_t own = plan.horizontal.first(1);
    const Mirrored by(plan);
    const Zeros<T> zeros(width);
    for (; unit < units; unit++) {
      const int64_t plane = unit / row_pairs, r = unit % row_pairs;
      const Rows<T> rows{static_cast<const T*>(call.x) + plane * height * width, zeros.data(), height, width};
      const T* from[3];
      for (int k = 0; k < 3; k++) from[k] = rows[plan.vertical.first(0) + r + k];
      const Sixteens<T> out{plan.writer(unit * 2 * out_width, streams)};
      const auto sums = [&](int64_t x) {
        const __mmask16 which = inside(x, width);
        const __m512 most = _mm512_mul_ps(by.row[1], load16(from[1] + x, which));
        return doubled(by.row, load16(from[0] + x, which), load16(from[2] + x, which), most);
      };
      // `whole`: there is room for all thirty-two.
      const auto put = [&](auto whole, int64_t at, int64_t left, __m512 before, __m512 now, __m512 after) {
        const __m512 most = _mm512_mul_ps(by.column[1], now);
        const Pair pair = interleaved(doubled(by.column, shifted<15>(before, now), shifted<1>(now, after), most));
        if constexpr (whole()) {
          out.put(at, pair.even), out.put(at + SIXTEEN, pair.odd);
        } else {
          out.put(at, pair.even, left);
          if (left > SIXTEEN) out.put(at + SIXTEEN, pair.odd, left - SIXTEEN);
        }
      };
      Pair before = sums(own - SIXTEEN), now = sums(own);
      const auto step = [&](auto whole, int64_t o) {
        const Pair after = sums(own + o / 2 + SIXTEEN);
        put(whole, o, out_width - o, before.even, now.even, after.even);
        put(whole, o + out_width, out_width - o, before.odd, now.odd, after.odd);
        before = now, now = after;
      };
      int64_t o = 0;
      for (; o + 2 * SIXTEEN <= out_width; o += 2 * SIXTEEN) step(std::true_type(), o);
      if (o < out_width) step(std::false_type(), o);
    }
    fence();
  });
}

template <class T>
void run_doubled(const Plan<T>& plan, bool streams) {
  plan.call.channels_last ? run_doubled_nhwc(plan, streams) : run_doubled_nchw(plan, streams);
}

}  // namespace gan_ops
#endif
