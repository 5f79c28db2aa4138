// Three kernels. Two for the resamplings of networks (square, separable, up or down by 1 or 2), which must move each
// byte once at the speed of memory: a thread filters rows horizontally as they come and keeps the last few in registers
// for the vertical filter, so that a pass costs 2 * taps multiplications per output and its intermediate touches no
// memory. And one for everything else: a thread per output, all taps.
//
// NCHW (planes_kernel): 16-byte loads cannot start where an output's window starts, so a tile of input goes through
// shared memory: aligned loads in, windows of words out, one barrier, and enough blocks per multiprocessor (26 kB each)
// for some to load while others compute. A word in five is left free, or one in three, so that the strided reads of
// windows are spread over the banks. The halo costs 1.05 to 1.2 times the reads, but of L2 and not of DRAM.
//
// NHWC (channels_last_kernel): a thread has 16 bytes of channels and two columns; every load is aligned and coalesced,
// and neighbors find the overlap of their windows in L1. No shared memory, no barrier; the next row is in flight while
// the last is worked on.
#include "upfirdn2d.h"

#include <algorithm>
#include <cstdlib>

#include "common.cuh"

namespace gan_ops {
namespace {

// The same resampling of both axes. Output o meets tap t in input (o * DOWN + t - pad) / UP where that is whole. OFFSET
// is o * DOWN - pad - UP * (the first input it may meet) for the outputs that are multiples of UP.
template <int UP_, int DOWN_, int TAPS_, int OFFSET_>
struct Resampling {
  static constexpr int UP = UP_, DOWN = DOWN_, TAPS = TAPS_, OFFSET = OFFSET_;
  // How many inputs neighboring outputs meet.
  __host__ __device__ static constexpr int window(int outputs) {
    return ((outputs - 1) * DOWN + TAPS - 1 + OFFSET) / UP + 1;
  }
  static constexpr int ROWS = window(UP), KEPT = ROWS - DOWN;  // a step reads DOWN new rows and makes UP outputs
  // The input that output 0 meets first: -pad / UP, rounded up.
  static int first(const Axis& axis) { return static_cast<int>((UP - 1 - axis.pad) >> (UP - 1)); }
  static bool fits(const Axis& axis) {
    const bool in_phase = -axis.pad - int64_t(UP) * first(axis) == OFFSET;
    return axis.up == UP && axis.down == DOWN && axis.taps == TAPS && in_phase;
  }
};

// out[outputs][N] += taps * in[window][N]
template <class R, int OUTPUTS, int N>
__device__ __forceinline__ void resample(const float* taps, const float* in, float* out) {
#pragma unroll
  for (int j = 0; j < OUTPUTS; j++)
#pragma unroll
    for (int t = 0; t < R::TAPS; t++) {
      const int position = j * R::DOWN + t + R::OFFSET;
      if (position < 0 || position % R::UP != 0) continue;
#pragma unroll
      for (int i = 0; i < N; i++) out[j * N + i] = fmaf(taps[t], in[position / R::UP * N + i], out[j * N + i]);
    }
}

constexpr int UNROLLED = 4;  // steps of walk(), so that shifting the rows kept costs no instruction

// Walks down an image: fetch(i) starts on input row i, filter(fetched, row) does it horizontally, write(j, row) takes
// output row j. The next rows are fetched before the work on the last begins. A thread returns after its last row.
template <class R, int N, class Fetch, class Filter, class Write>
__device__ __forceinline__ void walk(int steps, int rows_left, const float* taps, const Fetch& fetch,
                                     const Filter& filter, const Write& write) {
  float rows[R::ROWS * N];
  decltype(fetch(0)) next[R::ROWS];
#pragma unroll
  for (int i = 0; i < R::ROWS; i++) next[i] = fetch(i);
#pragma unroll
  for (int i = 0; i < R::KEPT; i++) filter(next[i], rows + i * N);
  for (int chunk = 0; chunk < steps; chunk += UNROLLED) {
#pragma unroll
    for (int step = chunk; step < chunk + UNROLLED; step++) {
      // Without this branch ptxas starts on the next steps too early, and on sm_80 its registers spill.
      if (step * R::UP >= rows_left) return;
#pragma unroll
      for (int i = R::KEPT; i < R::ROWS; i++) filter(next[i], rows + i * N);
#pragma unroll
      for (int i = R::KEPT; i < R::ROWS; i++) next[i] = fetch((step + 1) * R::DOWN + i);
      float out[R::UP * N];
#pragma unroll
      for (int i = 0; i < R::UP * N; i++) out[i] = 0;
      resample<R, R::UP, N>(taps, rows, out);
#pragma unroll
      for (int j = 0; j < R::UP; j++) write(step * R::UP + j, out + j * N);
#pragma unroll
      for (int i = 0; i < R::KEPT * N; i++) rows[i] = rows[i + R::DOWN * N];
    }
  }
}

template <class R>
struct Taps {
  float vertical[R::TAPS], horizontal[R::TAPS];  // in correlation order, the latter with the gain

  __device__ __forceinline__ Taps(const Upfirdn2d& call, float gain) {
    const float* filter = static_cast<const float*>(call.filter);
#pragma unroll
    for (int t = 0; t < R::TAPS; t++) {
      vertical[t] = filter[call.flip ? t : R::TAPS - 1 - t];
      horizontal[t] = vertical[t] * gain;
    }
  }
};

// ---- NCHW ----

// A block makes `planes` planes of [strips * steps * UP][lanes * FULL<T>] outputs; lanes and strips are powers of two.
struct Tiling {
  int lanes, strips, planes, steps;
  int first_row, first_column;  // input that the image's first output meets first
  bool wide_loads, wide_stores;  // of 16 bytes, or of single elements
  int in_height, in_width;  // their product may be large, offsets inside a block's planes or rows are not
  int height, pitch;    // of the input tile in shared memory: rows per plane, words per row
  int accesses, shift;  // to fill a row of the tile, and how many elements before the tile the first one starts
  int step_accesses, step_rows, step_planes;  // blockDim.x accesses further, as the digits of a clock
  Divisor per_row{1}, per_plane{1}, across{1}, down{1};   // accesses, rows; tiles across and down the image
};

// A row of the tile is an unused word per GROUP and the LEAD before the first window, to align groups with windows.
template <class T, class R>
struct Row {
  static constexpr int PER_WORD = 4 / sizeof(T), STRIDE = 4 * R::DOWN / R::UP;  // words between neighboring windows
  static constexpr int GROUP = STRIDE < 4 ? STRIDE : 4, LEAD = STRIDE < 4 ? 4 : STRIDE;
  static constexpr int WORDS = (R::window(FULL<T>) + 2 * (PER_WORD - 1)) / PER_WORD;  // a window may start inside one
  __host__ __device__ static constexpr int skew(int word) { return word + word / GROUP; }
};

constexpr int PLANES_THREADS = 128;

// Shared memory <- input, ACCESS words at a time, which in the case of 4 lie all inside the image or all outside.
// BATCH of them are in flight per thread.
template <class T, class R, int ACCESS, int BATCH>
__device__ __forceinline__ void fill_tile(const Upfirdn2d& call, const Tiling& tiling, int64_t first_plane, int planes,
                                          int first_row, int first_column, uint32_t* tile) {
  using Line = Row<T, R>;
  const unsigned height = tiling.in_height, width = tiling.in_width;
  const int64_t corner = (first_plane * tiling.in_height + first_row) * tiling.in_width + first_column;
  const T* x = static_cast<const T*>(call.x) + corner;
  uint32_t* words_of[ACCESS];  // where the words of the tile's first access go
#pragma unroll
  for (int j = 0; j < ACCESS; j++) words_of[j] = tile + Line::skew(Line::LEAD - tiling.shift / Line::PER_WORD + j);
  const int nowhere = tiling.planes * tiling.height * tiling.pitch;
  int access = threadIdx.x, row = tiling.per_row.split(access), plane = tiling.per_plane.split(row);
  while (plane < planes) {
    uint32_t words[BATCH][ACCESS];
    int targets[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const unsigned y = first_row + row, left = first_column + access * (ACCESS * Line::PER_WORD);
      const bool inside = plane < planes && y < height;
      const T* source = x + ((plane * tiling.in_height + row) * tiling.in_width + access * (ACCESS * Line::PER_WORD));
      const int line = (plane * tiling.height + row) * tiling.pitch;
      if constexpr (ACCESS == 4) {
        const uint4 v = inside && left < width ? load_16(source) : uint4{};
        words[k][0] = v.x, words[k][1] = v.y, words[k][2] = v.z, words[k][3] = v.w;
        targets[k] = line + access * Line::skew(4);
      } else {
        Pack<T, Line::PER_WORD> pack;
#pragma unroll
        for (int i = 0; i < Line::PER_WORD; i++)
          pack.value[i] = load<T, 1>(source + i, inside && left + i < width).value[0];
        words[k][0] = bit_cast<uint32_t>(pack);
        targets[k] = line + Line::skew(access);
      }
      if (plane >= planes) targets[k] = nowhere;
      access += tiling.step_accesses;
      row += tiling.step_rows;
      plane += tiling.step_planes;
      if (access >= tiling.accesses) access -= tiling.accesses, row++;
      if (row >= tiling.height) row -= tiling.height, plane++;
    }
#pragma unroll
    for (int k = 0; k < BATCH; k++)
#pragma unroll
      for (int j = 0; j < ACCESS; j++) words_of[j][targets[k]] = words[k][j];
  }
}

template <class T, class R>
__global__ void __launch_bounds__(PLANES_THREADS, R::DOWN == 2 ? 4 : 6)  // more, and ptxas spoils the batches of loads
    planes_kernel(Upfirdn2d call, float gain, Tiling tiling) {
  constexpr int N = FULL<T>;
  constexpr int BATCH = R::UP == 2 ? 6 : R::DOWN == 2 ? 9 : 5;  // as full tiles take 6, 18 and 10 loads per thread
  using Line = Row<T, R>;
  extern __shared__ uint32_t tile[];

  int tile_column = blockIdx.x, tile_row = tiling.across.split(tile_column), group = tiling.down.split(tile_row);
  const int64_t first_plane = int64_t(group) * tiling.planes;
  const int planes = static_cast<int>(min(call.n * call.c - first_plane, int64_t(tiling.planes)));
  const int lane = threadIdx.x & (tiling.lanes - 1), strip = threadIdx.x / tiling.lanes & (tiling.strips - 1);
  const int plane = threadIdx.x / (tiling.lanes * tiling.strips);
  const int column = (tile_column * tiling.lanes + lane) * N;
  const int first_row = (tile_row * tiling.strips + strip) * tiling.steps * R::UP;
  const bool active = plane < planes && column < call.horizontal.out;
  const int rows = active ? static_cast<int>(call.vertical.out) - first_row : 0;  // perhaps more than it has steps for
  const int64_t start = ((first_plane + plane) * call.vertical.out + first_row) * call.horizontal.out + column;
  T* y = static_cast<T*>(call.y) + start;

  const Taps<R> taps(call, gain);
  const int tile_x = tiling.first_column + tile_column * tiling.lanes * N * R::DOWN / R::UP - tiling.shift;
  const int tile_y = tiling.first_row + tile_row * tiling.strips * tiling.steps * R::DOWN;
  if (tiling.wide_loads) fill_tile<T, R, 4, BATCH>(call, tiling, first_plane, planes, tile_y, tile_x, tile);
  else fill_tile<T, R, 1, 8>(call, tiling, first_plane, planes, tile_y, tile_x, tile);
  __syncthreads();

  const int first_line = (plane < planes ? plane : 0) * tiling.height + strip * tiling.steps * R::DOWN;
  const uint32_t* windows = tile + first_line * tiling.pitch + Line::skew(Line::LEAD + lane * Line::STRIDE);
  const int odd = tiling.shift % Line::PER_WORD * 16;

  const auto fetch = [&](int i) { return windows + i * tiling.pitch; };
  const auto filter = [&](const uint32_t* line, float* row) {
    uint32_t words[Line::WORDS];
#pragma unroll
    for (int k = 0; k < Line::WORDS; k++) words[k] = line[Line::skew(k)];
    float window[Line::WORDS * Line::PER_WORD];
#pragma unroll
    for (int k = 0; k < Line::WORDS; k++) {
      if constexpr (sizeof(T) == 2) words[k] = __funnelshift_r(words[k], k + 1 < Line::WORDS ? words[k + 1] : 0, odd);
      widen(bit_cast<Pack<T, Line::PER_WORD>>(words[k]), window + k * Line::PER_WORD);
    }
#pragma unroll
    for (int k = 0; k < N; k++) row[k] = 0;
    resample<R, N, 1>(taps.horizontal, window, row);
  };
  const auto write = [&](int j, const float* row) {
    T* target = y + j * call.horizontal.out;
    if (j < rows && tiling.wide_stores) {
      store<T, N>(target, row);
    } else if (j < rows) {
#pragma unroll
      for (int i = 0; i < N; i++)
        if (column + i < call.horizontal.out) store<T, 1>(target + i, row + i);
    }
  };
  walk<R, N>(tiling.steps, rows, taps.vertical, fetch, filter, write);
}

int power_of_two(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

template <class T, class R>
void launch_planes(const Upfirdn2d& call, cudaStream_t stream) {
  constexpr int N = FULL<T>;
  using Line = Row<T, R>;
  const int64_t planes = call.n * call.c;
  Tiling t{};
  t.lanes = power_of_two(ceil_divide(call.horizontal.out, N), 16);
  t.steps = R::DOWN == 2 || call.vertical.out <= UNROLLED * R::UP ? UNROLLED : 2 * UNROLLED;
  t.strips = power_of_two(ceil_divide(call.vertical.out, t.steps * R::UP), PLANES_THREADS / t.lanes);
  t.planes = power_of_two(planes, PLANES_THREADS / (t.lanes * t.strips));
  t.wide_loads = call.horizontal.in % N == 0 && aligned({call.x});
  t.wide_stores = call.horizontal.out % N == 0 && aligned({call.y});
  t.in_height = static_cast<int>(call.vertical.in);
  t.in_width = static_cast<int>(call.horizontal.in);
  t.first_row = R::first(call.vertical);
  t.first_column = R::first(call.horizontal);
  t.shift = t.wide_loads ? t.first_column & (N - 1) : 0;

  const int words = t.wide_loads ? 4 : 1;
  t.accesses = static_cast<int>(ceil_divide(t.shift + R::window(t.lanes * N), words * Line::PER_WORD));
  const int read = (t.lanes - 1) * Line::STRIDE + Line::WORDS;
  t.pitch = Line::skew(Line::LEAD + std::max(t.accesses * words, read));
  // Where a warp has several strips, the banks of the next follow those of the last, if they can.
  const int rows = t.steps * R::DOWN, banks = t.lanes * Line::skew(Line::STRIDE);
  while (t.lanes % rows == 0 && (rows * t.pitch - banks) % WARP != 0) t.pitch++;
  while (t.planes > 1 && t.planes * call.vertical.in * call.horizontal.in >> 31 != 0) t.planes /= 2;
  const auto bytes = [&] {
    t.height = t.strips * rows + R::KEPT;
    return static_cast<int>(sizeof(uint32_t)) * (t.planes * t.height * t.pitch + 16);  // 16: for loads to nowhere
  };
  while (bytes() > 48 << 10) (t.planes > 1 ? t.planes : t.strips) /= 2;

  const int threads = std::max(WARP, t.lanes * t.strips * t.planes);
  t.step_accesses = threads % t.accesses;
  t.step_rows = threads / t.accesses % t.height;
  t.step_planes = threads / t.accesses / t.height;
  t.per_row = Divisor(t.accesses);
  t.per_plane = Divisor(t.height);
  t.across = Divisor(ceil_divide(call.horizontal.out, t.lanes * N));
  t.down = Divisor(ceil_divide(call.vertical.out, t.strips * t.steps * R::UP));
  const auto blocks = static_cast<unsigned>(t.across.divisor * t.down.divisor * ceil_divide(planes, t.planes));
  const auto kernel = planes_kernel<T, R>;
  kernel<<<blocks, threads, bytes(), stream>>>(call, static_cast<float>(call.gain), t);
}

// ---- NHWC ----

constexpr int CHANNELS_LAST_THREADS = 128;

template <class R>
constexpr int COLUMNS = R::DOWN == 2 ? 1 : 2;  // outputs per thread in a row; with more, registers get scarce

// A block makes `width` packs of channels in CHANNELS_LAST_THREADS / width * COLUMNS columns and steps * UP rows.
struct Strips {
  int steps;
  int first_row, first_column;  // input that the image's first output meets first
  Divisor width, packs, across, down;  // packs per block; blocks over the channels, across and down the image
};

template <class T, class R>
__global__ void __launch_bounds__(CHANNELS_LAST_THREADS, sizeof(T) == 2 && R::ROWS == 4 ? 3 : 4)
    channels_last_kernel(Upfirdn2d call, float gain, Strips strips) {
  constexpr int N = FULL<T>, WINDOW = R::window(COLUMNS<R>);
  int pack = threadIdx.x, group = strips.width.split(pack);
  int tile = blockIdx.x, tile_column = strips.packs.split(tile), tile_row = strips.across.split(tile_column);
  const int64_t image = strips.down.split(tile_row);
  const int groups = CHANNELS_LAST_THREADS / strips.width.divisor;
  const int channel = (tile * strips.width.divisor + pack) * N;
  const int column = (tile_column * groups + group) * COLUMNS<R>, row = tile_row * strips.steps * R::UP;
  const bool active = group < groups && channel < call.c && column < call.horizontal.out;
  const int rows = active ? static_cast<int>(call.vertical.out) - row : 0;  // perhaps more than it has steps for

  const int x_row = strips.first_row + row * R::DOWN / R::UP, x_column = strips.first_column + column * R::DOWN / R::UP;
  const T* x = static_cast<const T*>(call.x) + channel;
  const int64_t start = ((image * call.vertical.out + row) * call.horizontal.out + column) * call.c + channel;
  T* y = static_cast<T*>(call.y) + start;

  const Taps<R> taps(call, gain);

  struct Window {
    Pack<T, N> packs[WINDOW];
  };
  const unsigned height = static_cast<unsigned>(call.vertical.in), width = static_cast<unsigned>(call.horizontal.in);
  const int fetched = active ? R::KEPT + strips.steps * R::DOWN : 0;
  const T* source = x + ((image * height + x_row) * width + x_column) * call.c;
  const auto fetch = [&](int i) {
    Window window;
    const bool inside = i < fetched && static_cast<unsigned>(x_row + i) < height;
#pragma unroll
    for (int k = 0; k < WINDOW; k++) {
      const bool valid = inside & (static_cast<unsigned>(x_column + k) < width);
      window.packs[k] = load<T, N>(source + (int64_t(i) * width + k) * call.c, valid);
    }
    return window;
  };
  const auto filter = [&](const Window& window, float* row) {
    float in[WINDOW * N];
#pragma unroll
    for (int k = 0; k < WINDOW; k++) widen(window.packs[k], in + k * N);
#pragma unroll
    for (int k = 0; k < COLUMNS<R> * N; k++) row[k] = 0;
    resample<R, COLUMNS<R>, N>(taps.horizontal, in, row);
  };
  const auto write = [&](int j, const float* out) {
#pragma unroll
    for (int q = 0; q < COLUMNS<R>; q++) {
      const int64_t at = (j * call.horizontal.out + q) * call.c;
      const bool inside = j < rows && column + q < call.horizontal.out;
      if (inside) store<T, N>(y + at, out + q * N);
    }
  };
  walk<R, COLUMNS<R> * N>(strips.steps, rows, taps.vertical, fetch, filter, write);
}

template <class T, class R>
void launch_channels_last(const Upfirdn2d& call, cudaStream_t stream) {
  const int64_t packs = call.c / FULL<T>;
  const int64_t width = packs <= 16 ? packs : 8;  // 128 bytes are enough for the memory
  const int64_t columns = CHANNELS_LAST_THREADS / width * COLUMNS<R>;
  const int steps = R::DOWN == 2 || call.vertical.out <= UNROLLED * R::UP ? UNROLLED : 2 * UNROLLED;
  const Strips strips{steps,
                      R::first(call.vertical),
                      R::first(call.horizontal),
                      Divisor(width),
                      Divisor(ceil_divide(packs, width)),
                      Divisor(ceil_divide(call.horizontal.out, columns)),
                      Divisor(ceil_divide(call.vertical.out, steps * R::UP))};
  const auto tiles = strips.packs.divisor * int64_t(strips.across.divisor) * strips.down.divisor;
  const auto kernel = channels_last_kernel<T, R>;
  const auto blocks = static_cast<unsigned>(tiles * call.n);
  kernel<<<blocks, CHANNELS_LAST_THREADS, 0, stream>>>(call, static_cast<float>(call.gain), strips);
}

// Whether it is a case of R, and then launched.
template <class T, class R>
bool launch_if(const Upfirdn2d& call, cudaStream_t stream) {
  if (!call.separable || !R::fits(call.vertical) || !R::fits(call.horizontal)) return false;
  if (!call.channels_last && call.horizontal.in >> 20 != 0) return false;  // a tile's rows would be too far apart
  if (!call.channels_last) {
    launch_planes<T, R>(call, stream);
  } else {
    if (call.c % FULL<T> != 0 || !aligned({call.x, call.y})) return false;
    launch_channels_last<T, R>(call, stream);
  }
  return true;
}

// ---- Anything ----

constexpr int GENERAL_THREADS = 256, GENERAL_OUTPUTS = 8;  // outputs per thread, consecutive threads side by side

// Which input an output meets first, and in which tap; the next input is `up` taps further.
struct First {
  Divisor up;
  int offset, shift;

  explicit First(const Axis& axis) : up(axis.up) {
    shift = static_cast<int>(std::max<int64_t>(0, ceil_divide(axis.pad, axis.up)));  // keeps the dividend positive
    offset = static_cast<int>(int64_t(shift) * axis.up - axis.pad + axis.up - 1);
  }
  __device__ __forceinline__ int input(int output, int down, int& tap) const {
    int position = output * down + offset;
    const int quotient = up.split(position);
    tap = up.divisor - 1 - position;
    return quotient - shift;
  }
};

// Divide into the digits of an element in memory order: channel (NHWC; else 0), column, row, and image or plane.
struct Digits {
  Divisor inner, width, height;
};

template <class T>
__global__ void __launch_bounds__(GENERAL_THREADS, 4)
    general_kernel(Upfirdn2d call, Digits digits, First first_row, First first_column) {
  using A = Wide<T>;
  const Axis &vertical = call.vertical, &horizontal = call.horizontal;
  const A* filter = static_cast<const A*>(call.filter);
  const int64_t block = int64_t(blockIdx.x) * GENERAL_THREADS * GENERAL_OUTPUTS;
  const int64_t numel = call.n * call.c * vertical.out * horizontal.out, inner = digits.inner.divisor;

  __shared__ int64_t outer_0;  // digits of the block's first output
  __shared__ int row_0, column_0, inner_0;
  if (threadIdx.x == 0) {
    const int64_t columns = block / inner, rows = columns / horizontal.out;
    inner_0 = static_cast<int>(block % inner);
    column_0 = static_cast<int>(columns % horizontal.out);
    row_0 = static_cast<int>(rows % vertical.out);
    outer_0 = rows / vertical.out;
  }
  __syncthreads();

  for (int k = 0; k < GENERAL_OUTPUTS; k++) {
    const int local = k * GENERAL_THREADS + threadIdx.x;
    const bool inside = block + local < numel;
    int i = inner_0 + local, column = column_0 + digits.inner.split(i), row = row_0 + digits.width.split(column);
    const int planes = digits.height.split(row);
    const T* x = static_cast<const T*>(call.x) + (outer_0 + planes) * vertical.in * horizontal.in * inner + i;

    int row_tap, column_tap;
    int64_t input_row = first_row.input(row, vertical.down, row_tap);
    const int64_t input_column = first_column.input(column, horizontal.down, column_tap);
    A sum = 0;
    for (int v = row_tap; inside && v < vertical.taps; v += vertical.up, input_row++) {
      if (input_row < 0 || input_row >= vertical.in) continue;
      const int tap_row = call.flip ? v : vertical.taps - 1 - v;
      const A* taps = call.separable ? filter : filter + int64_t(tap_row) * horizontal.taps;
      A line = 0;
      int64_t at = input_column;
      for (int h = column_tap; h < horizontal.taps; h += horizontal.up, at++)
        if (at >= 0 && at < horizontal.in)
          line += taps[call.flip ? h : horizontal.taps - 1 - h] * widen(x[(input_row * horizontal.in + at) * inner]);
      sum += call.separable ? filter[tap_row] * line : line;
    }
    sum *= static_cast<A>(call.gain);
    if (inside) store<T, 1>(static_cast<T*>(call.y) + block + local, &sum);
  }
}

template <class T>
void launch_general(const Upfirdn2d& call, cudaStream_t stream) {
  const Divisor inner(call.channels_last ? call.c : 1);
  const Digits digits{inner, Divisor(call.horizontal.out), Divisor(call.vertical.out)};
  const int64_t numel = call.n * call.c * call.vertical.out * call.horizontal.out;
  const auto blocks = static_cast<unsigned>(ceil_divide(numel, GENERAL_THREADS * GENERAL_OUTPUTS));
  const First row(call.vertical), column(call.horizontal);
  const auto kernel = general_kernel<T>;
  kernel<<<blocks, GENERAL_THREADS, 0, stream>>>(call, digits, row, column);
}

// Positions on an axis are 32-bit numbers.
bool is_large(const Axis& axis) {
  return (axis.in * axis.up + axis.out * axis.down + std::abs(axis.pad) + axis.up + 4096) >> 31 != 0;
}

}  // namespace

const char* upfirdn2d_cuda(const Upfirdn2d& call, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  if (is_large(call.vertical) || is_large(call.horizontal)) return "upfirdn2d: rows or columns of 2^31 pixels";
  return for_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      // In phase are the paddings of upsample2d and of the adjoint of downsample2d.
      const bool done = launch_if<T, Resampling<1, 1, 2, 0>>(call, stream) ||
                        launch_if<T, Resampling<1, 1, 4, 0>>(call, stream) ||
                        launch_if<T, Resampling<1, 2, 2, 0>>(call, stream) ||
                        launch_if<T, Resampling<1, 2, 4, 0>>(call, stream) ||
                        launch_if<T, Resampling<2, 1, 2, -1>>(call, stream) ||
                        launch_if<T, Resampling<2, 1, 4, 0>>(call, stream);
      if (done) return launched();
    }
    launch_general<T>(call, stream);
    return launched();
  });
}

}  // namespace gan_ops
