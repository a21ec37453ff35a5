// The k best codes of rows by the definition itself: fp64 scores of every code, chunk of codes by chunk.
//
// A block takes up to 64 rows at a time and 64 codes at a time: scores of the tile in registers, then each warp looks
// through its rows' scores and keeps what belongs into a row's sorted list. Where there are fewer tiles of rows than
// blocks, the codes are split among blocks, and the last block of a tile merges their lists.
#pragma once
#include "vq.cuh"

namespace vaeops::cuda {

constexpr int kScanTile = 64;   // rows and codes
constexpr int kScanDepth = 16;  // dims at a time
constexpr int kScanBlocks = 2;  // per multiprocessor

struct Scan {
  const int64_t* rows = nullptr;              // which rows; null: all
  const unsigned long long* count = nullptr;  // how many of them; null: all
  const double* bias = nullptr;               // [K]
  int64_t k = 1;
  int32_t height = kScanTile;  // rows that a block takes at a time: fewer where k is large
  unsigned grid = 1;
  double* score = nullptr;    // [grid, height, k] the lists, ascending
  int64_t* code = nullptr;    // [grid, height, k]
  int64_t* filled = nullptr;  // [grid, height]
  uint32_t* tickets = nullptr;

  void take(Arena& arena) {
    const int64_t lists = static_cast<int64_t>(grid) * height;
    score = arena.take<double>(lists * k);
    code = arena.take<int64_t>(lists * k);
    filled = arena.take<int64_t>(lists);
  }
};

// The canonical score; NaN where the code must not be chosen: its bias is NaN.
__device__ __forceinline__ double score_of(Metric metric, double dot, double bias) {
  return metric == Metric::cosine ? __ddiv_rn(-dot, bias) : __dsub_rn(bias, dot);
}

// A row's list while a warp works on it; every lane holds the same values.
struct BestList {
  double* score;
  int64_t* code;
  int64_t k, filled;
  double worst;  // the k-th score; +inf while there are fewer

  __device__ __forceinline__ bool takes(double s) const { return filled < k || s < worst; }

  // Equal scores keep the order of insertion: codes must come in ascending order.
  __device__ __forceinline__ void insert(double s, int64_t index) {
    const int lane = threadIdx.x % kWarp;
    const int64_t end = filled < k ? filled : k - 1;  // when the list is full, its last entry falls out
    int64_t place = 0;
    __syncwarp();  // everyone has read what the last insertion left
    for (int64_t base = (end - 1) / kWarp * kWarp; base >= 0 && end > 0; base -= kWarp) {
      const int64_t i = base + lane;
      const bool in = i < end;
      const double old = in ? score[i] : 0;
      const int64_t old_code = in ? code[i] : 0;
      const bool moves = in && old > s;
      const unsigned stay = __ballot_sync(0xFFFFFFFFu, in && !moves);
      __syncwarp();  // everyone has read
      if (moves) {
        score[i + 1] = old;
        code[i + 1] = old_code;
      }
      __syncwarp();
      if (stay != 0) {
        place = base + __popc(stay);
        break;
      }
    }
    if (lane == 0) {
      score[place] = s;
      code[place] = index;
    }
    __syncwarp();
    filled = end + 1;
    if (filled == k) worst = score[k - 1];
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kScanBlocks)
    scan_kernel(const __grid_constant__ VqAssign call, const __grid_constant__ Scan scan) {
  // The tiles of x [depth, rows] and of the codebook [depth, codes], then the scores [rows, codes].
  __shared__ double memory[kScanTile * kScanTile];
  __shared__ int64_t row[kScanTile], offset[kScanTile], filled[kScanTile];
  __shared__ double worst[kScanTile];
  __shared__ bool bad[kScanTile];
  double* xs = memory;
  double* es = memory + kScanDepth * kScanTile;
  const int t = threadIdx.x, tx = t % 16, ty = t / 16, warp = t / kWarp, lane = t % kWarp;
  const int64_t count = scan.count != nullptr ? static_cast<int64_t>(*scan.count) : call.shape.n;
  const int64_t tiles = (count + scan.height - 1) / scan.height, panels = (call.codes + kScanTile - 1) / kScanTile;
  if (tiles == 0) return;
  int64_t splits = gridDim.x / tiles;
  splits = splits < 1 ? 1 : splits < panels ? splits : panels;
  const int64_t per_split = (panels + splits - 1) / splits;
  splits = (panels + per_split - 1) / per_split;
  // With splits there are no more items than blocks, so a block's lists are its item's.
  for (int64_t item = blockIdx.x; item < tiles * splits; item += gridDim.x) {
    int64_t split = 0, tile = item;
    if (splits > 1) tile = divide(item, splits, split);
    __syncthreads();  // the last item's rows have been written
    if (t < kScanTile) {
      const int64_t i = tile * scan.height + t;
      const bool in = t < scan.height && i < count;
      row[t] = !in ? -1 : scan.rows != nullptr ? scan.rows[i] : i;
      offset[t] = in ? row_offset(call.shape, call.x.operand, row[t]) : 0;
      filled[t] = 0;
      worst[t] = INFINITY;
      bad[t] = false;
    }
    __syncthreads();
    const int64_t end = (split + 1) * per_split < panels ? (split + 1) * per_split : panels;
    for (int64_t panel = split * per_split; panel < end; ++panel) {
      double dot[4][4] = {};
      for (int64_t d0 = 0; d0 < call.dims; d0 += kScanDepth) {
        __syncthreads();  // what stood in `memory` has been read
        const int r = t % kScanTile, c0 = t / kScanTile * 4;
        const int64_t k = panel * kScanTile + r;
#pragma unroll
        for (int c = c0; c < c0 + 4; ++c) {
          const int64_t d = d0 + c;
          double x = 0, e = 0;
          if (d < call.dims && row[r] >= 0) x = load<T>(call.x.operand, offset[r] + d * call.x.step);
          if (d < call.dims && k < call.codes)
            e = any_at<double>(call.codebook, call.codebook_dtype, k * call.dims + d);
          if (!is_finite(x)) bad[r] = true;
          xs[c * kScanTile + r] = x;
          es[c * kScanTile + r] = e;
        }
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < kScanDepth; ++c) {
          double x[4], e[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[i] = xs[c * kScanTile + ty + 16 * i];
            e[i] = es[c * kScanTile + tx + 16 * i];
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) dot[i][j] = __fma_rn(x[i], e[j], dot[i][j]);
          }
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t k = panel * kScanTile + tx + 16 * j;
        const double bias = k < call.codes ? scan.bias[k] : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const double s = score_of(call.metric, dot[i][j], bias);
          // What cannot be chosen comes last, in the order of the codes.
          memory[(ty + 16 * i) * kScanTile + tx + 16 * j] = s == s && !bad[ty + 16 * i] ? s : INFINITY;
        }
      }
      __syncthreads();
      for (int r = warp; r < scan.height; r += kThreads / kWarp) {
        if (row[r] < 0) continue;
        const int64_t slot = static_cast<int64_t>(blockIdx.x) * scan.height + r;
        BestList list = {scan.score + slot * scan.k, scan.code + slot * scan.k, scan.k, filled[r], worst[r]};
        for (int half = 0; half < kScanTile; half += kWarp) {
          const int64_t k = panel * kScanTile + half;
          const double s = memory[r * kScanTile + half + lane];
          unsigned left = __ballot_sync(0xFFFFFFFFu, k + lane < call.codes && list.takes(s));
          for (; left != 0; left &= left - 1) {
            const int from = __ffs(static_cast<int>(left)) - 1;
            const double candidate = __shfl_sync(0xFFFFFFFFu, s, from);
            if (list.takes(candidate)) list.insert(candidate, k + from);
          }
        }
        __syncwarp();  // everyone has read filled and worst
        if (lane == 0) {
          filled[r] = list.filled;
          worst[r] = list.worst;
        }
      }
    }
    __syncthreads();
    if (splits > 1) {
      if (t < scan.height) scan.filled[static_cast<int64_t>(blockIdx.x) * scan.height + t] = filled[t];
      if (!last_to_arrive(scan.tickets + tile, static_cast<uint32_t>(splits))) continue;
    }
    for (int r = warp; r < scan.height; r += kThreads / kWarp) {
      const int64_t n = row[r];
      if (n < 0) continue;
      const int64_t slot = (splits > 1 ? tile * splits : static_cast<int64_t>(blockIdx.x)) * scan.height + r;
      BestList list = {scan.score + slot * scan.k, scan.code + slot * scan.k, scan.k, filled[r], INFINITY};
      if (splits > 1) {
        list.filled = scan.filled[slot];
        if (list.filled == list.k) list.worst = list.score[list.k - 1];
        for (int64_t s = 1; s < splits; ++s) {
          const int64_t other = slot + s * scan.height;
          for (int64_t i = 0; i < scan.filled[other]; ++i) {
            const double candidate = scan.score[other * scan.k + i];
            if (!list.takes(candidate)) break;
            list.insert(candidate, scan.code[other * scan.k + i]);
          }
        }
      }
      const bool used = call.mask == nullptr || call.mask[n] != 0;
      for (int64_t i = lane; i < scan.k; i += kWarp) {
        put_index(call.indices, n * scan.k + i, used ? list.code[i] : -1);
        if (call.scores == nullptr) continue;
        const double s = used ? list.score[i] : INFINITY;
        if (call.scores_f64) {
          static_cast<double*>(call.scores)[n * scan.k + i] = s;
        } else {
          static_cast<float*>(call.scores)[n * scan.k + i] = static_cast<float>(s);
        }
      }
    }
  }
}

}  // namespace vaeops::cuda
