// A frozen trunk on a CPU: features, their backward from masks, the perceptual loss with its image gradient, and one
// convolution alone. Specification: vaeops/ref/perceptual.py.
#include <algorithm>

#include "cpu/vgg_heads.h"
#include "cpu/vgg_program.h"

namespace vaeops::cpu {
namespace {

template <class To, class From>
void convert_all(const void* from, void* to, int64_t n, ParallelFor inner) {
  parallel_for(inner, ceil_div(n, kChunk), [&](int64_t task) {
    const int64_t begin = task * kChunk, end = std::min(n, begin + kChunk);
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (std::is_same_v<To, float>) {
        static_cast<To*>(to)[i] = widen(static_cast<const From*>(from)[i]);
      } else {
        static_cast<To*>(to)[i] = to_bf16(static_cast<const From*>(from)[i]);
      }
    }
  });
}

// Bytes of a chunk's maps at all taps.
int64_t bytes_of_taps(const TrunkPlan& plan, const VggTrunk& trunk, const Chunks& chunks) {
  int64_t bytes = 0;
  for (int32_t t = 0; t < trunk.taps; ++t) bytes += aligned(chunks.images * plan.tap_map(t) * plan.element());
  return bytes;
}
void take_taps(const TrunkPlan& plan, const VggTrunk& trunk, const Chunks& chunks, Scratch& scratch, void** taps) {
  for (int32_t t = 0; t < trunk.taps; ++t) taps[t] = scratch.take(chunks.images * plan.tap_map(t) * plan.element());
}

// Whether the caller's maps (bf16 for VggAlgorithm::bf16) are not what this machine computes.
bool converts(const TrunkPlan& plan, const VggTrunk& trunk) { return plan.algorithm != trunk.algorithm; }

int64_t bytes_of_outside(const VggTrunk& trunk) { return trunk.algorithm == VggAlgorithm::bf16 ? 2 : 4; }

}  // namespace

void vgg_features(const VggFeatures& call, ParallelFor parallel) {
  if (call.batch == 0) return;
  const TrunkPlan plan(call.trunk, 3, call.batch, call.height, call.width);
  const Chunks chunks = chunks_of(plan, call.batch, parallel);
  const bool convert = converts(plan, call.trunk);
  const int64_t bytes = Work::bytes(plan, chunks) + (convert ? bytes_of_taps(plan, call.trunk, chunks) : 0);
  for_each_chunk(chunks, call.batch, bytes, parallel,
                 [&](int64_t first, int64_t n, Scratch& scratch, ParallelFor inner) {
                   const Work work(plan, chunks, scratch);
                   void *out[kVggTaps], *tap[kVggTaps];
                   for (int32_t t = 0; t < call.trunk.taps; ++t) {
                     out[t] = static_cast<char*>(call.map[t]) + first * plan.tap_map(t) * bytes_of_outside(call.trunk);
                     tap[t] = out[t];
                   }
                   if (convert) take_taps(plan, call.trunk, chunks, scratch, tap);
                   forward(plan, call.image, first, n, tap, call.saved, first, work, inner);
                   for (int32_t t = 0; convert && t < call.trunk.taps; ++t) {
                     convert_all<bf16, float>(tap[t], out[t], n * plan.tap_map(t), inner);
                   }
                 });
}

void vgg_features_backward(const VggFeaturesBackward& call, ParallelFor parallel) {
  if (call.batch == 0) return;
  const TrunkPlan plan(call.trunk, 3, call.batch, call.height, call.width);
  const Chunks chunks = chunks_of(plan, call.batch, parallel);
  const bool convert = converts(plan, call.trunk);
  const int64_t bytes = Work::bytes(plan, chunks) + (convert ? bytes_of_taps(plan, call.trunk, chunks) : 0);
  const int64_t image = 3 * call.height * call.width * bytes_of(call.gx_dtype);
  for_each_chunk(chunks, call.batch, bytes, parallel,
                 [&](int64_t first, int64_t n, Scratch& scratch, ParallelFor inner) {
                   const Work work(plan, chunks, scratch);
                   const void* grad[kVggTaps];
                   void* converted[kVggTaps];
                   if (convert) take_taps(plan, call.trunk, chunks, scratch, converted);
                   for (int32_t t = 0; t < call.trunk.taps; ++t) {
                     grad[t] = advance(call.grad[t], first * plan.tap_map(t) * bytes_of_outside(call.trunk));
                     if (!convert || grad[t] == nullptr) continue;
                     convert_all<float, bf16>(grad[t], converted[t], n * plan.tap_map(t), inner);
                     grad[t] = converted[t];
                   }
                   backward(plan, n, grad, false, call.saved, first, call.rstd,
                            static_cast<char*>(call.gx) + first * image, call.gx_dtype, work, inner);
                 });
}

void perceptual_forward(const PerceptualForward& call, ParallelFor parallel) {
  if (call.batch == 0) return;
  const VggTrunk& trunk = call.trunk;
  const TrunkPlan plan(trunk, 3, call.batch, call.height, call.width);
  const Chunks chunks = chunks_of(plan, call.batch, parallel);
  const bool given = call.target.data == nullptr, wants_gradient = call.gx != nullptr;
  const TrunkPlan chunk_plan(trunk, 3, chunks.images, call.height, call.width);  // where a chunk's masks lie
  const int64_t taps = bytes_of_taps(plan, trunk, chunks);
  const int64_t bytes = Work::bytes(plan, chunks) + taps * (1 + (given ? 0 : 1) + (wants_gradient ? 1 : 0)) +
                        (wants_gradient ? aligned(chunk_plan.saved_bytes) : 0);
  const int64_t image = 3 * call.height * call.width * bytes_of(call.gx_dtype);
  for_each_chunk(chunks, call.batch, bytes, parallel,
                 [&](int64_t first, int64_t n, Scratch& scratch, ParallelFor inner) {
                   const Work work(plan, chunks, scratch);
                   void *map[kVggTaps], *target[kVggTaps], *gradient[kVggTaps] = {};
                   take_taps(plan, trunk, chunks, scratch, map);
                   const Dtype target_dtype = given ? call.target_map_dtype : plan.dtype();
                   if (given) {
                     for (int32_t t = 0; t < trunk.taps; ++t) {
                       const int64_t offset = first * plan.tap_map(t) * bytes_of(target_dtype);
                       target[t] = const_cast<void*>(advance(call.target_map[t], offset));
                     }
                   } else {
                     take_taps(plan, trunk, chunks, scratch, target);
                     forward(plan, call.target, first, n, target, nullptr, 0, work, inner);
                   }
                   uint8_t* saved = nullptr;
                   if (wants_gradient) {
                     take_taps(plan, trunk, chunks, scratch, gradient);
                     saved = reinterpret_cast<uint8_t*>(scratch.take(chunk_plan.saved_bytes));
                   }
                   forward(chunk_plan, call.image, first, n, map, saved, 0, work, inner);

                   const void* reached[kVggTaps] = {};  // taps that a head gives a gradient to
                   for (int32_t i = 0; i < call.heads; ++i) {
                     const VggHead& head = call.head[i];
                     const TrunkLayer& l = plan.layer[plan.tap_layer[head.tap]];
                     const auto view = [&](void* data, Dtype dtype) {
                       return MapView{data, dtype, {l.map(), 1, l.out_width * l.out, l.out}};
                     };
                     DistanceRun run{};
                     run.kind = head.kind;
                     run.images = n;
                     run.channels = l.out;
                     run.height = l.out_height;
                     run.width = l.out_width;
                     run.a = view(map[head.tap], plan.dtype());
                     run.b = view(target[head.tap], target_dtype);
                     run.lin = head.lin;
                     run.mean = call.mean;
                     run.out = call.losses + i * call.batch + first;
                     run.weight = head.weight;
                     run.relu = trunk.tap[head.tap] % 2 == 1 && !l.pool;
                     if (wants_gradient) {
                       run.ga = view(gradient[head.tap], plan.dtype());
                       run.add = reached[head.tap] != nullptr;
                       reached[head.tap] = gradient[head.tap];
                     }
                     distance(run, inner);
                   }
                   if (!wants_gradient) return;
                   backward(chunk_plan, n, reached, true, saved, 0, call.image.rstd,
                            static_cast<char*>(call.gx) + first * image, call.gx_dtype, work, inner);
                 });
}

namespace {

// An image of normalised values.
VggImage plain_image(const float* x /* [n, h, w, 3] */, int64_t height, int64_t width) {
  VggImage image{};
  image.data = x;
  const int64_t stride[4] = {height * width * 3, 1, width * 3, 3};
  std::copy(stride, stride + 4, image.stride);
  std::fill_n(image.rstd, 3, 1.0f);
  return image;
}

}  // namespace

void vgg_conv(const VggConv& call, ParallelFor parallel) {
  if (call.batch == 0) return;
  VggTrunk trunk{};
  trunk.layers = 1;
  trunk.channels[0] = call.out;
  trunk.packed = call.packed;
  trunk.algorithm = call.algorithm;
  const TrunkPlan plan(trunk, call.in, call.batch, call.height, call.width);
  const TrunkLayer& l = plan.layer[0];
  const bool first = call.in == 3, half = plan.element() == 2;
  const int64_t pixels = call.height * call.width, slots = threads_of(parallel);
  const int64_t from = pixels * (call.transposed ? call.out : call.in);
  const int64_t to = pixels * (call.transposed ? call.in : call.out);
  // Images are converted a chunk at a time where the kernels take or give something else.
  const bool turned = first && call.transposed, in_half = half && !(first && !call.transposed),
             out_half = half && !turned;
  const bool staged = in_half || out_half || turned;
  const int64_t n = staged ? std::clamp<int64_t>(kChunkBytes / (4 * std::max(from, to)), 1, call.batch) : call.batch;
  const int64_t bytes = aligned(slots * plan.conv_scratch) + (staged ? aligned(4 * n * from) + aligned(4 * n * to) : 0);
  Scratch scratch(bytes);
  const ConvScratch conv{scratch.take(slots * plan.conv_scratch), slots};
  char *const staged_x = staged ? scratch.take(4 * n * from) : nullptr, *const staged_y =
                                                                            staged ? scratch.take(4 * n * to) : nullptr;
  for (int64_t begin = 0; begin < call.batch; begin += n) {
    const int64_t count = std::min(n, call.batch - begin);
    const float* const x = call.x + begin * from;
    float* const y = call.y + begin * to;
    if (in_half) convert_all<bf16, float>(x, staged_x, count * from, parallel);
    const void* const source = in_half ? static_cast<const void*>(staged_x) : x;
    void* const result = staged && (out_half || turned) ? static_cast<void*>(staged_y) : y;
    if (call.transposed) {
      ConvBackward part{};
      part.g = source;
      part.packed = l.backward;
      part.n = count;
      part.h = call.height;
      part.w = call.width;
      part.in = call.in;
      part.out = call.out;
      part.gx = result;
      const float one[3] = {1, 1, 1};
      turned ? conv_first_backward(plan.algorithm, part, one, result, Dtype::f32, conv, parallel)
             : conv_backward(plan.algorithm, part, conv, parallel);
    } else {
      ConvForward part{};
      part.x = source;
      part.packed = l.forward;
      part.n = count;
      part.h = call.height;
      part.w = call.width;
      part.in = call.in;
      part.out = call.out;
      part.y = result;
      first ? conv_first(plan.algorithm, plain_image(x, call.height, call.width), 0, part, conv, parallel)
            : conv_forward(plan.algorithm, part, conv, parallel);
    }
    if (out_half) convert_all<float, bf16>(staged_y, y, count * to, parallel);
    if (!turned) continue;
    const float* const planes = reinterpret_cast<const float*>(staged_y);  // [n, 3, h, w]
    for (int64_t i = 0; i < count * pixels; ++i) {
      for (int64_t c = 0; c < 3; ++c) y[3 * i + c] = planes[(i / pixels * 3 + c) * pixels + i % pixels];
    }
  }
}

}  // namespace vaeops::cpu
