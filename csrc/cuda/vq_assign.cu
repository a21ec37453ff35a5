// Nearest codes. The definition is in vaeops/ref/vq.py; every index here is the definition's, bit for bit:
//
//     tiles   vq_assign.cuh: which groups of codes can hold the nearest one, in fp32 with a rigorous bound
//     refine  the canonical fp64 scores of those few; rows that the bound does not settle go to a list
//     scan    vq_scan.cuh: the canonical scores of all codes, for listed rows, small codebooks and the k nearest
#include "vq_assign.cuh"
#include "vq_scan.cuh"

namespace vaeops::cuda {
namespace {

constexpr int kRefineBlocks = 4;  // per multiprocessor

// A team of 8 lanes per row, a lane per code of a group.
template <class T>
__global__ void __launch_bounds__(kThreads, kRefineBlocks)
    refine_kernel(const __grid_constant__ VqAssign call, const __grid_constant__ Pass pass, bool vectors) {
  constexpr int kTeams = kThreads / kGroup;
  const int lane = threadIdx.x % kGroup;
  const int64_t count = call.shape.n, dims = call.dims;
  for (int64_t first = blockIdx.x * int64_t{kTeams}; first < count; first += gridDim.x * int64_t{kTeams}) {
    const int64_t n = first + threadIdx.x / kGroup;
    const bool used = n < count && (call.mask == nullptr || call.mask[n] != 0);
    float floor = -INFINITY, rest = -INFINITY, reach = -INFINITY;
    for (int64_t s = 0; s < pass.splits && used; ++s) {
      const Record& record = pass.records[s * count + n];
      floor = fmaxf(floor, record.floor);
      rest = fmaxf(rest, record.rest);
      for (int c = 0; c < kKept; ++c) {
        if (record.group[c] >= 0) reach = fmaxf(reach, record.reach[c]);
      }
    }
    // Without the certificate's cost: the group with the best fp32 score, whatever the others may hold.
    const bool settled = call.exact ? rest < floor : floor > -INFINITY && reach < INFINITY;
    if (!call.exact) floor = reach;
    double best = INFINITY;
    int64_t index = 0;
    if (used && settled) {
      const int64_t offset = row_offset(call.shape, call.x.operand, n), step = call.x.step;
      for (int64_t s = 0; s < pass.splits; ++s) {
        const Record& record = pass.records[s * count + n];
        for (int c = 0; c < kKept; ++c) {
          const int64_t k = record.group[c] * int64_t{kGroup} + lane;
          if (record.group[c] < 0 || record.reach[c] < floor || k >= call.codes) continue;
          double dot = 0;
          int64_t d = 0;
          if (vectors) {
            for (; d < dims; d += kChunk) {
              float e[kChunk];
              load_chunk<float>(call.codebook, k * dims + d, e);
#pragma unroll
              for (int i = 0; i < kChunk; ++i)
                dot = __fma_rn(load<T>(call.x.operand, offset + (d + i) * step), e[i], dot);
            }
          } else {
            for (; d < dims; ++d) {
              dot = __fma_rn(load<T>(call.x.operand, offset + d * step),
                             any_at<double>(call.codebook, call.codebook_dtype, k * dims + d), dot);
            }
          }
          const double score = score_of(call.metric, dot, pass.bias[k]);
          if (score < best || (score == best && k < index)) {
            best = score;
            index = k;
          }
        }
      }
    }
    for (int width = 1; width < kGroup; width *= 2) {
      const double other = __shfl_xor_sync(0xFFFFFFFFu, best, width);
      const int64_t other_index = __shfl_xor_sync(0xFFFFFFFFu, index, width);
      if (other < best || (other == best && other_index < index)) {
        best = other;
        index = other_index;
      }
    }
    if (lane != 0 || n >= count) continue;
    if (used && !settled) {
      pass.list[atomicAdd(&pass.frame->listed, 1ull)] = n;
    } else {
      put_index(call.indices, n, used ? index : -1);
    }
  }
}

constexpr int64_t kWorkspace = int64_t{4} << 20;  // beyond what grows with the call

// Which kernels run, and their memory: within 8 K D + 64 N bytes + 16 MB.
struct Plan {
  Pass pass;
  Scan scan;
  bool fast;  // the scan takes only what the fast pass leaves
  unsigned tiles_grid = 1;
  int64_t bytes;

  Plan(const VqAssign& call, Scratch scratch) : fast(call.k == 0 && call.codes > kTileCodes && call.dims <= kMostDims) {
    Arena arena(scratch.partials);
    const int64_t blocks = resident_blocks(kScanBlocks), n = call.shape.n;
    pass.tickets = scan.tickets = scratch.tickets;
    pass.bias = arena.take<double>(call.codes);
    scan.bias = pass.bias;
    scan.k = call.k > 0 ? call.k : 1;
    // As many rows at a time as their lists allow.
    const int64_t most = (2 * kWorkspace + 4 * call.codes * call.dims) / (24 * scan.k);
    const int64_t height = most / blocks;
    scan.height = static_cast<int32_t>(height < 1 ? 1 : height < kScanTile ? height : kScanTile);
    if (n < scan.height) scan.height = static_cast<int32_t>(n);
    const int64_t grid = most / scan.height;
    scan.grid = static_cast<unsigned>(grid < 1 ? 1 : grid < blocks ? grid : blocks);
    scan.take(arena);
    if (fast) {
      pass.tiles = ceil_div(call.codes, kTileCodes);
      const int64_t row_tiles = ceil_div(n, kTileRows), parallel = resident_blocks(kTileBlocks);
      const int64_t affordable = 1 + kWorkspace / (n * static_cast<int64_t>(sizeof(Record)));
      int64_t splits = parallel / row_tiles;
      splits = splits < affordable ? splits : affordable;
      splits = splits < 1 ? 1 : splits < pass.tiles ? splits : pass.tiles;
      pass.splits = ceil_div(pass.tiles, ceil_div(pass.tiles, splits));
      tiles_grid = grid_for(row_tiles * pass.splits, kTileBlocks);
      pass.packed = arena.take<float>(pass.tiles * kTileCodes * call.dims);
      pass.lead = arena.take<float>(pass.tiles * kTileCodes);
      pass.margin = arena.take<float>(pass.tiles * kGroups * 2);
      pass.mean = arena.take<float>(call.dims);
      pass.partials = arena.take<double>(2 * kTickets);
      pass.frame = arena.take<Frame>(1);
      pass.records = arena.take<Record>(pass.splits * n);
      pass.list = arena.take<int64_t>(n);
      scan.rows = pass.list;
      if (pass.frame != nullptr) scan.count = &pass.frame->listed;
    }
    bytes = arena.bytes();
  }
};

}  // namespace

int64_t vq_assign_scratch(const VqAssign& call) { return call.shape.n > 0 ? Plan(call, {}).bytes : 0; }

int vq_assign(const VqAssign& call, Scratch scratch, CUstream_st* stream) {
  if (call.shape.n == 0) return 0;
  const Plan plan(call, scratch);
  const Pass& pass = plan.pass;
  if (plan.fast) {
    VAEOPS_LAUNCH(frame_kernel, grid_for(ceil_div(call.dims, kWarp), 1), kThreads, stream, call, pass);
  }
  VAEOPS_LAUNCH(pack_kernel, grid_for(ceil_div(call.codes, kThreads), 4), kThreads, stream, call, pass);
  return dispatch(call.x.operand.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (plan.fast) {
      const bool vectors = call.codebook_dtype == Dtype::f32 && call.dims % kChunk == 0 && aligned(call.codebook);
      VAEOPS_LAUNCH((tiles_kernel<T>), plan.tiles_grid, kThreads, stream, call, pass);
      VAEOPS_LAUNCH((refine_kernel<T>), grid_for(ceil_div(call.shape.n, kThreads / kGroup), kRefineBlocks), kThreads,
                    stream, call, pass, vectors);
    }
    VAEOPS_LAUNCH((scan_kernel<T>), plan.scan.grid, kThreads, stream, call, plan.scan);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace vaeops::cuda
