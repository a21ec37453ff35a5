// Forward passes whose one value per element is summed by the call's reduction.
#pragma once
#include "fold.cuh"

namespace vaeops::cuda {

inline bool is_scalar(Reduction reduction) {
  return reduction == Reduction::batchmean || reduction == Reduction::mean || reduction == Reduction::sum;
}

inline int64_t row_length(const Shape& shape) { return shape.rows > 0 ? shape.n / shape.rows : 0; }

// Bytes of partial sums of a forward pass.
inline int64_t forward_scratch(const Shape& shape, Reduction reduction) {
  if (is_scalar(reduction)) {
    const int64_t grid = grid_for(ceil_div(shape.n, kThreads * kChunk), kMostBlocksPerSm);
    return grid > 1 ? grid * static_cast<int64_t>(sizeof(double)) : 0;
  }
  if ((reduction != Reduction::dim && reduction != Reduction::sample) || shape.rows == 0) return 0;
  return partials_of(row_fold(shape.rows, row_length(shape), reduction == Reduction::sample), 1);
}

// A forward pass that sums its Step's one output into `out` by `reduction`.
template <class Step>
int launch_forward(const typename Step::Call& call, void* out, const Scratch& scratch, CUstream_st* stream) {
  const Shape& shape = call.shape;
  const Reduction reduction = call.reduction;
  Sums sums;
  sums.scale = reduction_scale(reduction, shape);
  sums.partials = static_cast<double*>(scratch.partials);
  sums.tickets = scratch.tickets;
  if (reduction == Reduction::dim || reduction == Reduction::sample) {
    if (shape.rows == 0 || (reduction == Reduction::dim && shape.n == 0)) return 0;
    sums.out[0] = out;
    const Fold fold = row_fold(shape.rows, row_length(shape), reduction == Reduction::sample);
    return launch_fold<Step>(call, fold, sums, stream);
  }
  if (is_scalar(reduction)) sums.out[0] = out;
  if (shape.n == 0 && sums.out[0] == nullptr) return 0;
  return launch_flat<Step>(call, sums, stream);
}

// Rows are whole chunks, where the reduction walks along or across them.
inline bool whole_rows(const Shape& shape, Reduction reduction) {
  return shape.n % kChunk == 0 &&
         ((reduction != Reduction::dim && reduction != Reduction::sample) || row_length(shape) % kChunk == 0);
}

}  // namespace vaeops::cuda
