// (sum t) logsumexp(x) - sum t x of each row of logits, by an online logsumexp: one pass, no softmax kept. Formulas:
// vaeops/ref/recon.py (multinomial_fwd, multinomial_bwd).
//
// Rows are cut as in fold.cuh: a team of 8, 32 or 256 threads for a row, or for a tile of a long one, by its length.
#include "chunk.cuh"
#include "fold.cuh"

namespace vaeops::cuda {
namespace {

template <class C>
constexpr int kBlocks = sizeof(C) == 8 ? 2 : 3;  // per multiprocessor
constexpr int kNumbers = 4;                      // of a tile: top, sum, total, drawn

// Strides of an operand of [R, D], whose dims may have been merged into one.
void set_matrix(const Shape& shape, Operand& operand) {
  if (shape.ndim > 1) return;
  operand.stride[1] = operand.stride[0];
  operand.stride[0] *= shape.width;
}

bool is_matrix(const Shape& shape) { return shape.ndim == 1 || (shape.ndim == 2 && shape.size[1] == shape.width); }

template <class Call>
Call as_matrix(const Call& call) {
  Call matrix = call;
  set_matrix(call.shape, matrix.logits);
  set_matrix(call.shape, matrix.target);
  set_matrix(call.shape, matrix.weight);
  return matrix;
}

// Item q of a row and those behind it.
__device__ __forceinline__ int64_t item_at(const Operand& operand, int64_t row, int64_t q) {
  return row * operand.stride[0] + q * operand.stride[1];
}

__device__ __forceinline__ bool in_vectors(const Operand& operand, int64_t at) {
  return operand.data == nullptr || (operand.stride[1] == 1 && vectors_at(operand, at));
}

template <class C>
__device__ __forceinline__ void gather(const Operand& from, int64_t at, int count, C missing, C (&x)[kChunk]) {
#pragma unroll
  for (int e = 0; e < kChunk; ++e) x[e] = e < count ? load_value<C>(from, at + e * from.stride[1]) : missing;
}

// Logits and weighted counts of up to eight items of a row. An item that is missing or masked out has x = -inf, t = 0.
template <class C>
struct Items {
  C x[kChunk], t[kChunk];
  unsigned out = 0;  // a bit for each item that is masked out

  __device__ __forceinline__ Items(const Multinomial& call, int64_t row, int64_t q, int count) {
    const int64_t x_at = item_at(call.logits, row, q), t_at = item_at(call.target, row, q);
    const int64_t w_at = item_at(call.weight, row, q);
    const bool weighted = call.weight.data != nullptr;
    C w[kChunk];
    bool vectors = false;
    if constexpr (sizeof(C) == 4) {
      vectors = count == kChunk && in_vectors(call.logits, x_at) && in_vectors(call.target, t_at) &&
                in_vectors(call.weight, w_at);
      if (vectors) {
        const Raw logits = load_raw(call.logits, x_at), target = load_raw(call.target, t_at);
        const Raw weight = weighted ? load_raw(call.weight, w_at) : Raw{};
        widen(logits, call.logits, x);
        widen(target, call.target, t);
        if (weighted) widen(weight, call.weight, w);
      }
    }
    if (!vectors) {
      gather(call.logits, x_at, count, static_cast<C>(-INFINITY), x);
      gather(call.target, t_at, count, C(0), t);
      if (weighted) gather(call.weight, w_at, count, C(1), w);
    }
    if (!weighted) return;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (!call.weight.bytes) {
        t[e] *= w[e];
      } else if (w[e] == 0) {
        x[e] = static_cast<C>(-INFINITY);
        t[e] = 0;
        out |= 1u << e;
      }
    }
  }
};

// What the exponentials of a sum are taken relative to: its largest logit, where that is finite.
template <class C>
__device__ __forceinline__ C shift_of(C top) {
  return top - top == 0 ? top : C(0);
}

// Sums of some items: exp(x - shift), t, t (x - shift).
template <class C>
struct Online {
  C top = static_cast<C>(-INFINITY), shift = 0, sum = 0, total = 0, drawn = 0;

  __device__ __forceinline__ void add(const Items<C>& items) {
    C highest = top;
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      highest = items.x[e] > highest ? items.x[e] : highest;  // NaN reaches the sum alone
    if (highest > top) {
      const C next = shift_of(highest);
      if (sum != 0) sum *= exp(shift - next);
      drawn -= total * (next - shift);
      top = highest;
      shift = next;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      const C x = items.x[e] - shift, t = items.t[e];
      sum += exp(x);
      total += t;
      drawn += t == 0 ? C(0) : t * x;
    }
  }
};

// The largest over a team of threads, in every thread of it. All threads of the block must call.
template <class C>
__device__ __forceinline__ C team_max(C x, int team) {
  for (int step = (team < kWarp ? team : kWarp) / 2; step > 0; step /= 2) {
    const C other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
    x = other > x ? other : x;
  }
  if (team <= kWarp) return x;
  __shared__ C warps[kThreads / kWarp];
  __syncthreads();  // an earlier call's values have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarp; ++w) x = warps[w] > x ? warps[w] : x;
  return x;
}

template <class C>
__device__ __forceinline__ void finish(const MultinomialForward& call, int64_t row, double top, double sum,
                                       double total, double drawn) {
  const double lse = shift_of(top) + log(sum);
  call.lse[row] = lse;
  static_cast<C*>(call.total)[row] = static_cast<C>(total);
  static_cast<C*>(call.nll)[row] = static_cast<C>((total == 0 ? 0 : total * lse) - drawn);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocks<C>)
    multinomial_forward_kernel(const __grid_constant__ MultinomialForward call, const Rows rows,
                               const Scratch scratch) {
  const int team = rows.team, lane = threadIdx.x % team, teams = kThreads / team;
  const int64_t items = call.shape.rows * rows.tiles, width = call.shape.width, chunks = (width + kChunk - 1) / kChunk;
  double* const partials = static_cast<double*>(scratch.partials);  // [R, tiles, kNumbers]
  // Whole blocks leave the loop together, since the sums need every thread.
  for (int64_t first = blockIdx.x * int64_t{teams}; first < items; first += gridDim.x * int64_t{teams}) {
    const int64_t item = first + threadIdx.x / team;
    int64_t tile = 0, row = item;
    if (rows.tiles > 1) row = divide(item, rows.tiles, tile);
    Online<C> own;
    if (item < items) {
      const int64_t end = (tile + 1) * kTile < chunks ? (tile + 1) * kTile : chunks;
      for (int64_t c = tile * kTile + lane; c < end; c += team) {
        const int64_t q = c * kChunk;
        own.add(Items<C>(call, row, q, static_cast<int>(width - q < kChunk ? width - q : kChunk)));
      }
    }
    const C top = team_max(own.top, team);
    double sum = own.sum == 0 ? 0 : static_cast<double>(own.sum * exp(own.shift - shift_of(top)));
    double total = own.total, drawn = own.drawn + static_cast<double>(own.total) * own.shift;
    const auto summed = [&](double x) { return team == kThreads ? block_sum(x) : team_sum(x, team); };
    sum = summed(sum);
    total = summed(total);
    drawn = summed(drawn);
    if (lane == 0 && item < items) {
      if (rows.tiles == 1) {
        finish<C>(call, row, top, sum, total, drawn);
      } else {
        double* const to = partials + item * kNumbers;
        to[0] = top;
        to[1] = sum;
        to[2] = total;
        to[3] = drawn;
      }
    }
    if (rows.tiles == 1) continue;
    int64_t row0, row1;
    if (!rows.last_tile(scratch.tickets, row, call.shape.rows, row0, row1)) continue;
    for (int64_t r = row0 + threadIdx.x / kWarp; r < row1; r += kThreads / kWarp) {
      const double* const from = partials + r * rows.tiles * kNumbers;
      double highest = -INFINITY;
      for (int64_t k = threadIdx.x % kWarp; k < rows.tiles; k += kWarp) {
        const double x = __ldcg(from + k * kNumbers);
        highest = x > highest ? x : highest;
      }
      highest = team_max(highest, kWarp);
      sum = total = drawn = 0;
      for (int64_t k = threadIdx.x % kWarp; k < rows.tiles; k += kWarp) {
        const double* const tile_from = from + k * kNumbers;
        const double part = __ldcg(tile_from + 1);
        if (part != 0) sum += part * exp(shift_of(__ldcg(tile_from)) - shift_of(highest));
        total += __ldcg(tile_from + 2);
        drawn += __ldcg(tile_from + 3);
      }
      sum = team_sum(sum, kWarp);
      total = team_sum(total, kWarp);
      drawn = team_sum(drawn, kWarp);
      if (threadIdx.x % kWarp == 0) finish<C>(call, r, highest, sum, total, drawn);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocks<C>)
    multinomial_backward_kernel(const __grid_constant__ MultinomialBackward call, const Rows rows) {
  const int team = rows.team, lane = threadIdx.x % team, teams = kThreads / team;
  const int64_t items = call.shape.rows * rows.tiles, width = call.shape.width, chunks = (width + kChunk - 1) / kChunk;
  for (int64_t item = blockIdx.x * int64_t{teams} + threadIdx.x / team; item < items;
       item += gridDim.x * int64_t{teams}) {
    int64_t tile = 0, row = item;
    if (rows.tiles > 1) row = divide(item, rows.tiles, tile);
    const C grad = static_cast<const C*>(call.grad)[row], total = static_cast<const C*>(call.total)[row];
    const double lse = call.lse[row] == -INFINITY ? 0 : call.lse[row];
    // In two parts: logits may be as large as it, and what is left of them has its last digits.
    const C high = static_cast<C>(lse), low = high - high == 0 ? static_cast<C>(lse - high) : C(0);
    const int64_t end = (tile + 1) * kTile < chunks ? (tile + 1) * kTile : chunks;
    for (int64_t c = tile * kTile + lane; c < end; c += team) {
      const int64_t q = c * kChunk, to = item_at(call.glogits, row, q);
      const int count = static_cast<int>(width - q < kChunk ? width - q : kChunk);
      const Items<C> items_of(call, row, q, count);
      C g[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const C expected = total == 0 ? C(0) : total * exp(items_of.x[e] - high - low);
        g[e] = (items_of.out >> e & 1u) != 0 ? C(0) : grad * (expected - items_of.t[e]);
      }
      if constexpr (sizeof(C) == 4) {
        if (count == kChunk && in_vectors(call.glogits, to)) {
          store_chunk(call.glogits, to, g);
          continue;
        }
      }
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (e < count) store_value(call.glogits, to + e * call.glogits.stride[1], g[e]);
      }
    }
  }
}

Rows plan(const Multinomial& call) { return Rows::plan(row_fold(call.shape.rows, call.shape.width, true)); }

template <class C>
unsigned grid(const Multinomial& call, const Rows& rows) {
  return grid_for(ceil_div(call.shape.rows * rows.tiles, kThreads / rows.team), kBlocks<C>);
}

}  // namespace

int64_t multinomial_forward_scratch(const MultinomialForward& call) {
  const Rows rows = plan(call);
  return rows.tiles > 1 ? call.shape.rows * rows.tiles * kNumbers * static_cast<int64_t>(sizeof(double)) : 0;
}

int multinomial_forward(const MultinomialForward& call, Scratch scratch, CUstream_st* stream) {
  if (!is_matrix(call.shape)) return static_cast<int>(cudaErrorInvalidValue);
  if (call.shape.rows == 0) return 0;
  const Rows rows = plan(call);
  const MultinomialForward matrix = as_matrix(call);
  if (call.logits.dtype == Dtype::f64) {
    VAEOPS_LAUNCH((multinomial_forward_kernel<double>), grid<double>(call, rows), kThreads, stream, matrix, rows,
                  scratch);
  } else {
    VAEOPS_LAUNCH((multinomial_forward_kernel<float>), grid<float>(call, rows), kThreads, stream, matrix, rows,
                  scratch);
  }
  return static_cast<int>(cudaGetLastError());
}

int multinomial_backward(const MultinomialBackward& call, CUstream_st* stream) {
  if (!is_matrix(call.shape)) return static_cast<int>(cudaErrorInvalidValue);
  if (call.shape.n == 0) return 0;
  const Rows rows = plan(call);
  MultinomialBackward matrix = as_matrix(call);
  set_matrix(call.shape, matrix.glogits);
  if (call.logits.dtype == Dtype::f64) {
    VAEOPS_LAUNCH((multinomial_backward_kernel<double>), grid<double>(call, rows), kThreads, stream, matrix, rows);
  } else {
    VAEOPS_LAUNCH((multinomial_backward_kernel<float>), grid<float>(call, rows), kThreads, stream, matrix, rows);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace vaeops::cuda
