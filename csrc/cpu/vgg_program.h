// Passes of a chunk of images through a trunk, and how a call cuts its batch into chunks.
//
// Scratch memory is a chunk's, whatever the batch. With a chunk or more for every thread the threads share out the
// chunks; else the chunks follow each other and the threads share the work inside. No value depends on which, nor on
// the size of a chunk.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "cpu/strided.h"
#include "cpu/vgg_layers.h"

namespace vaeops::cpu {

constexpr int64_t kAlign = 64;
constexpr int64_t kChunkBytes = int64_t{8} << 20;  // of the largest map of a chunk

inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

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

struct Chunks {
  int64_t images, count;  // of a chunk; chunks
  bool outer;             // threads share out the chunks
  int64_t slots;          // of the convolutions' scratch
};

// How many ranges the caller's loop is cut into: its threads.
int64_t threads_of(ParallelFor parallel);
// Chunks of about `chunk_bytes`, an image counting for `image_bytes`.
Chunks chunks_of(int64_t image_bytes, int64_t chunk_bytes, int64_t batch, ParallelFor parallel);
inline Chunks chunks_of(const TrunkPlan& plan, int64_t batch, ParallelFor parallel) {
  return chunks_of(plan.most_map * plan.element(), kChunkBytes, batch, parallel);
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

// Calls body(first image, n images, scratch, inner loop) for every chunk.
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

template <class T>
T* advance(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + bytes);
}
inline const void* advance(const void* data, int64_t bytes) { return advance(static_cast<const char*>(data), bytes); }

// Images [first, first + n): their maps to tap[...]; masks and codes to `saved` (null: not kept) from image `kept` on.
void forward(const TrunkPlan& plan, const VggImage& image, int64_t first, int64_t n, void* const* tap, uint8_t* saved,
             int64_t kept, const Work& work, ParallelFor inner);
// gx [n, 3, H, W] from the gradients at the taps. `masked`: those after a ReLU are already those before it.
void backward(const TrunkPlan& plan, int64_t n, const void* const* grad, bool masked, const uint8_t* saved,
              int64_t kept, const float* rstd, void* gx, Dtype gx_dtype, const Work& work, ParallelFor inner);

}  // namespace vaeops::cpu
