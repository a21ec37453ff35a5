// Nearest codes on a CPU: the codebook packed, rows in blocks through both passes of vq_assign.h.
#include "cpu/vq_assign.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "cpu/strided.h"

#define VAEOPS_KERNELS "cpu/vq_assign_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

#if defined(__x86_64__)
VAEOPS_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
namespace vaeops::cpu::amx {
using namespace avx512;
#include "cpu/vq_assign_amx.h"
}  // namespace vaeops::cpu::amx
VAEOPS_TARGET_END
#endif

#include "cpu/vq_plan.h"

namespace vaeops::cpu {

double power_below(double size, bool wide) {
  int exponent = 0;
  if (size > 0 && size < std::numeric_limits<double>::infinity()) std::frexp(size, &exponent);
  const int limit = wide ? 1000 : 120;
  return std::ldexp(1.0, -std::clamp(exponent, -limit, limit));
}

float kth_least(const float* values, int64_t n, int64_t k) {
  if (k > n) return std::numeric_limits<float>::infinity();
  std::vector<float> copy(values, values + n);
  std::nth_element(copy.begin(), copy.begin() + (k - 1), copy.end());
  return copy[static_cast<size_t>(k - 1)];
}

namespace {

void pass_one(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
#if defined(__x86_64__)
  if (p.amx) {
    amx::pass_one(p, rows, block, slot);
    return avx512::put_bounds(p, rows, block, slot);
  }
#endif
  VAEOPS_DISPATCH(pass_one)(p, rows, block, slot);
  VAEOPS_DISPATCH(put_bounds)(p, rows, block, slot);
}

void put_index(const Indices& indices, int64_t at, int64_t value) {
  if (indices.int32) {
    static_cast<int32_t*>(indices.data)[at] = static_cast<int32_t>(value);
  } else {
    static_cast<int64_t*>(indices.data)[at] = value;
  }
}

// The best codes of a row so far, ascending by (score, index).
class Best {
 public:
  explicit Best(int64_t k) : k_(k), scores_(static_cast<size_t>(k)), indices_(static_cast<size_t>(k)) {}
  void clear() { count_ = 0; }
  void offer(double score, int64_t index) {  // Inf and NaN are refused
    if (!(score < std::numeric_limits<double>::infinity())) return;
    if (count_ == k_ && !before(score, index, count_ - 1)) return;
    int64_t at = count_ < k_ ? count_++ : k_ - 1;
    for (; at > 0 && before(score, index, at - 1); --at) {
      scores_[at] = scores_[at - 1];
      indices_[at] = indices_[at - 1];
    }
    scores_[at] = score;
    indices_[at] = index;
  }
  // Where fewer than k codes can be chosen, the lowest other indices follow with score inf.
  void pad() {
    for (int64_t next = 0; count_ < k_; ++next) {
      if (std::find(indices_.begin(), indices_.begin() + count_, next) != indices_.begin() + count_) continue;
      scores_[count_] = std::numeric_limits<double>::infinity();
      indices_[count_++] = next;
    }
  }
  double score(int64_t j) const { return scores_[j]; }
  int64_t index(int64_t j) const { return indices_[j]; }

 private:
  bool before(double score, int64_t index, int64_t j) const {
    return score < scores_[j] || (score == scores_[j] && index < indices_[j]);
  }
  int64_t k_, count_ = 0;
  std::vector<double> scores_;
  std::vector<int64_t> indices_;
};

constexpr int kMostPairs = 4;  // of any instruction set
constexpr double kSerialProducts = 1 << 23;

// What a thread works in.
struct Scratch {
  Workspace memory;
  VqRows rows{};
  VqCandidates found{};
  float* v;
  int64_t* offset;  // [kRowBlock] of the block's rows in x
  double* x;        // [pairs][D]
  double* columns;  // [pairs][D][16], for an fp64 codebook
  double* scores;   // [pairs][16]
  char* operands;
  std::vector<Best> best;  // [pairs]

  Scratch(const VqPlan& p, bool lists) {
    const int64_t pairs = VAEOPS_DISPATCH(pairs)();
    memory.add(operands, kRowBlock * p.slots * (p.amx ? 2 : 4));
    memory.add(rows.lower, kRowBlock * kPanelBlocks * kBlockGroups);
    memory.add(rows.upper, kRowBlock * p.upper_vectors * kBlockGroups);
    if (p.amx) memory.add(rows.products, 2 * 4 * 256);
    memory.add(v, p.dims + 16);
    memory.add(offset, kRowBlock);
    memory.add(x, pairs * p.dims);
    if (p.columns == nullptr) memory.add(columns, pairs * p.dims * kGroup);
    memory.add(scores, pairs * kGroup);
    if (lists) {
      memory.add(found.count, kRowBlock);
      memory.add(found.bound, kRowBlock);
      memory.add(found.group, kRowBlock * p.most_groups);
      memory.add(found.lower, kRowBlock * p.most_groups);
    }
    memory.allocate();
    rows.operands = operands;
    best.assign(static_cast<size_t>(pairs), Best(std::max<int64_t>(p.call->k, 1)));
  }
};

template <class T>
class Search {
 public:
  explicit Search(const VqPlan& p) : p_(p), call_(*p.call), data_(static_cast<const T*>(call_.x.operand.data)) {}

  void run(ParallelFor parallel) const {
    const int64_t n = call_.shape.n, row_blocks = ceil_div(n, kRowBlock);
    // Few rows: the codes are split as well, in chunks of at least 1024.
    const int64_t wanted = call_.k > 16 || row_blocks >= 16 ? 1 : ceil_div(16, row_blocks);
    const int64_t chunks = std::min(wanted, std::max<int64_t>(1, p_.blocks / 4));
    if (chunks == 1) {
      parallel_ranges(parallel, row_blocks, [&](int64_t begin, int64_t end) {
        Scratch own(p_, true);
        const Tiles tiles(p_);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task * kRowBlock, last = std::min(n, first + kRowBlock);
          find(own, own.found, first, last, 0, p_.blocks);
          settle(own, &own.found, 1);
        }
      });
      return;
    }
    Workspace shared;
    const int64_t lists = chunks * row_blocks;
    std::vector<VqCandidates> found(static_cast<size_t>(lists));
    for (VqCandidates& list : found) {
      shared.add(list.count, kRowBlock);
      shared.add(list.bound, kRowBlock);
      shared.add(list.group, kRowBlock * p_.most_groups);
      shared.add(list.lower, kRowBlock * p_.most_groups);
    }
    shared.allocate();
    parallel_ranges(parallel, lists, [&](int64_t begin, int64_t end) {
      Scratch own(p_, false);
      const Tiles tiles(p_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / chunks * kRowBlock, last = std::min(n, first + kRowBlock), chunk = task % chunks;
        find(own, found[task], first, last, p_.blocks * chunk / chunks, p_.blocks * (chunk + 1) / chunks);
      }
    });
    parallel_ranges(parallel, row_blocks, [&](int64_t begin, int64_t end) {
      Scratch own(p_, false);
      for (int64_t block = begin; block < end; ++block) {
        place(own, block * kRowBlock, std::min(n, (block + 1) * kRowBlock));
        settle(own, found.data() + block * chunks, chunks);
      }
    });
  }

 private:
  // Tile registers are a thread's own, and cost every thread switch while they are in use.
  struct Tiles {
    explicit Tiles(const VqPlan& p) : used(p.amx) { use(true); }
    ~Tiles() { use(false); }
    void use([[maybe_unused]] bool begin) {
#if defined(__x86_64__)
      if (used) amx::use_tiles(begin);
#endif
    }
    bool used;
  };

  // Which rows of [begin, end) are used, and where they lie. The others get their index here.
  void place(Scratch& own, int64_t begin, int64_t end) const {
    const int64_t width = std::max<int64_t>(call_.k, 1);
    VqRows& rows = own.rows;
    rows.count = 0;
    for_each_run(call_.shape, call_.x.operand.stride, begin, end - begin,
                 [&](int64_t at, int64_t step, int64_t position, int64_t count) {
                   for (int64_t i = 0; i < count; ++i) {
                     const int64_t n = begin + position + i;
                     if (call_.mask != nullptr && call_.mask[n] == 0) {
                       for (int64_t j = 0; j < width; ++j)
                         put(n * width + j, -1, std::numeric_limits<double>::infinity());
                       continue;
                     }
                     rows.position[rows.count] = n;
                     own.offset[rows.count++] = at + i * step;
                   }
                 });
  }

  void put(int64_t at, int64_t index, double score) const {
    put_index(call_.indices, at, index);
    if (call_.scores == nullptr) return;
    if (call_.scores_f64) {
      static_cast<double*>(call_.scores)[at] = score;
    } else {
      static_cast<float*>(call_.scores)[at] = static_cast<float>(score);
    }
  }

  // Pass 1: candidates among the codes of some blocks.
  void find(Scratch& own, const VqCandidates& found, int64_t begin, int64_t end, int64_t first, int64_t last) const {
    place(own, begin, end);
    VqRows& rows = own.rows;
    if (rows.count == 0) return;
    for (int64_t i = 0; i < rows.count; ++i) {
      VAEOPS_DISPATCH(pack_row<T>)(p_, rows, i, data_ + own.offset[i], call_.x.step, own.v);
      found.count[i] = 0;
    }
    VAEOPS_DISPATCH(bound_rows)(p_, rows);
    std::fill_n(rows.upper, rows.count * p_.upper_vectors * kBlockGroups, std::numeric_limits<float>::infinity());
    for (int64_t panel = first; panel < last; panel += kPanelBlocks) {
      const int64_t blocks = std::min<int64_t>(kPanelBlocks, last - panel);
      for (int64_t slot = 0; slot < blocks; ++slot) pass_one(p_, rows, panel + slot, slot);
      for (int64_t i = 0; i < rows.count; ++i) VAEOPS_DISPATCH(collect)(p_, rows, i, panel, blocks, found);
    }
  }

  // Pass 2: exact scores of the candidates.
  void settle(Scratch& own, const VqCandidates* found, int64_t lists) const {
    const int64_t pairs = VAEOPS_DISPATCH(pairs)(), k = std::max<int64_t>(call_.k, 1);
    std::vector<Best>& best = own.best;  // of the rows under way
    int64_t row[kMostPairs], group[kMostPairs];
    int64_t waiting = 0;
    const auto score = [&] {
      if (waiting > 0) score_pairs(own, row, group, waiting, best);
      waiting = 0;
    };
    const int64_t all = ceil_div(p_.codes, kGroup);
    for (int64_t base = 0; base < own.rows.count; base += pairs) {
      const int64_t count = std::min(pairs, own.rows.count - base);
      for (int64_t i = 0; i < count; ++i) {
        const T* const x = data_ + own.offset[base + i];
        double* const to = own.x + i * p_.dims;
        VAEOPS_DISPATCH(widen_row<T>)(x, call_.x.step, p_.dims, to);
        best[i].clear();
        const auto add = [&](int64_t g) {
          row[waiting] = i;
          group[waiting] = g;
          if (++waiting == pairs) score();
        };
        bool any = false;
        float bound = std::numeric_limits<float>::infinity();
        for (int64_t list = 0; list < lists; ++list) {
          any = any || found[list].count[base + i] < 0;
          bound = std::min(bound, found[list].bound[base + i]);
        }
        if (any) {
          bool finite = true;
          for (int64_t d = 0; d < p_.dims; ++d) finite = finite && std::isfinite(to[d]);
          for (int64_t g = 0; finite && g < all; ++g) add(g);
          continue;
        }
        for (int64_t list = 0; list < lists; ++list) {
          const int64_t at = (base + i) * p_.most_groups;
          for (int32_t j = 0; j < found[list].count[base + i]; ++j) {
            const int64_t g = found[list].group[at + j];
            if (!(found[list].lower[at + j] > bound) && g < all) add(g);
          }
        }
      }
      score();
      for (int64_t i = 0; i < count; ++i) {
        best[i].pad();
        for (int64_t j = 0; j < k; ++j) put(own.rows.position[base + i] * k + j, best[i].index(j), best[i].score(j));
      }
    }
  }

  void score_pairs(Scratch& own, const int64_t* row, const int64_t* group, int64_t count,
                   std::vector<Best>& best) const {
    const int64_t pairs = VAEOPS_DISPATCH(pairs)();
    const double* x[kMostPairs];
    const double* half[kMostPairs];
    double smallest[kMostPairs];
    int64_t nearest[kMostPairs];
    for (int64_t i = 0; i < pairs; ++i) {
      x[i] = own.x + row[i < count ? i : 0] * p_.dims;
      half[i] = p_.half + group[i < count ? i : 0] * kGroup;
    }
    const bool cosine = call_.metric == Metric::cosine;
    if (p_.columns == nullptr) {
      const double* e[kMostPairs];
      for (int64_t i = 0; i < pairs; ++i) {
        e[i] = own.columns + (i < count ? i : 0) * p_.dims * kGroup;
        if (i < count) VAEOPS_DISPATCH(load_columns64)(p_, group[i], own.columns + i * p_.dims * kGroup);
      }
      VAEOPS_DISPATCH(score_groups<double>)(x, e, half, p_.dims, false, cosine, own.scores, smallest, nearest);
    } else {
      const float* e[kMostPairs];
      for (int64_t i = 0; i < pairs; ++i) e[i] = p_.columns + group[i < count ? i : 0] * p_.dims * kGroup;
      VAEOPS_DISPATCH(score_groups<float>)(x, e, half, p_.dims, !p_.wide, cosine, own.scores, smallest, nearest);
    }
    for (int64_t i = 0; i < count; ++i) {
      Best& b = best[row[i]];
      if (call_.k <= 1) {
        b.offer(smallest[i], group[i] * kGroup + nearest[i]);
        continue;
      }
      for (int t = 0; t < kGroup; ++t) b.offer(own.scores[i * kGroup + t], group[i] * kGroup + t);
    }
  }

  const VqPlan& p_;
  const VqAssign& call_;
  const T* data_;
};

}  // namespace

void vq_assign(const VqAssign& call, ParallelFor parallel) {
  if (call.shape.n == 0) return;
  // Waking threads costs more than a small search takes. Nothing depends on who does the work.
  const double products = static_cast<double>(call.shape.n) * static_cast<double>(call.codes) * call.dims;
  if (products < kSerialProducts) parallel = serial;
  Workspace memory;
  const VqPlan p = make_plan(call, memory, parallel);
  switch (call.x.operand.dtype) {
    case Dtype::f32:
      return Search<float>(p).run(parallel);
    case Dtype::bf16:
      return Search<bf16>(p).run(parallel);
    case Dtype::f16:
      return Search<f16>(p).run(parallel);
    case Dtype::f64:
      return Search<double>(p).run(parallel);
  }
}

}  // namespace vaeops::cpu
