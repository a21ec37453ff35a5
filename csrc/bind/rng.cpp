// Torch glue of the noise stream. Schemas and checks of the public functions: vaeops/ops/rng.py.
#include <vector>
#if defined(VAEOPS_CUDA)
#include "bind/cuda.h"
#else
#include "bind/cpu.h"
#endif

namespace vaeops::bind {
namespace {

Tensor normal(const Tensor& seed_, std::vector<int64_t> size) {
  Device::check(seed_, "seed");
  const Tensor seed = as_contiguous(seed_);
  const Device device(seed);
  int64_t n = 1;
  for (int64_t s : size) n *= s;
  Tensor out = torch::stable::view(Device::fresh_floats(seed, n), IntHeaderOnlyArrayRef(size.data(), size.size()));
  const Noise noise = noise_of(seed, out.numel());
  if (out.numel() > 0) device.normal(out.mutable_data_ptr<float>(), out.numel(), noise);
  return out;
}

// [..., 2] seeds and [...] indices broadcast together.
Tensor fold_in(const Tensor& seed, const Tensor& index) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && index.scalar_type() == ScalarType::Long,
                  "seed and index must be int64");
  STD_TORCH_CHECK(seed.dim() >= 1 && seed.size(seed.dim() - 1) == 2, "seed must be [..., 2]");
  Device::check(seed, "seed");
  Device::check(index, "index");
  const Device device(seed);
  const int64_t rank = std::max(seed.dim() - 1, index.dim());
  std::vector<int64_t> size(rank, 1);
  const auto widen = [&](const Tensor& x, int64_t dims) {
    for (int64_t d = 0; d < dims; ++d) {
      int64_t& s = size[rank - dims + d];
      STD_TORCH_CHECK(x.size(d) == s || x.size(d) == 1 || s == 1, "seed and index do not broadcast");
      if (x.size(d) != 1) s = x.size(d);
    }
  };
  widen(seed, seed.dim() - 1);
  widen(index, index.dim());
  int64_t m = 1;
  for (int64_t s : size) m *= s;
  size.push_back(2);
  Tensor child = empty(seed, size.data(), static_cast<int64_t>(size.size()), ScalarType::Long);
  if (m == 0) return child;
  // One of the two is a single value in every use of the library; where both are not, spell the broadcast out.
  const bool one_seed = seed.numel() == 2, one_index = index.numel() == 1;
  Tensor seeds = as_contiguous(seed), indices = as_contiguous(index);
  if (!one_seed && seed.numel() != 2 * m) {
    seeds = uninitialized_like(child);
    torch::stable::copy_(seeds, seed);
  }
  if (!one_index && index.numel() != m) {
    size.pop_back();
    indices = empty(index, size.data(), static_cast<int64_t>(size.size()), ScalarType::Long);
    torch::stable::copy_(indices, index);
  }
  device.fold_in(seeds.const_data_ptr<int64_t>(), one_seed ? 0 : 2, indices.const_data_ptr<int64_t>(),
                 one_index ? 0 : 1, child.mutable_data_ptr<int64_t>(), m);
  return child;
}

}  // namespace
}  // namespace vaeops::bind

STABLE_TORCH_LIBRARY_IMPL(vaeops, VAEOPS_DEVICE, m) {
  using namespace vaeops::bind;
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("normal" VAEOPS_OVERLOAD, TORCH_BOX(&normal));
  m.impl("fold_in", TORCH_BOX(&fold_in));
  m.impl("fold_in" VAEOPS_OVERLOAD, TORCH_BOX(&fold_in));
}
