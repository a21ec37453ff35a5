// How a binding runs a call on CPU tensors.
#pragma once
#include <algorithm>

#include "bind/common.h"

namespace vaeops::bind {

#define VAEOPS_DEVICE CPU
#define VAEOPS_OVERLOAD ".cpp"

struct Device {
  explicit Device(const Tensor&) {}

  static void check(const Tensor& x, const char* name) { STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor"); }

  // An output like x. Large ones come from pages that are kept between calls.
  static Tensor fresh_like(const Tensor& x) {
    const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
    void* const data = bytes >= cpu::kLargeOutput && is_dense(x) ? cpu::take_pages(bytes) : nullptr;
    return data == nullptr ? uninitialized_like(x) : on_pages(data, bytes, x.sizes(), x.strides(), x.scalar_type(), x);
  }

  // A row-major output.
  static Tensor fresh(const Tensor& like, const int64_t* sizes, int64_t rank, ScalarType dtype) {
    int64_t strides[kMaxRank];
    row_major(sizes, rank, strides);
    return fresh(like, sizes, strides, rank, dtype);
  }

  // An output of dense strides.
  static Tensor fresh(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t rank,
                      ScalarType dtype) {
    size_t bytes = dtype == ScalarType::Byte                                    ? 1
                   : dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? 2
                   : dtype == ScalarType::Float || dtype == ScalarType::Int     ? 4
                                                                                : 8;
    for (int64_t d = 0; d < rank; ++d) bytes *= static_cast<size_t>(sizes[d]);
    void* const data = bytes >= cpu::kLargeOutput ? cpu::take_pages(bytes) : nullptr;
    if (data == nullptr) return empty(like, sizes, strides, rank, dtype_code(dtype));
    return on_pages(data, bytes, IntHeaderOnlyArrayRef(sizes, rank), IntHeaderOnlyArrayRef(strides, rank), dtype, like);
  }

  // A flat fp32 output.
  static Tensor fresh_floats(const Tensor& like, int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(float);
    const int64_t size[1] = {n}, stride[1] = {1};
    void* const data = bytes >= cpu::kLargeOutput ? cpu::take_pages(bytes) : nullptr;
    if (data == nullptr) return empty(like, size, 1, ScalarType::Float);
    return on_pages(data, bytes, IntHeaderOnlyArrayRef(size, 1), IntHeaderOnlyArrayRef(stride, 1), ScalarType::Float,
                    like);
  }

  // On a GPU this would cost a synchronisation.
  static void check_range(const Indices& indices, int64_t n, int64_t codes) {
    indices.int32 ? check_range(static_cast<const int32_t*>(indices.data), n, codes)
                  : check_range(static_cast<const int64_t*>(indices.data), n, codes);
  }

  static void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }

  void run(const GaussianForward& call) const { cpu::gaussian_forward(call, parallel); }
  void run(const GaussianBackward& call) const { cpu::gaussian_backward(call, parallel); }
  void run(const LogProbForward& call) const { cpu::log_prob_forward(call, parallel); }
  void run(const LogProbBackward& call) const { cpu::log_prob_backward(call, parallel); }
  void run(const ReconForward& call) const { cpu::recon_forward(call, parallel); }
  void run(const ReconBackward& call) const { cpu::recon_backward(call, parallel); }
  void run(const MultinomialForward& call) const { cpu::multinomial_forward(call, parallel); }
  void run(const MultinomialBackward& call) const { cpu::multinomial_backward(call, parallel); }
  void run(const VqAssign& call) const { cpu::vq_assign(call, parallel); }
  void run(const VqGather& call) const { cpu::vq_gather(call, parallel); }
  void run(const VqGatherBackward& call) const { cpu::vq_gather_backward(call, parallel); }
  void run(const VqSegmentSum& call) const { cpu::vq_segment_sum(call, parallel); }
  void run(const VggFeatures& call) const { cpu::vgg_features(call, parallel); }
  void run(const VggFeaturesBackward& call) const { cpu::vgg_features_backward(call, parallel); }
  void run(const PerceptualForward& call) const { cpu::perceptual_forward(call, parallel); }
  void run(const FeatureDistanceForward& call) const { cpu::feature_distance_forward(call, parallel); }
  void run(const FeatureDistanceBackward& call) const { cpu::feature_distance_backward(call, parallel); }
  void run(const VggBatchNormFeatures& call) const { cpu::vgg_batchnorm_features(call, parallel); }
  void run(const VggBatchNormBackward& call) const { cpu::vgg_batchnorm_backward(call, parallel); }
  void normal(float* out, int64_t n, Noise noise) const { cpu::normal(out, n, noise, parallel); }
  void fold_in(const int64_t* seed, int64_t seed_stride, const int64_t* index, int64_t index_stride, int64_t* child,
               int64_t m) const {
    cpu::fold_in(seed, seed_stride, index, index_stride, child, m);
  }

 private:
  // No two elements share memory and none lies between: empty_like keeps such strides.
  static bool is_dense(const Tensor& x) {
    if (x.is_contiguous()) return true;
    const auto sizes = x.sizes(), strides = x.strides();
    int64_t elements = 1;
    for (size_t found = 1; found > 0;) {  // from the innermost dim outwards
      found = 0;
      for (size_t d = 0; d < sizes.size() && found == 0; ++d) {
        if (sizes[d] > 1 && strides[d] == elements) found = static_cast<size_t>(sizes[d]);
      }
      if (found > 0) elements *= static_cast<int64_t>(found);
    }
    return elements == x.numel();
  }

  template <class T>
  static void check_range(const T* indices, int64_t n, int64_t codes) {
    T low = 0, high = 0;
    for (int64_t i = 0; i < n; ++i) {
      low = std::min(low, indices[i]);
      high = std::max(high, indices[i]);
    }
    STD_TORCH_CHECK(low >= -1 && high < codes, "indices must be in [-1, ", codes, "), got ", low, " to ", high);
  }

  static Tensor on_pages(void* data, size_t bytes, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                         ScalarType dtype, const Tensor& like) {
    return torch::stable::from_blob(data, sizes, strides, like.device(), dtype,
                                    [bytes](void* pages) { cpu::give_pages(pages, bytes); });
  }
};

}  // namespace vaeops::bind
