// A frozen trunk on a CPU: features, their backward from masks, and the perceptual loss with its image gradient.
// Specification: vaeops/ref/perceptual.py.
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
  const TrunkPlan plan(call.trunk, call.batch, call.height, call.width);
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
  const TrunkPlan plan(call.trunk, call.batch, call.height, call.width);
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
  const TrunkPlan plan(trunk, call.batch, call.height, call.width);
  const Chunks chunks = chunks_of(plan, call.batch, parallel);
  const bool given = call.target.data == nullptr, wants_gradient = call.gx != nullptr;
  const TrunkPlan chunk_plan(trunk, chunks.images, call.height, call.width);  // where a chunk's masks lie
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

}  // namespace vaeops::cpu
