// A frozen trunk on a CPU: features, their backward from masks, and the perceptual loss with its image gradient.
// Specification: vaeops/ref/perceptual.py.
//
// A call goes through the batch in chunks of images. Scratch memory is a chunk's, whatever the batch. With a chunk or
// more for every thread the threads share out the chunks; else the chunks follow each other and the threads share the
// work inside. No value depends on which, nor on the size of a chunk.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "cpu/strided.h"
#include "cpu/vgg_heads.h"
#include "cpu/vgg_layers.h"
#include "cpu/vgg_pool.h"

#define VAEOPS_KERNELS "cpu/vgg_pool_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

// Memory of one task, kept between calls where it is large.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(static_cast<size_t>(aligned(bytes))) {
    data_ = static_cast<char*>(bytes_ >= kLargeOutput ? take_pages(bytes_) : nullptr);
    pages_ = data_ != nullptr;
    if (!pages_ && bytes_ > 0) data_ = static_cast<char*>(std::aligned_alloc(kAlign, bytes_));
  }
  ~Scratch() { pages_ ? give_pages(data_, bytes_) : std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* take(int64_t bytes) {
    char* const piece = data_ + used_;
    used_ += static_cast<size_t>(aligned(bytes));
    return piece;
  }

 private:
  size_t bytes_, used_ = 0;
  char* data_;
  bool pages_;
};

// How many ranges the caller's loop is cut into: its threads.
int64_t threads_of(ParallelFor parallel) {
  std::atomic<int64_t> ranges{0};
  parallel(1024, [](void* context, int64_t, int64_t) { ++*static_cast<std::atomic<int64_t>*>(context); }, &ranges);
  return ranges.load();
}

constexpr int64_t kChunkBytes = int64_t{8} << 20;  // of the largest map of a chunk

struct Chunks {
  int64_t images, count;  // of a chunk; chunks
  bool outer;             // threads share out the chunks
  int64_t slots;          // of the convolutions' scratch
};

Chunks chunks_of(const TrunkPlan& plan, int64_t batch, ParallelFor parallel) {
  const int64_t threads = threads_of(parallel);
  const int64_t most = std::max<int64_t>(1, kChunkBytes / (plan.most_map * plan.element()));
  Chunks chunks{};
  chunks.count = ceil_div(batch, most);
  chunks.outer = batch >= threads;
  if (chunks.outer) chunks.count = std::min(batch, ceil_div(chunks.count, threads) * threads);
  chunks.images = ceil_div(batch, chunks.count);
  chunks.count = ceil_div(batch, chunks.images);
  chunks.slots = chunks.outer ? 1 : threads;
  return chunks;
}

// Buffers that a pass through the layers needs.
struct Work {
  char* maps[2];
  ConvScratch conv;

  static int64_t bytes(const TrunkPlan& plan, const Chunks& chunks) {
    return 2 * aligned(chunks.images * plan.most_map * plan.element()) + aligned(chunks.slots * plan.conv_scratch);
  }
  Work(const TrunkPlan& plan, const Chunks& chunks, Scratch& scratch) {
    for (char*& map : maps) map = scratch.take(chunks.images * plan.most_map * plan.element());
    conv = {scratch.take(chunks.slots * plan.conv_scratch), chunks.slots};
  }
  char* other(const void* used) const { return maps[used == maps[0] ? 1 : 0]; }
};

// Masks and codes of images from `first` on.
uint16_t* saved_of(const TrunkLayer& layer, uint8_t* saved, int64_t first) {
  if (saved == nullptr) return nullptr;
  return reinterpret_cast<uint16_t*>(saved + layer.saved_begin + first * layer.saved);
}

// Calls body(n images, first image, scratch, inner loop) for every chunk.
template <class Body>
void for_each_chunk(const Chunks& chunks, int64_t batch, int64_t bytes, ParallelFor parallel, const Body& body) {
  struct Context {
    const Chunks& chunks;
    int64_t batch, bytes;
    ParallelFor inner;
    const Body& body;
  } context{chunks, batch, bytes, chunks.outer ? serial : parallel, body};
  const auto range = [](void* pointer, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(pointer);
    for (int64_t i = begin; i < end; ++i) {
      Scratch scratch(c.bytes);
      const int64_t first = i * c.chunks.images;
      c.body(first, std::min(c.chunks.images, c.batch - first), scratch, c.inner);
    }
  };
  chunks.outer ? parallel(chunks.count, range, &context) : range(&context, 0, chunks.count);
}

template <class Row>
void run_pool_row(const TrunkPlan& plan, const Row& row) {
  if constexpr (std::is_same_v<Row, PoolRow>) {
    plan.dtype() == Dtype::bf16 ? VAEOPS_DISPATCH(pool_row<bf16>)(row) : VAEOPS_DISPATCH(pool_row<float>)(row);
  } else {
    plan.dtype() == Dtype::bf16 ? VAEOPS_DISPATCH(spread_row<bf16>)(row) : VAEOPS_DISPATCH(spread_row<float>)(row);
  }
}

template <class T>
T* advance(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + bytes);
}
const void* advance(const void* data, int64_t bytes) { return advance(static_cast<const char*>(data), bytes); }

void pool(const TrunkPlan& plan, const TrunkLayer& l, int64_t n, const void* x, void* y, uint16_t* code,
          ParallelFor inner) {
  const int64_t pixel = l.in * plan.element();
  parallel_for(inner, n * l.out_height, [&](int64_t r) {
    const int64_t image = r / l.out_height, top = 2 * (r % l.out_height);
    run_pool_row(plan,
                 PoolRow{l.width, l.in, advance(x, (image * l.height + top) * l.width * pixel),
                         static_cast<char*>(y) + r * l.out_width * pixel, advance(code, r * l.out_width * l.in / 4)});
  });
}

// The gradient before the ReLU (and the pool, if `below` pools) that gave layer l's map. g null: no pool above.
void spread(const TrunkPlan& plan, const TrunkLayer& l, int64_t n, const void* g, const uint16_t* code,
            const void* after, const uint16_t* mask, const void* before, void* gx, ParallelFor inner) {
  const int64_t h = l.out_height, w = l.out_width, row = w * l.out * plan.element(), words = w * l.out / 8;
  const int64_t pooled_h = h / 2, pooled_w = w / 2;
  parallel_for(inner, n * h, [&](int64_t r) {
    const int64_t image = r / h, y = r % h, pooled = image * pooled_h + y / 2;
    const bool covered = g != nullptr && y / 2 < pooled_h;
    SpreadRow s{};
    s.width = w;
    s.channels = l.out;
    s.pooled = covered ? pooled_w : 0;
    s.parity = y % 2;
    if (covered) {
      s.g = advance(g, pooled * pooled_w * l.out * plan.element());
      s.code = advance(code, pooled * pooled_w * l.out / 4);
    }
    s.after = advance(after, r * row);
    s.mask = advance(mask, r * words);
    s.before = advance(before, r * row);
    s.gx = static_cast<char*>(gx) + r * row;
    run_pool_row(plan, s);
  });
}

// Images [first, first + n): their maps to tap[...]; masks and codes to `saved` (null: not kept) from image `kept` on.
void forward(const TrunkPlan& plan, const VggImage& image, int64_t first, int64_t n, void* const* tap, uint8_t* saved,
             int64_t kept, const Work& work, ParallelFor inner) {
  const void* x = nullptr;
  for (int32_t i = 0; i < plan.layers; ++i) {
    const TrunkLayer& l = plan.layer[i];
    if (l.pool) {
      void* const y = l.after >= 0 ? tap[l.after] : work.other(x);
      pool(plan, l, n, x, y, saved_of(l, saved, kept), inner);
      x = y;
      continue;
    }
    const bool last = i == plan.layers - 1;
    ConvForward call{};
    call.x = x;
    call.packed = l.forward;
    call.n = n;
    call.h = l.height;
    call.w = l.width;
    call.in = l.in;
    call.out = l.out;
    if (last && l.after < 0) {
      call.y = tap[l.before];
    } else {
      call.relu = true;
      call.before = l.before >= 0 ? tap[l.before] : nullptr;
      call.mask = saved_of(l, saved, kept);
      call.y = l.after >= 0 ? tap[l.after] : nullptr;
      if (!last && plan.layer[i + 1].pool) {
        const TrunkLayer& above = plan.layer[++i];
        call.pooled = above.after >= 0 ? tap[above.after] : work.other(x);
        call.code = saved_of(above, saved, kept);
      } else if (call.y == nullptr) {
        call.y = work.other(x);
      }
    }
    x == nullptr ? conv_first(plan.algorithm, image, first, call, work.conv, inner)
                 : conv_forward(plan.algorithm, call, work.conv, inner);
    x = call.pooled != nullptr ? call.pooled : call.y;
  }
}

// gx [n, 3, H, W] from the gradients at the taps. `masked`: those after a ReLU are already those before it.
void backward(const TrunkPlan& plan, int64_t n, const void* const* grad, bool masked, const uint8_t* saved,
              int64_t kept, const float* rstd, void* gx, Dtype gx_dtype, const Work& work, ParallelFor inner) {
  const auto after = [&](const TrunkLayer& l) { return l.after >= 0 ? grad[l.after] : nullptr; };
  const auto before = [&](const TrunkLayer& l) { return l.before >= 0 ? grad[l.before] : nullptr; };
  const auto bits = [&](const TrunkLayer& l) { return saved_of(l, const_cast<uint8_t*>(saved), kept); };
  const auto mask = [&](const TrunkLayer& l) { return l.pool ? nullptr : bits(l); };
  int32_t i = plan.layers - 1;
  while (i >= 0 && after(plan.layer[i]) == nullptr && before(plan.layer[i]) == nullptr) --i;
  if (i < 0) {
    const int64_t bytes = gx_dtype == Dtype::f64 ? 8 : gx_dtype == Dtype::f32 ? 4 : 2;
    std::fill_n(static_cast<char*>(gx), n * 3 * plan.layer[0].height * plan.layer[0].width * bytes, char{0});
    return;
  }
  const TrunkLayer& top = plan.layer[i];
  const void* g = after(top);
  if (g == nullptr) {
    g = before(top);
  } else if (!top.pool && !(masked && before(top) == nullptr)) {
    void* const joined = work.maps[0];
    spread(plan, top, n, nullptr, nullptr, g, bits(top), before(top), joined, inner);
    g = joined;
  }
  for (; i >= 0; --i) {
    const TrunkLayer& l = plan.layer[i];
    void* const to = work.other(g);
    if (l.pool) {
      const TrunkLayer& below = plan.layer[i - 1];
      spread(plan, below, n, g, bits(l), after(below), mask(below), before(below), to, inner);
      g = to;
      continue;
    }
    ConvBackward call{};
    call.g = g;
    call.packed = l.backward;
    call.n = n;
    call.h = l.height;
    call.w = l.width;
    call.in = l.in;
    call.out = l.out;
    if (i == 0) return conv_first_backward(plan.algorithm, call, rstd, gx, gx_dtype, work.conv, inner);
    const TrunkLayer& below = plan.layer[i - 1];
    call.tap_after = after(below);
    call.mask = mask(below);
    call.tap_before = before(below);
    call.gx = to;
    conv_backward(plan.algorithm, call, work.conv, inner);
    g = to;
  }
}

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
  const int64_t image = 3 * call.height * call.width *
                        (call.gx_dtype == Dtype::f64   ? 8
                         : call.gx_dtype == Dtype::f32 ? 4
                                                       : 2);
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
  const int64_t image = 3 * call.height * call.width *
                        (call.gx_dtype == Dtype::f64   ? 8
                         : call.gx_dtype == Dtype::f32 ? 4
                                                       : 2);
  for_each_chunk(chunks, call.batch, bytes, parallel,
                 [&](int64_t first, int64_t n, Scratch& scratch, ParallelFor inner) {
                   const Work work(plan, chunks, scratch);
                   void *map[kVggTaps], *target[kVggTaps], *gradient[kVggTaps] = {};
                   take_taps(plan, trunk, chunks, scratch, map);
                   const Dtype target_dtype = given ? call.target_map_dtype : plan.dtype();
                   if (given) {
                     for (int32_t t = 0; t < trunk.taps; ++t) {
                       const int64_t offset = first * plan.tap_map(t) * (target_dtype == Dtype::bf16 ? 2 : 4);
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
