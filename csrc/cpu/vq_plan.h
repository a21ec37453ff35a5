// A call's packed codebook and scratch memory. Included by vq_assign.cpp alone, after the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "cpu/strided.h"
#include "cpu/vq_assign.h"

namespace vaeops::cpu {
namespace {

// One allocation, cut into arrays. Kept between calls where the system offers it: see pages.cpp.
class Workspace {
 public:
  template <class T>
  void add(T*& array, int64_t n) {
    parts_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ += (static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64;  // a line to spare: vector loads may pass the end
  }
  void allocate() {
    data_ = take_pages(bytes_);
    kept_ = data_ != nullptr;
    if (!kept_) data_ = ::operator new(bytes_, std::align_val_t(64));
    for (const Part& part : parts_) *part.array = static_cast<char*>(data_) + part.offset;
  }
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (kept_) {
      give_pages(data_, bytes_);
    } else if (data_ != nullptr) {
      ::operator delete(data_, std::align_val_t(64));
    }
  }

 private:
  struct Part {
    void** array;
    size_t offset;
  };
  std::vector<Part> parts_;
  size_t bytes_ = 0;
  void* data_ = nullptr;
  bool kept_ = false;
};

template <class Body>
void parallel_ranges(ParallelFor parallel, int64_t n, const Body& body) {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    if (begin < end) (*static_cast<const Body*>(context))(begin, end);
  };
  parallel(n, call, const_cast<Body*>(&body));
}

int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// Scale and mean of the codes, from at most 1024 of them: any values serve, good ones make the bounds tight.
template <class T>
void centre(VqPlan& p) {
  const int64_t dims = p.dims, step = ceil_div(p.codes, 1024);
  const bool cosine = p.call->metric == Metric::cosine;
  const T* const codebook = static_cast<const T*>(p.call->codebook);
  std::vector<double> sum(static_cast<size_t>(dims));
  double most = 0;
  int64_t count = 0;
  for (int64_t k = 0; k < p.codes; k += step) {
    const T* const e = codebook + k * dims;
    double size = 0, square = 0;
    for (int64_t d = 0; d < dims; ++d) {
      const double v = widen(e[d]);
      size = std::max(size, std::fabs(v));
      square += v * v;
    }
    if (!(square < 0x1p900) || (cosine && !(square > 0x1p-900))) continue;
    most = std::max(most, size);
    const double factor = cosine ? 1 / std::sqrt(square) : 1;
    for (int64_t d = 0; d < dims; ++d) sum[d] += widen(e[d]) * factor;
    ++count;
  }
  p.scale = !cosine ? power_below(most, p.wide) : p.wide ? 0x1p450 : 1;
  for (int64_t d = 0; d < dims; ++d) {
    const double mean = count > 0 ? sum[d] / static_cast<double>(count) * (cosine ? 1 : p.scale) : 0;
    p.mean[d] = p.wide ? mean : static_cast<float>(mean);
    p.row_mean[d] = p.call->metric == Metric::l2 ? static_cast<float>(mean) : 0;
  }
}

void centre(VqPlan& p) {
  switch (p.call->codebook_dtype) {
    case Dtype::f32:
      return centre<float>(p);
    case Dtype::bf16:
      return centre<bf16>(p);
    case Dtype::f16:
      return centre<f16>(p);
    case Dtype::f64:
      return centre<double>(p);
  }
}

// `memory` holds the arrays.
VqPlan make_plan(const VqAssign& call, Workspace& memory, ParallelFor parallel) {
  VqPlan p{};
  p.call = &call;
  p.dims = call.dims;
  p.codes = call.codes;
  p.blocks = ceil_div(call.codes, kCodeBlock);
  p.amx = isa() == Isa::amx;
  p.wide = call.x.operand.dtype == Dtype::f64 || call.codebook_dtype == Dtype::f64;
  p.split = p.amx && 3 * p.dims + 3 <= 32;
  p.slots = p.amx ? round_up(p.split ? 3 * p.dims : p.dims, 32) : p.dims;
  p.bias_slots = p.amx && p.slots - (p.split ? 3 * p.dims : p.dims) >= 3;
  p.accumulation = static_cast<double>(p.slots + 16) * 0x1p-23;
  p.upper_vectors = 1;
  while (p.upper_vectors < 16 && p.upper_vectors * 4 < call.k) p.upper_vectors *= 2;
  p.most_groups = 64 + (call.k > 1 ? 4 * std::min<int64_t>(call.k, kCodeBlock) : 0);

  const int64_t groups = p.blocks * kBlockGroups, padded = p.blocks * kCodeBlock;
  char* tiles;
  memory.add(p.mean, p.dims);
  memory.add(p.row_mean, p.dims);
  memory.add(tiles, padded * p.slots * (p.amx ? 2 : 4));
  memory.add(p.bias, padded);
  memory.add(p.norm, groups);
  memory.add(p.residual, groups);
  memory.add(p.slack, groups);
  memory.add(p.raw_norm, groups);
  if (call.codebook_dtype != Dtype::f64) memory.add(p.columns, padded * p.dims);
  memory.add(p.half, padded);
  memory.allocate();
  p.tiles = tiles;
  centre(p);

  parallel_ranges(padded * p.dims <= kSerial ? serial : parallel, p.blocks, [&](int64_t begin, int64_t end) {
    Workspace own;
    double* columns;
    uint16_t* scratch;
    uint32_t* words;
    own.add(columns, p.dims * kGroup);
    own.add(scratch, p.slots * kGroup);
    own.add(words, kBlockGroups * VAEOPS_DISPATCH(group_step)(p));
    own.allocate();
    for (int64_t block = begin; block < end; ++block) VAEOPS_DISPATCH(pack_block)(p, block, columns, scratch, words);
  });
  p.largest = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const double norm = p.raw_norm[group];
    if (!(norm <= p.largest)) p.largest = norm;  // NaN, too
  }
  return p;
}

}  // namespace
}  // namespace vaeops::cpu
