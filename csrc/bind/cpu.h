// How a binding runs a call on CPU tensors.
#pragma once
#include "bind/common.h"

namespace vaeops::bind {

#define VAEOPS_DEVICE CPU
#define VAEOPS_OVERLOAD ".cpp"

struct Device {
  explicit Device(const Tensor&) {}

  static void check(const Tensor& x, const char* name) { STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor"); }

  // An output the size of the inputs. Large ones come from pages that are kept between calls.
  static Tensor fresh_like(const Tensor& x) {
    const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
    void* const data = bytes >= cpu::kLargeOutput && x.is_contiguous() ? cpu::take_pages(bytes) : nullptr;
    if (data == nullptr) return uninitialized_like(x);
    return torch::stable::from_blob(data, x.sizes(), x.strides(), x.device(), x.scalar_type(),
                                    [bytes](void* pages) { cpu::give_pages(pages, bytes); });
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
};

}  // namespace vaeops::bind
