// The three ways in which a kernel walks over the elements, and the deterministic sums they end in.
//
//     flat     all elements alike; sums, if any, go to one scalar
//     rows     one sum per row: the summed elements are neighbours ("sample", a prior broadcast over its inner dims)
//     columns  one sum per column: the kept elements are neighbours ("dim", a prior broadcast over the batch)
//
// A Step does the work of 8 consecutive logical elements:
//     using Call, T;  kOutputs: values to sum per element;  kBlocks: per multiprocessor
//     run(call, i, count, sink): elements [i, i + count), count <= 8; gives every value to sink(output, e, value)
// Sums are fp64 (one addition in tens of instructions), in an order that depends on shapes alone, without float
// atomics. Where blocks share a sum, each leaves a partial sum and the last one to arrive adds them in index order.
#pragma once
#include "operand.cuh"

namespace vaeops::cuda {

// Where sums go: out[k] holds count elements of the compute type.
struct Sums {
  void* out[2] = {nullptr, nullptr};  // null: not wanted
  double scale = 1;                   // multiplies every sum
  double* partials = nullptr;
  uint32_t* tickets = nullptr;  // [kTickets]
};

template <class C>
__device__ __forceinline__ void put(const Sums& sums, int k, int64_t p, double sum) {
  if (sums.out[k] != nullptr) static_cast<C*>(sums.out[k])[p] = static_cast<C>(sum * sums.scale);
}

template <class Step>
__global__ void __launch_bounds__(kThreads, Step::kBlocks)
    flat_kernel(const __grid_constant__ typename Step::Call call, const __grid_constant__ Sums sums) {
  using C = Compute<typename Step::T>;
  const int64_t n = call.shape.n, step = gridDim.x * int64_t{kThreads * kChunk};
  double sum = 0;
  for (int64_t i = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kChunk; i < n; i += step) {
    C chunk = 0;
    Step::run(call, i, static_cast<int>(n - i < kChunk ? n - i : kChunk), [&](int, int, C value) {
      if constexpr (Step::kOutputs == 1) chunk += value;
    });
    sum += chunk;
  }
  if (sums.out[0] == nullptr) return;
  sum = block_sum(sum);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) sums.partials[blockIdx.x] = sum;
    if (!last_to_arrive(sums.tickets, gridDim.x)) return;
    sum = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) sum += __ldcg(sums.partials + b);
    sum = block_sum(sum);
  }
  if (threadIdx.x == 0) put<C>(sums, 0, 0, sum);
}

// The logical dims, each either kept or summed over; neighbours of one kind are merged, so kinds alternate.
struct Fold {
  int32_t ndim = 0;
  bool kept[kMaxDims] = {};
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // of the logical index
  int64_t kept_n = 1;             // P
  int64_t summed_n = 1;           // Q

  void add_inner(int64_t length, bool keep) {
    if (length == 1) return;
    (keep ? kept_n : summed_n) *= length;
    if (ndim > 0 && kept[ndim - 1] == keep) {
      size[ndim - 1] *= length;
    } else {
      kept[ndim] = keep;
      size[ndim++] = length;
    }
  }
  void finish() {
    if (ndim == 0) {
      kept[0] = true;
      size[ndim++] = 1;
    }
    int64_t step = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      stride[d] = step;
      step *= size[d];
    }
  }
  __host__ __device__ bool in_rows() const { return !kept[ndim - 1]; }
  __host__ __device__ int64_t inner() const { return size[ndim - 1]; }
  // Chunks of 8 in the dims of the innermost one's kind; none crosses the innermost dim's end.
  __host__ __device__ int64_t chunks() const {
    const int64_t along = in_rows() ? summed_n : kept_n;
    return along == 0 ? 0 : along / inner() * ((inner() + kChunk - 1) / kChunk);
  }
};

// Chunk `c` of a Fold: index of its first element in its kind, and how many elements it has.
__device__ __forceinline__ int64_t chunk_start(const Fold& fold, int64_t c, int& count) {
  const int64_t inner = fold.inner(), per_run = (inner + kChunk - 1) / kChunk;
  int64_t within = c, run = 0;
  if (fold.ndim > 2) run = divide(c, per_run, within);
  const int64_t first = within * kChunk;
  count = static_cast<int>(inner - first < kChunk ? inner - first : kChunk);
  return run * inner + first;
}

// Logical index of kept element p, summed element q.
__device__ __forceinline__ int64_t place(const Fold& fold, int64_t p, int64_t q) {
  int64_t i = 0;
  for (int d = fold.ndim - 1; d >= 0; --d) {
    int64_t rest = fold.kept[d] ? p : q, index = rest;
    if (d > 1) {  // dims 0 and 1 are the outermost of their kinds: what is left is their index
      rest = divide(rest, fold.size[d], index);
      if (fold.kept[d]) p = rest;
      if (!fold.kept[d]) q = rest;
    }
    i += index * fold.stride[d];
  }
  return i;
}

// A row is summed by a team of 8, 32 or 256 threads, the long ones in tiles of kTile chunks. Both depend on the row's
// length alone: a row's sum does not depend on how many rows there are.
constexpr int64_t kTile = 1024;

struct Rows {
  int32_t team;
  int64_t tiles;            // per row
  int64_t rows_per_ticket;  // rows whose tiles count on one ticket

  static Rows plan(const Fold& fold) {
    const int64_t chunks = fold.chunks();
    return {chunks <= 8     ? 8
            : chunks <= 256 ? kWarp
                            : kThreads,
            chunks <= kTile ? 1 : ceil_div(chunks, kTile), ceil_div(fold.kept_n, kTickets)};
  }

  // True, in the whole block, for the last of all tiles that count on row p's ticket: those of rows [row0, row1).
  __device__ __forceinline__ bool last_tile(uint32_t* tickets, int64_t p, int64_t count, int64_t& row0,
                                            int64_t& row1) const {
    const int64_t ticket = p / rows_per_ticket;
    row0 = ticket * rows_per_ticket;
    row1 = row0 + rows_per_ticket < count ? row0 + rows_per_ticket : count;
    return last_to_arrive(tickets + ticket, static_cast<uint32_t>((row1 - row0) * tiles));
  }
};

// Blocks per multiprocessor: the walk's own index arithmetic takes registers beside the Step's.
template <class Step>
constexpr int kRowBlocks = Step::kOutputs > 1  ? 2
                           : Step::kBlocks < 3 ? Step::kBlocks
                                               : 3;
constexpr int kColumnBlocks = 2;

template <class Step>
__global__ void __launch_bounds__(kThreads, kRowBlocks<Step>)
    rows_kernel(const __grid_constant__ typename Step::Call call, const __grid_constant__ Fold fold, const Rows rows,
                const __grid_constant__ Sums sums) {
  using C = Compute<typename Step::T>;
  const int team = rows.team, lane = threadIdx.x % team, teams = kThreads / team;
  const int64_t items = fold.kept_n * rows.tiles, chunks = fold.chunks();
  // Whole blocks leave the loop together, since the sums need every thread.
  for (int64_t first = blockIdx.x * int64_t{teams}; first < items; first += gridDim.x * int64_t{teams}) {
    const int64_t item = first + threadIdx.x / team;
    int64_t tile = 0, p = item;
    if (rows.tiles > 1) p = divide(item, rows.tiles, tile);
    double sum[Step::kOutputs] = {};
    if (item < items) {
      const int64_t end = (tile + 1) * kTile < chunks ? (tile + 1) * kTile : chunks;
      for (int64_t c = tile * kTile + lane; c < end; c += team) {
        int count;
        const int64_t q = chunk_start(fold, c, count);
        C chunk[Step::kOutputs] = {};
        Step::run(call, place(fold, p, q), count, [&](int k, int, C value) { chunk[k] += value; });
#pragma unroll
        for (int k = 0; k < Step::kOutputs; ++k) sum[k] += chunk[k];
      }
    }
#pragma unroll
    for (int k = 0; k < Step::kOutputs; ++k) {
      sum[k] = team == kThreads ? block_sum(sum[k]) : team_sum(sum[k], team);
      if (lane != 0 || item >= items) continue;
      if (rows.tiles == 1) {
        put<C>(sums, k, p, sum[k]);
      } else {
        sums.partials[(k * fold.kept_n + p) * rows.tiles + tile] = sum[k];
      }
    }
    if (rows.tiles == 1) continue;
    int64_t row0, row1;
    if (!rows.last_tile(sums.tickets, p, fold.kept_n, row0, row1)) continue;
    for (int64_t row = row0 + threadIdx.x / kWarp; row < row1; row += kThreads / kWarp) {
#pragma unroll
      for (int k = 0; k < Step::kOutputs; ++k) {
        const double* from = sums.partials + (k * fold.kept_n + row) * rows.tiles;
        double total = 0;
        for (int64_t t = threadIdx.x % kWarp; t < rows.tiles; t += kWarp) total += __ldcg(from + t);
        total = team_sum(total, kWarp);
        if (threadIdx.x % kWarp == 0) put<C>(sums, k, row, total);
      }
    }
  }
}

// A block takes `across` chunks of columns, each with kThreads / across threads, over one slab of the summed elements.
struct Columns {
  int32_t across;
  int64_t groups;  // of columns
  int64_t slabs;   // more than one only where the groups alone would leave the device idle
  int64_t slab;    // summed elements in a slab

  static Columns plan(const Fold& fold) {
    const int64_t chunks = fold.chunks(), q = fold.summed_n;
    int32_t across = 1;
    while (across < chunks && (across < 8 || (across < kThreads && kThreads / across >= 2 * q))) across *= 2;
    const int64_t groups = ceil_div(chunks, across), deep = kThreads / across;
    int64_t slabs = groups > 0 ? resident_blocks(kColumnBlocks) / groups : 1;
    if (slabs > ceil_div(q, 4 * deep)) slabs = ceil_div(q, 4 * deep);
    if (slabs < 1) slabs = 1;
    const int64_t slab = ceil_div(ceil_div(q, slabs), deep) * deep;
    return {across, groups, slab > 0 ? ceil_div(q, slab) : 1, slab};
  }
};

// Sums table[e][t] over the threads t of each column (t % across); the result lies in table[e][t < across].
template <int kRows>
__device__ __forceinline__ void sum_down(double (&table)[kRows][kThreads], int across) {
  for (int half = kThreads / 2; half >= across; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
#pragma unroll
      for (int e = 0; e < kRows; ++e) table[e][threadIdx.x] += table[e][threadIdx.x + half];
    }
  }
  __syncthreads();
}

template <class Step>
__global__ void __launch_bounds__(kThreads, kColumnBlocks)
    columns_kernel(const __grid_constant__ typename Step::Call call, const __grid_constant__ Fold fold,
                   const Columns columns, const __grid_constant__ Sums sums) {
  using C = Compute<typename Step::T>;
  // Outside of sum_down, which begins and ends with a barrier, a thread touches its own column alone.
  __shared__ double table[Step::kOutputs * kChunk][kThreads];
  const int x = threadIdx.x % columns.across, y = threadIdx.x / columns.across, deep = kThreads / columns.across;
  const int64_t chunks = fold.chunks();
  for (int64_t item = blockIdx.x; item < columns.groups * columns.slabs; item += gridDim.x) {
    int64_t slab = 0, group = item;
    if (columns.slabs > 1) group = divide(item, columns.slabs, slab);
    const int64_t c = group * columns.across + x;
    int count = 0;
    const int64_t p = c < chunks ? chunk_start(fold, c, count) : 0;
#pragma unroll
    for (int e = 0; e < Step::kOutputs * kChunk; ++e) table[e][threadIdx.x] = 0;
    const int64_t end = (slab + 1) * columns.slab < fold.summed_n ? (slab + 1) * columns.slab : fold.summed_n;
    if (count > 0) {
      for (int64_t q = slab * columns.slab + y; q < end; q += deep) {
        Step::run(call, place(fold, p, q), count,
                  [&](int k, int e, C value) { table[k * kChunk + e][threadIdx.x] += value; });
      }
    }
    sum_down(table, columns.across);
    if (y == 0) {
      for (int k = 0; k < Step::kOutputs; ++k) {
        for (int e = 0; e < count; ++e) {
          const double sum = table[k * kChunk + e][x];
          if (columns.slabs == 1) {
            put<C>(sums, k, p + e, sum);
          } else {
            sums.partials[(k * columns.slabs + slab) * fold.kept_n + p + e] = sum;
          }
        }
      }
    }
    if (columns.slabs > 1 && last_to_arrive(sums.tickets + group, static_cast<uint32_t>(columns.slabs))) {
#pragma unroll
      for (int e = 0; e < Step::kOutputs * kChunk; ++e) {
        const int k = e / kChunk;
        double total = 0;
        if (e % kChunk < count) {
          for (int64_t s = y; s < columns.slabs; s += deep) {
            total += __ldcg(sums.partials + (k * columns.slabs + s) * fold.kept_n + p + e % kChunk);
          }
        }
        table[e][threadIdx.x] = total;
      }
      sum_down(table, columns.across);
      if (y == 0) {
        for (int k = 0; k < Step::kOutputs; ++k) {
          for (int e = 0; e < count; ++e) put<C>(sums, k, p + e, table[k * kChunk + e][x]);
        }
      }
    }
  }
}

// Bytes of partial sums, at most.
inline int64_t partials_of(const Fold& fold, int outputs) {
  const int64_t parts = fold.in_rows() ? Rows::plan(fold).tiles : Columns::plan(fold).slabs;
  return parts > 1 ? outputs * fold.kept_n * parts * static_cast<int64_t>(sizeof(double)) : 0;
}

template <class Step>
int launch_flat(const typename Step::Call& call, const Sums& sums, CUstream_st* stream) {
  const unsigned grid = grid_for(ceil_div(call.shape.n, kThreads * kChunk), Step::kBlocks);
  VAEOPS_LAUNCH((flat_kernel<Step>), grid, kThreads, stream, call, sums);
  return static_cast<int>(cudaGetLastError());
}

template <class Step>
int launch_fold(const typename Step::Call& call, const Fold& fold, const Sums& sums, CUstream_st* stream) {
  if (fold.in_rows()) {
    const Rows rows = Rows::plan(fold);
    const unsigned grid = grid_for(ceil_div(fold.kept_n * rows.tiles, kThreads / rows.team), kRowBlocks<Step>);
    VAEOPS_LAUNCH((rows_kernel<Step>), grid, kThreads, stream, call, fold, rows, sums);
  } else {
    const Columns columns = Columns::plan(fold);
    const unsigned grid = grid_for(columns.groups * columns.slabs, kColumnBlocks);
    VAEOPS_LAUNCH((columns_kernel<Step>), grid, kThreads, stream, call, fold, columns, sums);
  }
  return static_cast<int>(cudaGetLastError());
}

// "sample" and "dim" over R rows of L elements.
inline Fold row_fold(int64_t rows, int64_t length, bool keep_rows) {
  Fold fold;
  fold.kept_n = keep_rows ? rows : length;
  fold.summed_n = keep_rows ? length : rows;
  fold.ndim = 2;
  fold.size[0] = rows;
  fold.size[1] = length;
  fold.kept[0] = keep_rows;
  fold.kept[1] = !keep_rows;
  fold.stride[0] = length;
  fold.stride[1] = 1;
  return fold;
}

}  // namespace vaeops::cuda
