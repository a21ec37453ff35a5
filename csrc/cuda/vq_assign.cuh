// The fast pass of nearest-code search: fp32 scores of everything, of which only a certificate is kept.
//
// Rows and codes are centred by about the codebook's mean m and scaled by a power of two s, which adds the same to all
// scores of a row:
//     l2      a = x'.e' - |e'|^2 / 2     x' = s (x - m)    e' = s (e - m)      (the canonical score's negative)
//     dot     a = x.e'                                     e' = s (e - m)
//     cosine  a = x.e'                                     e' = e / |e|
// For every row and group of 8 codes, B = |x'| P + Q bounds how far the group's fp32 maximum of `a` lies from that of
// the canonical fp64 scores. With `reach` = a + B and `floor` = the largest a - B of any group, the nearest code is in
// a group with reach >= floor: of the groups that one thread sees of a row, the best is kept, and the second's reach.
#pragma once
#include "vq.cuh"

namespace vaeops::cuda {

constexpr int kTileRows = 128, kTileCodes = 128;  // of a block; a thread has 8 x 8 of them
constexpr int kTileDepth = 8;                     // dims at a time
constexpr int kGroup = 8;                         // consecutive codes
constexpr int kGroups = kTileCodes / kGroup;      // per tile: one per thread of a row
constexpr int kKept = 4;                          // groups kept per row and split
constexpr int kTileBlocks = 2;                    // per multiprocessor
constexpr int64_t kMostDims = 1 << 22;            // beyond it the bound would not hold
constexpr int kSampled = 256;                     // codes that centre and scale are taken from

// What one split of the codes says about a row.
struct Record {
  float floor, rest;  // rest: the largest reach of what is not kept
  float reach[kKept];
  int32_t group[kKept];  // -1: none
};

struct Frame {
  double centre;              // s |m|
  float scale;                // s
  unsigned long long listed;  // rows that the certificate does not settle
};

struct Pass {
  float* packed =
      nullptr;            // [K / 128, D, 128] the codes' e', zero where never chosen; order of a tile's codes: `place`
  float* lead = nullptr;  // [K / 128, 128] -|e'|^2 / 2 or 0, -inf where never chosen
  float* margin = nullptr;  // [K / 8, 2] P, Q
  float* mean = nullptr;    // [D] m
  double* bias = nullptr;   // [K] for score_of
  double* partials = nullptr;
  Frame* frame = nullptr;
  Record* records = nullptr;  // [splits, N]
  int64_t* list = nullptr;    // [N]
  uint32_t* tickets = nullptr;
  int64_t tiles = 0;   // of codes
  int64_t splits = 1;  // of them
};

// Where a tile's code stands in it: a thread reads the 8 codes of its group as two vectors, neighbours' side by side.
__device__ __forceinline__ int place(int code) { return code % kGroup / 4 * 64 + code / kGroup * 4 + code % 4; }

// Centre and scale from a sample of the codes; any values would be right.
__global__ void __launch_bounds__(kThreads)
    frame_kernel(const __grid_constant__ VqAssign call, const __grid_constant__ Pass pass) {
  constexpr int kDeep = kThreads / kWarp;
  __shared__ double table[kDeep][kWarp];
  const int x = threadIdx.x % kWarp, y = threadIdx.x / kWarp;
  const int64_t sampled = call.codes < kSampled ? call.codes : kSampled;
  const bool centred = call.metric != Metric::cosine;
  double spread = 0, centre = 0;  // squares
  for (int64_t first = blockIdx.x * int64_t{kWarp}; first < call.dims; first += gridDim.x * int64_t{kWarp}) {
    const int64_t d = first + x;
    const auto value = [&](int64_t i) {
      return d < call.dims
                 ? any_at<double>(call.codebook, call.codebook_dtype, i * call.codes / sampled * call.dims + d)
                 : 0;
    };
    double sum = 0;
    for (int64_t i = y; i < sampled && centred; i += kDeep) {
      const double v = value(i);
      sum += is_finite(v) ? v : 0;
    }
    table[y][x] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < kDeep; ++i) sum += table[i][x];
    const float mean = fabs(sum) < 0x1p100 ? static_cast<float>(sum / static_cast<double>(sampled)) : 0.0f;
    double most = 0;
    for (int64_t i = y; i < sampled; i += kDeep) {
      const double v = fabs(value(i) - mean);
      most = is_finite(v) && v > most ? v : most;
    }
    __syncthreads();
    table[y][x] = most;
    __syncthreads();
    if (y == 0 && d < call.dims) {
      for (int i = 1; i < kDeep; ++i) most = most < table[i][x] ? table[i][x] : most;
      spread += most * most;
      centre += static_cast<double>(mean) * mean;
      pass.mean[d] = mean;
    }
    __syncthreads();
  }
  spread = block_sum(spread);
  centre = block_sum(centre);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      pass.partials[2 * blockIdx.x] = spread;
      pass.partials[2 * blockIdx.x + 1] = centre;
    }
    if (!last_to_arrive(pass.tickets, gridDim.x)) return;
    spread = centre = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
      spread += __ldcg(pass.partials + 2 * b);
      centre += __ldcg(pass.partials + 2 * b + 1);
    }
    spread = block_sum(spread);
    centre = block_sum(centre);
  }
  if (threadIdx.x != 0) return;
  int exponent = 0;
  if (is_finite(spread) && spread > 0) frexp(spread, &exponent);
  exponent /= 2;
  exponent = exponent > 120 ? 120 : exponent < -120 ? -120 : exponent;
  if (call.metric == Metric::cosine) exponent = 0;
  const float scale = ldexpf(1.0f, -exponent);
  *pass.frame = {scale * sqrt(centre), scale, 0};
}

// A thread per code: its bias, and what the fast pass needs of it.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ VqAssign call, const __grid_constant__ Pass pass) {
  const bool fast = pass.packed != nullptr;
  const int64_t dims = call.dims, most = fast ? pass.tiles * kTileCodes : call.codes;
  for (int64_t first = blockIdx.x * int64_t{kThreads}; first < most; first += gridDim.x * int64_t{kThreads}) {
    const int64_t k = first + threadIdx.x;
    const auto value = [&](int64_t d) { return any_at<double>(call.codebook, call.codebook_dtype, k * dims + d); };
    bool chosen = k < call.codes;
    double h = 0;
    for (int64_t d = 0; d < dims && k < call.codes; ++d) {
      const double e = value(d);
      chosen = chosen && is_finite(e);
      h = __fma_rn(e, e, h);
    }
    if (call.metric == Metric::cosine) chosen = chosen && h > 0;
    const double norm = __dsqrt_rn(h);
    if (k < call.codes) {
      pass.bias[k] = !chosen ? NAN : call.metric == Metric::l2 ? 0.5 * h : call.metric == Metric::cosine ? norm : 0;
    }
    if (!fast) continue;
    const double scale = pass.frame->scale, centre = pass.frame->centre;
    float* out = pass.packed + k / kTileCodes * dims * kTileCodes + place(static_cast<int>(k % kTileCodes));
    double square = 0, packed_square = 0;
    for (int64_t d = 0; d < dims && k < most; ++d) {
      const double e = !chosen                         ? 0
                       : call.metric == Metric::cosine ? value(d) / norm
                                                       : (value(d) - pass.mean[d]) * scale;
      const float packed = static_cast<float>(e);
      out[d * kTileCodes] = packed;
      square += e * e;
      packed_square += static_cast<double>(packed) * packed;
    }
    // Far outside of the sample, or where h has lost its bits: no bound, so that the exact scan decides.
    bool bounded = square < 0x1p80;
    if (call.metric == Metric::cosine && chosen) bounded = bounded && h > 0x1p-900 && h < 0x1p900;
    double length = bounded ? sqrt(packed_square) * (1 + 0x1p-20) : 0;
    double half = call.metric == Metric::l2 && bounded ? 0.5 * square : 0;
    if (k < most)
      pass.lead[k / kTileCodes * kTileCodes + place(static_cast<int>(k % kTileCodes))] =
          chosen ? -static_cast<float>(half) : -INFINITY;
    if (!bounded && k < most) {
      for (int64_t d = 0; d < dims; ++d) out[d * kTileCodes] = 0;
    }
    for (int step = 1; step < kGroup; step *= 2) {
      const double other_length = __shfl_xor_sync(0xFFFFFFFFu, length, step);
      const double other_half = __shfl_xor_sync(0xFFFFFFFFu, half, step);
      length = length < other_length ? other_length : length;
      half = half < other_half ? other_half : half;
    }
    bounded = !team_any(!bounded, kGroup);
    if (k % kGroup != 0 || k >= most) continue;
    // fp32: rounding x' and e' (2^-24 each), a chain of D fmas from `lead`, then the sums of `reach` and `floor`; twice
    // what they can lose. fp64: the canonical score, on values that are not centred. `least`: underflow.
    const double fp32 = static_cast<double>(dims + 8) * 0x1p-23, fp64 = static_cast<double>(2 * dims + 8) * 0x1p-53;
    const double least = static_cast<double>(dims) * 0x1p-120, whole = length + centre;
    const double p = fp32 * length + fp64 * whole + least;
    const double norms = call.metric == Metric::l2 ? fp64 * (0.5 * whole * whole + centre * whole) : 0;
    const double q = fp32 * half + norms + least * (1 + length);
    pass.margin[k / kGroup * 2] = static_cast<float>(1.001 * p);
    pass.margin[k / kGroup * 2 + 1] = bounded ? static_cast<float>(1.001 * q) : INFINITY;
  }
}

// Of the groups that a thread has seen of a row; in shared memory, since all registers hold scores.
struct Best {
  float reach, second;
  int32_t tile;
};

// x' of the row at `offset`, 0 beyond its last dim.
template <class T>
__device__ __forceinline__ float centred(const VqAssign& call, const Pass& pass, int64_t offset, int d) {
  if (d >= static_cast<int>(call.dims)) return 0;
  Compute<T> x = load<T>(call.x.operand, offset + d * call.x.step);
  if (call.metric == Metric::l2) x = (x - pass.mean[d]) * pass.frame->scale;
  return static_cast<float>(x);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kTileBlocks)
    tiles_kernel(const __grid_constant__ VqAssign call, const __grid_constant__ Pass pass) {
  __shared__ Vector<float> xs[2][kTileDepth][kTileRows / 4], es[2][kTileDepth][kTileCodes / 4];
  __shared__ Best best[8][kThreads];  // per row of a thread
  __shared__ float norm[kTileRows];
  __shared__ int64_t offset[kTileRows];
  __shared__ double squares[2][kTileRows];
  const int t = threadIdx.x, tx = t % 16, ty = t / 16, dims = static_cast<int>(call.dims);
  const int64_t count = call.shape.n, row_tiles = (count + kTileRows - 1) / kTileRows;
  const int per_split = static_cast<int>((pass.tiles + pass.splits - 1) / pass.splits);
  for (int64_t item = blockIdx.x; item < row_tiles * pass.splits; item += gridDim.x) {
    int64_t split = 0, row_tile = item;
    if (pass.splits > 1) row_tile = divide(item, pass.splits, split);
    int tile = static_cast<int>(split) * per_split, d0 = 0;
    const int end = static_cast<int>(tile + per_split < pass.tiles ? tile + per_split : pass.tiles);
    // This thread brings in 4 of every 8 dims of one row, and 4 codes of one dim.
    const int row = t % kTileRows, part = t / kTileRows;
    const int64_t n = row_tile * kTileRows + row < count ? row_tile * kTileRows + row : count - 1;
    if (part == 0) offset[row] = row_offset(call.shape, call.x.operand, n);
    __syncthreads();
    double square = 0;
    for (int d = part; d < dims; d += 2) {
      const double x = centred<T>(call, pass, offset[row], d);
      square += x * x;
    }
    squares[part][row] = square;
    __syncthreads();
    if (part == 0) {
      const double length = sqrt(squares[0][row] + squares[1][row]) * (1 + 0x1p-20);
      norm[row] = length < 0x1p64 ? static_cast<float>(length) : NAN;  // no bound
    }

    for (int i = 0; i < 8; ++i) best[i][t] = {-INFINITY, -INFINITY, tile};
    Vector<float> x;
    float acc[8][8];
    int64_t panel = static_cast<int64_t>(tile) * dims + t / 32;  // row of `packed`
    // Codes go into `buffer` on their own, x' through registers.
    const auto fetch = [&](int buffer) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x.x[c] = centred<T>(call, pass, offset[row], d0 + 4 * part + c);
      Vector<float>* to = &es[buffer][t / 32][t % 32];
      if (d0 + t / 32 < dims) {
        __pipeline_memcpy_async(to, reinterpret_cast<const Vector<float>*>(pass.packed) + panel * 32 + t % 32, 16);
      } else {
        *to = {};
      }
      __pipeline_commit();
    };
    fetch(0);
    for (int buffer = 0; tile < end; buffer ^= 1) {
#pragma unroll
      for (int c = 0; c < 4; ++c) xs[buffer][4 * part + c][row / 4].x[row % 4] = x.x[c];
      __pipeline_wait_prior(0);
      __syncthreads();
      if (d0 == 0) {
        const float* lead = pass.lead + static_cast<int64_t>(tile) * kTileCodes + 4 * tx;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float start = lead[j / 4 * 64 + j % 4];
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[i][j] = start;
        }
      }
      const bool last = d0 + kTileDepth >= dims;
      panel += last ? dims - d0 : kTileDepth;
      d0 = last ? 0 : d0 + kTileDepth;
      if (!last || tile + 1 < end) fetch(buffer ^ 1);
#pragma unroll 2  // more would spill
      for (int c = 0; c < kTileDepth; ++c) {
        const Vector<float> a[2] = {xs[buffer][c][2 * ty], xs[buffer][c][2 * ty + 1]};
        const Vector<float> b[2] = {es[buffer][c][tx], es[buffer][c][16 + tx]};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) acc[i][j] = __fmaf_rn(a[i / 4].x[i % 4], b[j / 4].x[j % 4], acc[i][j]);
        }
      }
      if (!last) continue;
      const float* margin = pass.margin + (static_cast<int64_t>(tile) * kGroups + tx) * 2;
      const float p = margin[0], q = margin[1];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float most = acc[i][0];
#pragma unroll
        for (int j = 1; j < 8; ++j) most = fmaxf(most, acc[i][j]);
        const float reach = most + __fmaf_rn(norm[8 * ty + i], p, q);
        const Best old = best[i][t];
        if (reach > old.reach) {
          best[i][t] = {reach, old.reach, tile};
        } else if (reach > old.second) {
          best[i][t].second = reach;
        }
      }
      ++tile;
    }

    const int lane = t % kWarp;
    for (int i = 0; i < 8; ++i) {
      const Best mine = best[i][t];
      const int64_t group = static_cast<int64_t>(mine.tile) * kGroups + tx;
      const float* margin = pass.margin + group * 2;
      const float length = norm[8 * ty + i];
      float floor = fmaxf(-INFINITY, mine.reach - 2 * __fmaf_rn(length, margin[0], margin[1]));  // NaN says nothing
      for (int step = 8; step > 0; step /= 2) floor = fmaxf(floor, __shfl_xor_sync(0xFFFFFFFFu, floor, step));
      if (length != length) floor = -INFINITY;
      const bool candidate = mine.reach >= floor;
      const unsigned candidates = __ballot_sync(0xFFFFFFFFu, candidate) >> (lane & 16) & 0xFFFFu;
      const int rank = __popc(candidates & ((1u << tx) - 1)), found = __popc(candidates);
      float rest = candidate && rank >= kKept ? mine.reach : mine.second;
      for (int step = 8; step > 0; step /= 2) rest = fmaxf(rest, __shfl_xor_sync(0xFFFFFFFFu, rest, step));
      const int64_t out = item / pass.splits * kTileRows + 8 * ty + i;
      if (out >= count) continue;
      Record& record = pass.records[item % pass.splits * count + out];
      if (tx == 0) {
        record.floor = floor;
        record.rest = rest;
      }
      if (candidate && rank < kKept) {
        record.reach[rank] = mine.reach;
        record.group[rank] = static_cast<int32_t>(group);
      }
      if (tx >= found && tx < kKept) record.group[tx] = -1;
    }
  }
}

}  // namespace vaeops::cuda
