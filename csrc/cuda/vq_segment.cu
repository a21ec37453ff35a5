// Sums of rows by index, without float atomics: the rows are sorted by code, stably, and each code's are summed in fp64
// in that order. Formula: vaeops/ref/vq.py (vq_segment_sum).
//
//     keys     each row's code, or none; how many rows of every chunk go to every code
//     place    where each code's rows lie, in each chunk's share of them; long segments are cut into pieces
//     scatter  the rows' numbers, in order
//     sum      a team per code with few rows, or per piece of a code with many
//     combine  the sums of pieces, in order
// Where a segment lies hangs on the order of blocks; what it holds does not.
// In fixed point every order gives the same sum, so there integer atomics do.
#include "vq.cuh"

namespace vaeops::cuda {
namespace {

constexpr int kRowsBlocks = 4;  // per multiprocessor
constexpr int kFixedPointBits = 36;
constexpr int64_t kHistograms = int64_t{8} << 20;  // bytes, beyond what grows with the call

struct Segment {
  int64_t start, count;
};

struct Piece {
  int64_t code, index;  // index: in the code's segment
};

struct Sort {
  int64_t chunks = 1, chunk = 0;         // of rows
  int64_t piece = 0;                     // rows in one
  unsigned long long* shares = nullptr;  // [chunks, K] counts, then where each chunk's next row of a code goes
  unsigned long long* used = nullptr;    // [2] rows placed, pieces made
  int64_t* keys = nullptr;               // [N]
  int64_t* order = nullptr;              // [N] rows by code
  Segment* segments = nullptr;           // [K]
  Piece* pieces = nullptr;               // of codes with more than one
  double* partials = nullptr;            // [pieces, D + 1] sums, then the weight
  int64_t bytes = 0;

  Sort(const VqSegmentSum& call, Scratch scratch) {
    const int64_t n = call.shape.n, tiles = ceil_div(n, kThreads);
    const int64_t affordable = (kHistograms + 4 * call.codes * call.dims) / (8 * call.codes);
    chunks = affordable < tiles ? affordable : tiles;
    if (chunks > kTickets) chunks = kTickets;
    if (chunks < 1) chunks = 1;
    chunk = ceil_div(ceil_div(n, chunks), kThreads) * kThreads;
    chunks = ceil_div(n, chunk);
    piece = call.dims > 256 ? call.dims : 256;
    const int64_t most_pieces = 2 * (n / piece) + 1;
    Arena arena(scratch.partials);
    shares = arena.take<unsigned long long>(chunks * call.codes);
    used = arena.take<unsigned long long>(2);
    keys = arena.take<int64_t>(n);
    order = arena.take<int64_t>(n);
    segments = arena.take<Segment>(call.codes);
    pieces = arena.take<Piece>(most_pieces);
    partials = arena.take<double>(most_pieces * (call.dims + 1));
    bytes = arena.bytes();
  }
};

// The code of row n, -1 where it counts nowhere. Lanes of a row's team call together; `in`: whether there is a row.
template <class T>
__device__ __forceinline__ int64_t key_of(const VqSegmentSum& call, int64_t n, bool in, int64_t offset, int lane,
                                          int team) {
  const int64_t k = in ? index_at(call.indices, n, call.codes) : -1;
  bool bad = false;
  for (int64_t d = lane; d < call.dims && call.skip_nonfinite && k >= 0; d += team) {
    bad = bad || !is_finite(load<T>(call.values.operand, offset + d * call.values.step));
  }
  return team_any(bad, team) ? -1 : k;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kRowsBlocks)
    keys_kernel(const __grid_constant__ VqSegmentSum call, const __grid_constant__ Sort sort, int team) {
  const int lane = threadIdx.x % team, teams = kThreads / team;
  for (int64_t first = blockIdx.x * int64_t{teams}; first < call.shape.n; first += gridDim.x * int64_t{teams}) {
    const int64_t n = first + threadIdx.x / team;
    const bool in = n < call.shape.n;
    const int64_t k = key_of<T>(call, n, in, in ? row_offset(call.shape, call.values.operand, n) : 0, lane, team);
    if (!in || lane != 0) continue;
    sort.keys[n] = k;
    if (k >= 0) atomicAdd(sort.shares + n / sort.chunk * call.codes + k, 1ull);
  }
}

// A thread per code.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ VqSegmentSum call, const __grid_constant__ Sort sort) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = blockIdx.x * int64_t{kThreads}; first < call.codes; first += gridDim.x * int64_t{kThreads}) {
    const int64_t k = first + threadIdx.x;
    int64_t count = 0;
    for (int64_t c = 0; c < sort.chunks && k < call.codes; ++c) {
      count += static_cast<int64_t>(sort.shares[c * call.codes + k]);
    }
    // One atomic addition a warp.
    int64_t before = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t left = __shfl_sync(0xFFFFFFFFu, before, lane >= step ? lane - step : lane);
      if (lane >= step) before += left;
    }
    unsigned long long start = 0;
    if (lane == kWarp - 1) start = atomicAdd(sort.used, static_cast<unsigned long long>(before));
    start = __shfl_sync(0xFFFFFFFFu, start, kWarp - 1);
    if (k >= call.codes) continue;
    start += static_cast<unsigned long long>(before - count);
    sort.segments[k] = {static_cast<int64_t>(start), count};
    for (int64_t c = 0; c < sort.chunks; ++c) {
      unsigned long long& share = sort.shares[c * call.codes + k];
      const unsigned long long here = share;
      share = start;
      start += here;
    }
    if (count <= sort.piece) continue;
    const int64_t pieces = (count + sort.piece - 1) / sort.piece;
    const unsigned long long slot = atomicAdd(sort.used + 1, static_cast<unsigned long long>(pieces));
    for (int64_t i = 0; i < pieces; ++i) sort.pieces[slot + static_cast<unsigned long long>(i)] = {k, i};
  }
}

// A block per chunk.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ VqSegmentSum call, const __grid_constant__ Sort sort) {
  __shared__ int64_t keys[kThreads];
  const int t = threadIdx.x;
  const int64_t end = (blockIdx.x + int64_t{1}) * sort.chunk;
  for (int64_t first = blockIdx.x * sort.chunk; first < end && first < call.shape.n; first += kThreads) {
    const int64_t n = first + t, key = n < call.shape.n ? sort.keys[n] : -1;
    keys[t] = key;
    __syncthreads();
    int earlier = 0, same = 0;
    for (int i = 0; i < kThreads; ++i) {
      same += keys[i] == key ? 1 : 0;
      if (i < t) earlier = same;
    }
    unsigned long long* share = sort.shares + blockIdx.x * call.codes + key;
    if (key >= 0) sort.order[*share + static_cast<unsigned long long>(earlier)] = n;
    __syncthreads();
    if (key >= 0 && earlier + 1 == same) *share += static_cast<unsigned long long>(same);
  }
}

template <class Out>
__device__ __forceinline__ void put_sum(const VqSegmentSum& call, int64_t k, int64_t d, double sum) {
  if (d < call.dims) {
    static_cast<Out*>(call.sums)[k * call.dims + d] = static_cast<Out>(sum);
  } else {
    static_cast<Out*>(call.counts)[k] = static_cast<Out>(sum);
  }
}

// Dim D is the weight.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, kRowsBlocks)
    sum_kernel(const __grid_constant__ VqSegmentSum call, const __grid_constant__ Sort sort, int team) {
  const int lane = threadIdx.x % team, teams = kThreads / team;
  const int64_t items = call.codes + static_cast<int64_t>(sort.used[1]);
  for (int64_t item = blockIdx.x * int64_t{teams} + threadIdx.x / team; item < items;
       item += gridDim.x * int64_t{teams}) {
    const bool whole = item < call.codes;
    const Piece piece = whole ? Piece{item, 0} : sort.pieces[item - call.codes];
    const Segment segment = sort.segments[piece.code];
    if (whole && segment.count > sort.piece) continue;
    const int64_t begin = piece.index * sort.piece, left = segment.count - begin;
    const int64_t* rows = sort.order + segment.start + begin;
    const int64_t count = left < sort.piece ? left : sort.piece;
    for (int64_t d = lane; d <= call.dims; d += team) {
      double sum = 0;
#pragma unroll 4
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = rows[i];
        double v = 1;
        if (d < call.dims)
          v = load<T>(call.values.operand, row_offset(call.shape, call.values.operand, n) + d * call.values.step);
        if (call.weights != nullptr) {
          v *= call.weights_f64 ? static_cast<const double*>(call.weights)[n]
                                : static_cast<const float*>(call.weights)[n];
        }
        sum += v;
      }
      if (whole) {
        put_sum<Out>(call, piece.code, d, sum);
      } else {
        sort.partials[(item - call.codes) * (call.dims + 1) + d] = sum;
      }
    }
  }
}

// A block per piece, of which only a code's first one works.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ VqSegmentSum call, const __grid_constant__ Sort sort) {
  const int64_t slots = static_cast<int64_t>(sort.used[1]);
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    const Piece piece = sort.pieces[slot];
    if (piece.index != 0) continue;
    const int64_t count = (sort.segments[piece.code].count + sort.piece - 1) / sort.piece;
    for (int64_t d = threadIdx.x; d <= call.dims; d += kThreads) {
      const double* from = sort.partials + slot * (call.dims + 1) + d;
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += from[i * (call.dims + 1)];
      put_sum<Out>(call, piece.code, d, sum);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kRowsBlocks)
    fixed_point_kernel(const __grid_constant__ VqSegmentSum call, int team) {
  const int lane = threadIdx.x % team, teams = kThreads / team;
  int exponent = 0;
  frexp(call.absmax_f64 ? *static_cast<const double*>(call.absmax) : *static_cast<const float*>(call.absmax),
        &exponent);
  const int up = kFixedPointBits - exponent;
  unsigned long long* sums = static_cast<unsigned long long*>(call.sums);
  for (int64_t first = blockIdx.x * int64_t{teams}; first < call.shape.n; first += gridDim.x * int64_t{teams}) {
    const int64_t n = first + threadIdx.x / team;
    const bool in = n < call.shape.n;
    const int64_t offset = in ? row_offset(call.shape, call.values.operand, n) : 0;
    const int64_t k = key_of<T>(call, n, in, offset, lane, team);
    if (k < 0) continue;
    if (lane == 0) atomicAdd(static_cast<unsigned long long*>(call.counts) + k, 1ull);
    constexpr double kMost = static_cast<double>(int64_t{1} << kFixedPointBits);
    for (int64_t d = lane; d < call.dims; d += team) {
      const double v =
          rint(ldexp(static_cast<double>(load<T>(call.values.operand, offset + d * call.values.step)), up));
      const int64_t fixed = static_cast<int64_t>(v < -kMost ? -kMost : v > kMost ? kMost : v);
      atomicAdd(sums + k * call.dims + d, static_cast<unsigned long long>(fixed));
    }
  }
}

int zero(void* data, int64_t bytes, CUstream_st* stream) {
  return static_cast<int>(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream));
}

template <class T, class Out>
void launch_sums(const VqSegmentSum& call, const Sort& sort, CUstream_st* stream) {
  const int team = call.dims < kWarp ? 8 : kWarp;
  const int64_t items = call.codes + 2 * (call.shape.n / sort.piece);
  VAEOPS_LAUNCH((sum_kernel<T, Out>), grid_for(ceil_div(items, kThreads / team), kRowsBlocks), kThreads, stream, call,
                sort, team);
  VAEOPS_LAUNCH((combine_kernel<Out>), grid_for(2 * (call.shape.n / sort.piece), kRowsBlocks), kThreads, stream, call,
                sort);
}

}  // namespace

int64_t vq_segment_sum_scratch(const VqSegmentSum& call) {
  return call.absmax == nullptr && call.shape.n > 0 ? Sort(call, {}).bytes : 0;
}

int vq_segment_sum(const VqSegmentSum& call, Scratch scratch, CUstream_st* stream) {
  const int64_t n = call.shape.n, width = call.absmax != nullptr || call.out_f64 ? 8 : 4;
  const int team = team_width(call.shape, call.values, call.dims);
  const unsigned grid = grid_for(ceil_div(n, kThreads / team), kRowsBlocks);
  if (call.absmax != nullptr || n == 0) {
    if (const int error = zero(call.counts, call.codes * width, stream)) return error;
    if (const int error = zero(call.sums, call.codes * call.dims * width, stream)) return error;
    if (n == 0) return 0;
    return dispatch(call.values.operand.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      VAEOPS_LAUNCH((fixed_point_kernel<T>), grid, kThreads, stream, call, team);
      return static_cast<int>(cudaGetLastError());
    });
  }
  const Sort sort(call, scratch);
  if (const int error = zero(sort.shares, sort.chunks * call.codes * 8, stream)) return error;
  if (const int error = zero(sort.used, 2 * 8, stream)) return error;
  return dispatch(call.values.operand.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    VAEOPS_LAUNCH((keys_kernel<T>), grid, kThreads, stream, call, sort, team);
    VAEOPS_LAUNCH(place_kernel, grid_for(ceil_div(call.codes, kThreads), kRowsBlocks), kThreads, stream, call, sort);
    VAEOPS_LAUNCH(scatter_kernel, static_cast<unsigned>(sort.chunks), kThreads, stream, call, sort);
    call.out_f64 ? launch_sums<T, double>(call, sort, stream) : launch_sums<T, float>(call, sort, stream);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace vaeops::cuda
