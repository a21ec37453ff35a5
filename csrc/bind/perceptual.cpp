// Torch glue of the perceptual family. Schemas, meaning and argument checks of the public functions:
// vaeops/ops/perceptual/. These kernels serve CPU tensors; on CUDA the family runs in Triton.
#if !defined(VAEOPS_CUDA)
#include <numeric>
#include <string>
#include <vector>

#include "bind/cpu.h"

namespace vaeops::bind {
namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;

VggAlgorithm algorithm_of(int64_t algorithm) { return option<VggAlgorithm>(algorithm, 0, 2, "algorithm"); }

VggTrunk trunk_of(const Integers& layers, const Integers& taps, int64_t algorithm) {
  VggTrunk trunk{};
  const auto count = static_cast<int64_t>(layers.size());
  STD_TORCH_CHECK(count >= 1 && count <= kVggLayers, "layers must hold 1 to ", kVggLayers, " layers, got ", count);
  STD_TORCH_CHECK(layers[0] != 0, "the first layer must be a convolution");
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(layers[i] >= 0 && layers[i] % 16 == 0 && layers[i] <= (int64_t{1} << 20),
                    "channels must be a multiple of 16, or 0 for a pool, got ", layers[i]);
    trunk.channels[i] = layers[i];
  }
  STD_TORCH_CHECK(static_cast<int64_t>(taps.size()) <= kVggTaps, "too many taps");
  for (size_t t = 0; t < taps.size(); ++t) {
    STD_TORCH_CHECK(taps[t] >= 0 && taps[t] < 2 * count && (t == 0 || taps[t] > taps[t - 1]),
                    "taps must ascend and be of the ", count, " layers, got ", taps[t]);
    STD_TORCH_CHECK(taps[t] % 2 == 1 || layers[taps[t] / 2] != 0, "a pool has no tap before its ReLU");
    trunk.tap[t] = static_cast<int32_t>(taps[t]);
  }
  trunk.layers = static_cast<int32_t>(count);
  trunk.taps = static_cast<int32_t>(taps.size());
  trunk.algorithm = algorithm_of(algorithm);
  return trunk;
}

// A trunk whose last tap is its end, with packed weights.
VggTrunk trunk_of(const Integers& layers, const Integers& taps, int64_t algorithm, const Tensor& packed) {
  VggTrunk trunk = trunk_of(layers, taps, algorithm);
  STD_TORCH_CHECK(!taps.empty() && taps.back() / 2 == trunk.layers - 1, "the last tap must be the last layer's");
  Device::check(packed, "packed");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.is_contiguous(),
                  "packed must be made by vgg_pack");
  trunk.packed = static_cast<const float*>(packed.data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(trunk.packed) % 64 == 0, "packed must be aligned to 64 bytes");
  const char* const mismatch = cpu::vgg_packed_mismatch(trunk, packed.numel());
  STD_TORCH_CHECK(mismatch == nullptr, "packed ", mismatch == nullptr ? "" : mismatch, "; pack the weights again");
  return trunk;
}

// [B, 3, H, W] of any strides.
VggImage image_of(const Tensor& x, const Numbers& pixels, const char* name) {
  VggImage image{};
  Device::check(x, name);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == 3, name, " must be [B, 3, H, W]");
  STD_TORCH_CHECK(pixels.size() == 6, "pixels must be 6 numbers, got ", static_cast<int64_t>(pixels.size()));
  image.uint8 = x.scalar_type() == ScalarType::Byte;
  if (!image.uint8) image.dtype = dtype_of(x, name);
  STD_TORCH_CHECK(image.uint8 || image.dtype != Dtype::f64, name, " must not be float64: the reference serves that");
  image.data = x.data_ptr();
  for (int d = 0; d < 4; ++d) image.stride[d] = x.stride(d);
  for (int c = 0; c < 3; ++c) {
    image.mean[c] = static_cast<float>(pixels[c]);
    image.rstd[c] = static_cast<float>(pixels[3 + c]);
  }
  return image;
}

struct MapSize {
  int64_t size[4], stride[4];  // channels last, whatever the sizes
};

MapSize map_size(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return {{batch, channels, height, width}, {height * width * channels, 1, width * channels, channels}};
}

// Of the map at each tap.
std::vector<MapSize> map_sizes(const VggTrunk& trunk, const Tensor& x) {
  std::vector<MapSize> sizes;
  int64_t channels = 3, height = x.size(2), width = x.size(3);
  for (int32_t i = 0, t = 0; i < trunk.layers; ++i) {
    if (trunk.channels[i] == 0) {
      height /= 2;
      width /= 2;
    } else {
      channels = trunk.channels[i];
    }
    for (; t < trunk.taps && trunk.tap[t] / 2 == i; ++t) {
      sizes.push_back(map_size(x.size(0), channels, height, width));
    }
  }
  STD_TORCH_CHECK(height > 0 && width > 0, "x is too small for the deepest tap: ", x.size(2), " x ", x.size(3));
  return sizes;
}

Tensor fresh_map(const Tensor& like, const MapSize& size, ScalarType dtype) {
  return Device::fresh(like, size.size, size.stride, 4, dtype);
}

// x with the strides and the dtype of such a map.
Tensor as_map(const Tensor& x, const MapSize& size, ScalarType dtype, const char* name) {
  Device::check(x, name);
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dims, got ", x.dim());
  bool in_place = x.scalar_type() == dtype;
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(x.size(d) == size.size[d], name, " must have size ", size.size[d], " along dim ", d, ", got ",
                    x.size(d));
    in_place = in_place && (size.size[d] == 1 || x.stride(d) == size.stride[d]);
  }
  if (in_place || x.numel() == 0) return x;
  Tensor copy = fresh_map(x, size, dtype);
  torch::stable::copy_(copy, x);
  return copy;
}

ScalarType map_type(VggAlgorithm algorithm) {
  return algorithm == VggAlgorithm::bf16 ? ScalarType::BFloat16 : ScalarType::Float;
}

Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return as_contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

Tensor vgg_pack(const Tensors& weights, const Integers& layers, int64_t algorithm) {
  const VggTrunk trunk = trunk_of(layers, {}, algorithm);
  STD_TORCH_CHECK(!weights.empty() && weights[0].dim() == 4, "weights must be [w0, b0, w1, b1, ...]");
  Tensors held;
  std::vector<const float*> pointers;
  int64_t in = 3;
  size_t at = 0;
  for (const int64_t out : layers) {
    if (out == 0) continue;
    STD_TORCH_CHECK(at + 1 < weights.size(), "weights must hold a weight and a bias for each convolution");
    const Tensor &w = weights[at], &b = weights[at + 1];
    Device::check(w, "weights");
    Device::check(b, "weights");
    STD_TORCH_CHECK(w.dim() == 4 && w.size(0) == out && w.size(1) == in && w.size(2) == 3 && w.size(3) == 3,
                    "weights: a weight must be [", out, ", ", in, ", 3, 3]");
    STD_TORCH_CHECK(b.dim() == 1 && b.size(0) == out, "weights: a bias must be [", out, "]");
    for (const Tensor& part : {w, b}) {
      held.push_back(contiguous_as(part, ScalarType::Float));
      pointers.push_back(static_cast<const float*>(held.back().data_ptr()));
    }
    in = out;
    at += 2;
  }
  STD_TORCH_CHECK(at == weights.size(), "weights must hold a weight and a bias for each convolution");
  const Tensor packed = Device::fresh_floats(weights[0], cpu::vgg_packed_floats(trunk));
  cpu::vgg_pack(trunk, pointers.data(), static_cast<float*>(packed.mutable_data_ptr()), Device::parallel);
  return packed;
}

std::tuple<Tensors, Tensor> vgg_features_fwd(const Tensor& x, const Tensors&, const Tensor& packed,
                                             const Integers& layers, const Integers& taps, const Numbers& pixels,
                                             int64_t algorithm, bool keep) {
  VggFeatures call{};
  call.image = image_of(x, pixels, "x");
  call.trunk = trunk_of(layers, taps, algorithm, packed);
  call.batch = x.size(0);
  call.height = x.size(2);
  call.width = x.size(3);
  Tensors maps;
  for (const MapSize& size : map_sizes(call.trunk, x)) {
    maps.push_back(fresh_map(x, size, map_type(call.trunk.algorithm)));
    call.map[maps.size() - 1] = maps.back().mutable_data_ptr();
  }
  const int64_t bytes = keep ? cpu::vgg_saved_bytes(call.trunk, call.batch, call.height, call.width) : 0;
  const Tensor saved = Device::fresh(x, &bytes, 1, ScalarType::Byte);
  if (keep) call.saved = static_cast<uint8_t*>(saved.mutable_data_ptr());
  Device(x).run(call);
  return {maps, saved};
}

Tensor vgg_features_bwd(const std::vector<OptionalTensor>& grads, const Tensor& x, const Tensors&, const Tensor& packed,
                        const Tensor& saved, const Integers& layers, const Integers& taps, const Numbers& pixels,
                        int64_t algorithm) {
  VggFeaturesBackward call{};
  const VggImage image = image_of(x, pixels, "x");
  STD_TORCH_CHECK(!image.uint8, "x must be floating point to have a gradient");
  call.trunk = trunk_of(layers, taps, algorithm, packed);
  call.batch = x.size(0);
  call.height = x.size(2);
  call.width = x.size(3);
  std::copy(image.rstd, image.rstd + 3, call.rstd);
  STD_TORCH_CHECK(grads.size() == taps.size(), "grads must hold one for each tap");
  Device::check(saved, "saved");
  const int64_t bytes = cpu::vgg_saved_bytes(call.trunk, call.batch, call.height, call.width);
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Byte && saved.is_contiguous() && saved.numel() == bytes,
                  "saved must be what vgg_features_fwd kept of x: ", bytes, " bytes, got ", saved.numel());
  call.saved = static_cast<const uint8_t*>(saved.data_ptr());
  const std::vector<MapSize> sizes = map_sizes(call.trunk, x);
  Tensors held;
  for (size_t t = 0; t < grads.size(); ++t) {
    if (!grads[t]) continue;
    held.push_back(as_map(*grads[t], sizes[t], map_type(call.trunk.algorithm), "grads"));
    call.grad[t] = held.back().data_ptr();
  }
  const Tensor gx = Device::fresh(x, x.sizes().data(), 4, x.scalar_type());
  call.gx = gx.mutable_data_ptr();
  call.gx_dtype = image.dtype;
  Device(x).run(call);
  return gx;
}

std::tuple<Tensor, Tensor> perceptual_fwd(const Tensor& x, const OptionalTensor& target, const Tensors& target_maps,
                                          const Tensors&, const Tensor& packed, const Tensors& lin,
                                          const Integers& layers, const Integers& taps, const Numbers& pixels,
                                          const Numbers& target_pixels, const Integers& head_tap,
                                          const Integers& head_kind, const Numbers& head_weight, bool mean,
                                          int64_t algorithm, bool want_grad) {
  PerceptualForward call{};
  call.image = image_of(x, pixels, "x");
  STD_TORCH_CHECK(!(call.image.uint8 && want_grad), "x must be floating point to have a gradient");
  call.trunk = trunk_of(layers, taps, algorithm, packed);
  call.batch = x.size(0);
  call.height = x.size(2);
  call.width = x.size(3);
  call.mean = mean;
  const std::vector<MapSize> sizes = map_sizes(call.trunk, x);
  Tensors held;
  STD_TORCH_CHECK(target.has_value() == target_maps.empty(), "one of target and target_maps must be given");
  if (target) {
    STD_TORCH_CHECK(same_sizes(*target, x), "target must have x's shape");
    call.target = image_of(*target, target_pixels, "target");
  } else {
    STD_TORCH_CHECK(target_maps.size() == taps.size(), "target_maps must hold one for each tap");
    bool half = true;
    for (const Tensor& map : target_maps) half = half && map.scalar_type() == ScalarType::BFloat16;
    call.target_map_dtype = half ? Dtype::bf16 : Dtype::f32;
    for (size_t t = 0; t < target_maps.size(); ++t) {
      held.push_back(as_map(target_maps[t], sizes[t], half ? ScalarType::BFloat16 : ScalarType::Float, "target_maps"));
      call.target_map[t] = held.back().data_ptr();
    }
  }
  const auto heads = static_cast<int64_t>(head_tap.size());
  STD_TORCH_CHECK(heads <= kVggHeads, "at most ", kVggHeads, " heads are supported, got ", heads);
  STD_TORCH_CHECK(head_kind.size() == head_tap.size() && head_weight.size() == head_tap.size(),
                  "head_tap, head_kind and head_weight must have the same length");
  size_t lins = 0;
  for (int64_t i = 0; i < heads; ++i) {
    VggHead& head = call.head[i];
    STD_TORCH_CHECK(head_tap[i] >= 0 && head_tap[i] < call.trunk.taps, "head_tap out of range: ", head_tap[i]);
    head.tap = static_cast<int32_t>(head_tap[i]);
    head.kind = option<Distance>(head_kind[i], 0, 4, "head_kind");
    head.weight = static_cast<float>(head_weight[i]);
    if (head.kind != Distance::lpips) continue;
    STD_TORCH_CHECK(lins < lin.size(), "lin must hold one tensor for each head of lpips");
    const Tensor& weights = lin[lins++];
    Device::check(weights, "lin");
    STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == sizes[head.tap].size[1], "lin must be [",
                    sizes[head.tap].size[1], "] at this tap");
    held.push_back(contiguous_as(weights, ScalarType::Float));
    head.lin = static_cast<const float*>(held.back().data_ptr());
  }
  STD_TORCH_CHECK(lins == lin.size(), "lin must hold one tensor for each head of lpips");
  call.heads = static_cast<int32_t>(heads);
  const int64_t size[2] = {heads, call.batch};
  const Tensor losses = empty(x, size, 2, ScalarType::Float);
  call.losses = static_cast<float*>(losses.mutable_data_ptr());
  Tensor gx;  // undefined, which is None in Python, where not asked for
  if (want_grad) {
    gx = Device::fresh(x, x.sizes().data(), 4, x.scalar_type());
    call.gx = gx.mutable_data_ptr();
    call.gx_dtype = call.image.dtype;
  }
  Device(x).run(call);
  return {losses, gx};
}

template <class Call>
Call distance_call(const Tensor& a, const Tensor& b, const OptionalTensor& lin_, int64_t kind, bool mean, bool spatial,
                   OptionalTensor& lin) {
  Call call{};
  Device::check(a, "a");
  Device::check(b, "b");
  STD_TORCH_CHECK(a.dim() == 4 && same_sizes(a, b), "a and b must have one shape [B, C, h, w]");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have one dtype");
  call.dtype = dtype_of(a, "a");
  call.kind = option<Distance>(kind, 0, 4, "kind");
  call.a = a.data_ptr();
  call.b = b.data_ptr();
  for (int d = 0; d < 4; ++d) {
    call.a_stride[d] = a.stride(d);
    call.b_stride[d] = b.stride(d);
  }
  call.batch = a.size(0);
  call.channels = a.size(1);
  call.height = a.size(2);
  call.width = a.size(3);
  call.mean = mean;
  call.spatial = spatial;
  STD_TORCH_CHECK(!(spatial && call.kind == Distance::gram), "gram has no pixels");
  STD_TORCH_CHECK(lin_.has_value() == (call.kind == Distance::lpips), "lin is for lpips, and must be there");
  if (lin_) {
    Device::check(*lin_, "lin");
    STD_TORCH_CHECK(lin_->dim() == 1 && lin_->size(0) == call.channels, "lin must be [", call.channels, "]");
    lin = contiguous_as(*lin_, compute_type(a));
    call.lin = lin->data_ptr();
  }
  return call;
}

Tensor feature_distance_fwd(const Tensor& a, const Tensor& b, const OptionalTensor& lin_, int64_t kind, bool mean,
                            bool spatial) {
  OptionalTensor lin;
  auto call = distance_call<FeatureDistanceForward>(a, b, lin_, kind, mean, spatial, lin);
  const int64_t size[3] = {call.batch, call.height, call.width};
  const Tensor out = Device::fresh(a, size, spatial ? 3 : 1, compute_type(a));
  call.out = out.mutable_data_ptr();
  Device(a).run(call);
  return out;
}

std::tuple<Tensor, Tensor> feature_distance_bwd(const Tensor& grad_, const Tensor& a, const Tensor& b,
                                                const OptionalTensor& lin_, int64_t kind, bool mean, bool spatial) {
  OptionalTensor lin;
  auto call = distance_call<FeatureDistanceBackward>(a, b, lin_, kind, mean, spatial, lin);
  Device::check(grad_, "grad");
  STD_TORCH_CHECK(grad_.numel() == call.batch * (spatial ? call.height * call.width : 1),
                  "grad must be [B], or [B, h, w] where spatial");
  const Tensor grad = contiguous_as(grad_, compute_type(a)), ga = Device::fresh_like(a), gb = Device::fresh_like(b);
  call.grad = grad.data_ptr();
  call.ga = ga.mutable_data_ptr();
  call.gb = gb.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) {
    call.ga_stride[d] = ga.stride(d);
    call.gb_stride[d] = gb.stride(d);
  }
  Device(a).run(call);
  return {ga, gb};
}

// What both directions read. Tensors made here stay in `held`.
void set_batchnorm(VggBatchNorm& call, const Tensor& x, const Tensors& norms, const Tensor& packed,
                   const Integers& layers, const Integers& taps, int64_t algorithm, Tensors& held) {
  call.trunk = trunk_of(layers, taps, algorithm, packed);
  call.batch = x.size(0);
  call.height = x.size(2);
  call.width = x.size(3);
  size_t at = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    STD_TORCH_CHECK(layers[i] != 0 || layers[i - 1] != 0, "a pool must follow a convolution");
    if (layers[i] == 0) continue;
    STD_TORCH_CHECK(at + 1 < norms.size(), "norms must hold a weight and a bias for each convolution");
    for (const float** const to : {&call.weight[i], &call.bias[i]}) {
      const Tensor& part = norms[at++];
      Device::check(part, "norms");
      STD_TORCH_CHECK(part.dim() == 1 && part.size(0) == layers[i], "norms must be [", layers[i], "] at layer ", i);
      held.push_back(contiguous_as(part, ScalarType::Float));
      *to = static_cast<const float*>(held.back().data_ptr());
    }
  }
  STD_TORCH_CHECK(at == norms.size(), "norms must hold a weight and a bias for each convolution");
}

// Of each convolution's output.
std::vector<MapSize> output_sizes(const Integers& layers, const Tensor& x) {
  Integers outputs;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i] != 0) outputs.push_back(static_cast<int64_t>(2 * i));
  }
  return map_sizes(trunk_of(layers, outputs, 0), x);
}

// [2, K] a convolution, one after another.
int64_t stats_floats(const Integers& layers) { return 2 * std::accumulate(layers.begin(), layers.end(), int64_t{0}); }
void set_stats(VggBatchNorm& call, const Integers& layers, const Tensor& stats) {
  auto* at = static_cast<float*>(stats.data_ptr());
  for (size_t i = 0; i < layers.size(); ++i) {
    call.stats[i] = at;
    at += 2 * layers[i];
  }
}

std::tuple<Tensors, Tensors, Tensor> vgg_batchnorm_fwd(const Tensor& x, const Tensors&, const Tensors& norms,
                                                       const Tensor& packed, const Integers& layers,
                                                       const Integers& taps, const Numbers& pixels, double eps,
                                                       int64_t algorithm, bool keep) {
  VggBatchNormFeatures call{};
  Tensors held, maps, kept;
  call.image = image_of(x, pixels, "x");
  call.eps = eps;
  set_batchnorm(call, x, norms, packed, layers, taps, algorithm, held);
  for (const MapSize& size : map_sizes(call.trunk, x)) {
    maps.push_back(fresh_map(x, size, ScalarType::Float));
    call.map[maps.size() - 1] = static_cast<float*>(maps.back().mutable_data_ptr());
  }
  if (keep) {
    size_t layer = 0;
    for (const MapSize& size : output_sizes(layers, x)) {
      kept.push_back(fresh_map(x, size, ScalarType::Float));
      while (layers[layer] == 0) ++layer;
      call.kept[layer++] = kept.back().mutable_data_ptr();
    }
  }
  const Tensor stats = Device::fresh_floats(x, stats_floats(layers));
  set_stats(call, layers, stats);
  Device(x).run(call);
  return {maps, kept, stats};
}

Tensor vgg_batchnorm_bwd(const std::vector<OptionalTensor>& grads, const Tensor& x, const Tensors&,
                         const Tensors& norms, const Tensor& packed, const Tensors& kept, const Tensor& stats,
                         const Integers& layers, const Integers& taps, const Numbers& pixels, double,
                         int64_t algorithm) {
  VggBatchNormBackward call{};
  Tensors held;
  const VggImage image = image_of(x, pixels, "x");
  STD_TORCH_CHECK(!image.uint8, "x must be floating point to have a gradient");
  set_batchnorm(call, x, norms, packed, layers, taps, algorithm, held);
  std::copy(image.rstd, image.rstd + 3, call.rstd);
  STD_TORCH_CHECK(grads.size() == taps.size(), "grads must hold one for each tap");
  const std::vector<MapSize> sizes = map_sizes(call.trunk, x), outputs = output_sizes(layers, x);
  for (size_t t = 0; t < grads.size(); ++t) {
    if (!grads[t]) continue;
    held.push_back(as_map(*grads[t], sizes[t], ScalarType::Float, "grads"));
    call.grad[t] = static_cast<const float*>(held.back().data_ptr());
  }
  STD_TORCH_CHECK(kept.size() == outputs.size(), "kept must hold what vgg_batchnorm_fwd kept of x");
  for (size_t i = 0, n = 0; i < layers.size(); ++i) {
    if (layers[i] == 0) continue;
    held.push_back(as_map(kept[n], outputs[n], ScalarType::Float, "kept"));
    call.kept[i] = held.back().data_ptr();
    ++n;
  }
  Device::check(stats, "stats");
  STD_TORCH_CHECK(
      stats.numel() == stats_floats(layers) && stats.scalar_type() == ScalarType::Float && stats.is_contiguous(),
      "stats must be what vgg_batchnorm_fwd gave: ", stats_floats(layers), " floats");
  set_stats(call, layers, stats);
  const Tensor gx = Device::fresh(x, x.sizes().data(), 4, x.scalar_type());
  call.gx = gx.mutable_data_ptr();
  call.gx_dtype = image.dtype;
  Device(x).run(call);
  return gx;
}

}  // namespace
}  // namespace vaeops::bind

STABLE_TORCH_LIBRARY_IMPL(vaeops, VAEOPS_DEVICE, m) {
  using namespace vaeops::bind;
  m.impl("vgg_pack", TORCH_BOX(&vgg_pack));
  m.impl("vgg_pack" VAEOPS_OVERLOAD, TORCH_BOX(&vgg_pack));
  m.impl("vgg_features_fwd", TORCH_BOX(&vgg_features_fwd));
  m.impl("vgg_features_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&vgg_features_fwd));
  m.impl("vgg_features_bwd", TORCH_BOX(&vgg_features_bwd));
  m.impl("vgg_features_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&vgg_features_bwd));
  m.impl("perceptual_fwd", TORCH_BOX(&perceptual_fwd));
  m.impl("perceptual_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&perceptual_fwd));
  m.impl("feature_distance_fwd", TORCH_BOX(&feature_distance_fwd));
  m.impl("feature_distance_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&feature_distance_fwd));
  m.impl("feature_distance_bwd", TORCH_BOX(&feature_distance_bwd));
  m.impl("feature_distance_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&feature_distance_bwd));
  m.impl("vgg_batchnorm_fwd", TORCH_BOX(&vgg_batchnorm_fwd));
  m.impl("vgg_batchnorm_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&vgg_batchnorm_fwd));
  m.impl("vgg_batchnorm_bwd", TORCH_BOX(&vgg_batchnorm_bwd));
  m.impl("vgg_batchnorm_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&vgg_batchnorm_bwd));
}
#endif
