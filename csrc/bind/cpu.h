// How a binding runs a call on CPU tensors.
#pragma once
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
    void* const data = bytes >= cpu::kLargeOutput && x.is_contiguous() ? cpu::take_pages(bytes) : nullptr;
    return data == nullptr ? uninitialized_like(x) : on_pages(data, bytes, x.sizes(), x.strides(), x.scalar_type(), x);
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

  static void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }

  void run(const GaussianForward& call) const { cpu::gaussian_forward(call, parallel); }
  void run(const GaussianBackward& call) const { cpu::gaussian_backward(call, parallel); }
  void run(const LogProbForward& call) const { cpu::log_prob_forward(call, parallel); }
  void run(const LogProbBackward& call) const { cpu::log_prob_backward(call, parallel); }
  void normal(float* out, int64_t n, Noise noise) const { cpu::normal(out, n, noise, parallel); }
  void fold_in(const int64_t* seed, int64_t seed_stride, const int64_t* index, int64_t index_stride, int64_t* child,
               int64_t m) const {
    cpu::fold_in(seed, seed_stride, index, index_stride, child, m);
  }

 private:
  static Tensor on_pages(void* data, size_t bytes, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                         ScalarType dtype, const Tensor& like) {
    return torch::stable::from_blob(data, sizes, strides, like.device(), dtype,
                                    [bytes](void* pages) { cpu::give_pages(pages, bytes); });
  }
};

}  // namespace vaeops::bind
