// Both passes of vq_assign for one instruction set. No include guard: see foreach_isa.h. The structs and the bound are
// in vq_assign.h.
#include "cpu/vq_pack_kernels.h"

// Row i of the task as an operand of pass 1; leaves |v|^2 in rows.b and what rounding v lost, squared, in rows.a.
// `x` are its elements, `step` apart; `v` holds D + 16 floats.
template <class T>
static void pack_row(const VqPlan& p, VqRows& rows, int64_t i, const T* x, int64_t step, float* v) {
  const int64_t dims = p.dims, padded = (dims + 15) / 16 * 16;
  const bool l2 = p.call->metric == Metric::l2;
  double scale = p.scale;
  if (!l2) {  // any scale of a row's own will do
    double most = 0;
    for (int64_t d = 0; d < dims; ++d) {
      const double size = __builtin_fabs(static_cast<double>(widen(x[d * step])));
      most = size > most ? size : most;
    }
    scale = power_below(most, p.wide);
  }
  rows.scale[i] = scale;
  if (p.wide) {
    for (int64_t d = 0; d < dims; ++d) {
      v[d] = static_cast<float>(static_cast<double>(widen(x[d * step])) * scale - (l2 ? p.mean[d] : 0));
    }
  } else {
    const float s = static_cast<float>(scale);
    if (step == 1) {
      for (int64_t d = 0; d < dims; ++d) v[d] = static_cast<float>(widen(x[d])) * s - p.row_mean[d];
    } else {
      for (int64_t d = 0; d < dims; ++d) v[d] = static_cast<float>(widen(x[d * step])) * s - p.row_mean[d];
    }
  }
  for (int64_t d = dims; d < padded; ++d) v[d] = 0;

  F square = set1(0), rest = set1(0);
  if (!p.amx) {
    float* const to = static_cast<float*>(rows.operands) + i * dims;
    for (int64_t d = 0; d < dims; ++d) to[d] = v[d];
    for (int64_t d = 0; d < padded; d += kWidth) square = accumulate(load(v + d), load(v + d), square);
    rows.b[i] = sum_vector(square);
    rows.a[i] = 0;
    return;
  }
  const int64_t steps = p.slots / 32;
  bf16* const halves = static_cast<bf16*>(rows.operands) + i / 16 * steps * 512 + i % 16 * 32;
  const auto slot = [&](int64_t s) -> bf16& { return halves[(s >> 5) * 512 + (s & 31)]; };
  for (int64_t d = 0; d < padded; d += kWidth) {
    const F value = load(v + d);
    bf16* const to = &slot(d);
    store(to, value);
    const F r = value - load(to);
    if (p.split) store(v + d, r);
    square = accumulate(value, value, square);
    rest = accumulate(r, r, rest);
  }
  rows.b[i] = sum_vector(square);
  rows.a[i] = sum_vector(rest);
  for (int64_t s = padded; s < p.slots; ++s) slot(s).bits = 0;
  int64_t next = dims;
  if (p.split) {
    float lost = 0;
    for (int64_t d = 0; d < dims; ++d) {
      slot(dims + d) = slot(d);
      bf16& low = slot(2 * dims + d) = to_bf16(v[d]);
      const float r = v[d] - widen(low);
      lost += r * r;
    }
    rows.a[i] = lost;
    next = 3 * dims;
  }
  for (int part = 0; part < 3 && p.bias_slots; ++part) slot(next + part).bits = 0x3F80;  // 1
}

// The rows' part of the bounds, from what pack_row left.
static void bound_rows(const VqPlan& p, VqRows& rows) {
  const float up = kRoundUp + static_cast<float>(p.dims) * 0x1p-22f, c = static_cast<float>(p.accumulation) + 0x1p-22f;
  const bool l2 = p.call->metric == Metric::l2;
  const double largest = p.largest, mean = l2 ? largest : 0, code = l2 ? largest * largest : 0;
  const double code_scale = p.call->metric == Metric::cosine ? 1 : p.scale, terms = static_cast<double>(p.dims + 8);
  for (int64_t i = 0; i < rows.count; ++i) {
    const float square = rows.b[i], norm = __builtin_sqrtf(square) * up, scale = __builtin_sqrtf(rows.a[i]) * up;
    const double products = (norm + mean) * largest + code;  // of operands that are not centred
    // The last term: products that are subnormal in fp64.
    const double own = terms * (products * 0x1p-53 + 0x1p-1074 * p.scale * rows.scale[i]);
    // Beyond, the definition may overflow where pass 1 does not.
    const bool settled = square < kLargestNorm * kLargestNorm && products < 0x1p500 * rows.scale[i] * code_scale;
    rows.a[i] = (scale + norm * c) * kRoundUp + kSmallest;
    rows.b[i] = norm * (1 + 0x1p-7f);
    rows.slack[i] = settled ? static_cast<float>(2 * own) * kRoundUp : __builtin_inff();
  }
  if (!p.call->exact) {
    for (int64_t i = 0; i < rows.count; ++i) {
      rows.a[i] = rows.b[i] = 0;
      if (rows.slack[i] < __builtin_inff()) rows.slack[i] = 0;
    }
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    if (rows.slack[i] < __builtin_inff()) continue;
    rows.a[i] = rows.b[i] = 0;
    const int64_t steps = p.slots / 32;
    for (int64_t s = 0; s < p.slots; ++s) {
      if (p.amx) {
        static_cast<bf16*>(rows.operands)[i / 16 * steps * 512 + i % 16 * 32 + (s >> 5) * 512 + (s & 31)].bits = 0;
      } else {
        static_cast<float*>(rows.operands)[i * p.slots + s] = 0;
      }
    }
  }
}

// Turns a block's minima m into bounds; `slot` is the block's place in the panel.
static void put_bounds(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
  constexpr int kParts = kBlockGroups / kWidth;
  const int64_t count = rows.count, step = p.upper_vectors * kBlockGroups;
  float* const lower = rows.lower + slot * kRowBlock * kBlockGroups;
  float* const upper = rows.upper + block % p.upper_vectors * kBlockGroups;
  for (int i = 0; i < kParts; ++i) {
    const int64_t group = block * kBlockGroups + i * kWidth;
    const F norm = load(p.norm + group), residual = load(p.residual + group), slack = load(p.slack + group);
    for (int64_t r = 0; r < count; ++r) {
      float *const m = lower + r * kBlockGroups + i * kWidth, *const u = upper + r * step + i * kWidth;
      const F least_score = load(m);
      const F bound = accumulate(set1(rows.a[r]), norm, accumulate(set1(rows.b[r]), residual, slack));
      store(m, least_score - bound);
      store(u, least(least_score + bound, load(u)));
    }
  }
}

// Pass 1 in fp32 over one block of codes: each group's minimum goes to rows.lower.
static void pass_one(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
  constexpr int kVectors = kStepTiles * kBlockGroups / kWidth, kParts = kBlockGroups / kWidth;
  const int64_t dims = p.dims;
  const float* const tiles = static_cast<const float*>(p.tiles) + block * kGroup * dims * kBlockGroups;
  const float* const bias = p.bias + block * kCodeBlock;
  for (int64_t row = 0; row < rows.count; row += kRowTile) {
    const float* const x = static_cast<const float*>(rows.operands) + row * dims;
    F minima[kRowTile][kParts];
    for (int r = 0; r < kRowTile; ++r) {
      for (int i = 0; i < kParts; ++i) minima[r][i] = set1(__builtin_inff());
    }
    for (int t = 0; t < kGroup; t += kStepTiles) {
      F acc[kRowTile][kVectors];
      for (int r = 0; r < kRowTile; ++r) {
        for (int i = 0; i < kVectors; ++i) acc[r][i] = load(bias + t * kBlockGroups + i * kWidth);
      }
      const float* const e = tiles + t * dims * kBlockGroups;
      for (int64_t d = 0; d < dims; ++d) {
        F code[kVectors];
        for (int i = 0; i < kVectors; ++i) {
          code[i] = load(e + (i / kParts * dims + d) * kBlockGroups + i % kParts * kWidth);
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRowTile; ++r) {
          const F value = set1(x[r * dims + d]);
#pragma GCC unroll 16
          for (int i = 0; i < kVectors; ++i) acc[r][i] = accumulate(value, code[i], acc[r][i]);
        }
      }
      for (int r = 0; r < kRowTile; ++r) {
        for (int i = 0; i < kVectors; ++i) minima[r][i % kParts] = least(acc[r][i], minima[r][i % kParts]);
      }
    }
    for (int r = 0; r < kRowTile && row + r < rows.count; ++r) {
      float* const to = rows.lower + (slot * kRowBlock + row + r) * kBlockGroups;
      for (int i = 0; i < kParts; ++i) store(to + i * kWidth, minima[r][i]);
    }
  }
}

// Appends the groups of a panel whose lower bound does not exceed the row's least upper bound so far.
static void collect(const VqPlan& p, const VqRows& rows, int64_t i, int64_t first_block, int64_t panel_blocks,
                    const VqCandidates& found) {
  int32_t count = found.count[i];
  if (count < 0) return;
  float bound;
  const float* const upper = rows.upper + i * p.upper_vectors * kBlockGroups;
  if (p.call->k <= 1) {
    F u = load(upper);
    for (int j = 1; j < kBlockGroups / kWidth; ++j) u = least(load(upper + j * kWidth), u);
    bound = least_lane(u);
  } else {
    bound = kth_least(upper, p.upper_vectors * kBlockGroups, p.call->k);
  }
  bound += rows.slack[i] + __builtin_fabsf(bound) * 0x1p-22f;
  found.bound[i] = bound;
  if (!(bound < kNever / 2)) {
    found.count[i] = -1;
    return;
  }
  const float* const lower = rows.lower + i * kBlockGroups;  // of a block; the next one's is kRowBlock rows on
  int32_t* const group = found.group + i * p.most_groups;
  float* const kept = found.lower + i * p.most_groups;
  for (int64_t at = 0; at < panel_blocks * kBlockGroups; at += kWidth) {
    const float* const lanes = lower + at / kBlockGroups * kRowBlock * kBlockGroups + at % kBlockGroups;
    for (uint32_t mask = not_above(load(lanes), set1(bound)); mask != 0; mask &= mask - 1) {
      if (count == p.most_groups) {
        int32_t still = 0;
        for (int32_t j = 0; j < count; ++j) {
          group[still] = group[j];
          kept[still] = kept[j];
          still += !(kept[j] > bound);
        }
        count = still;
        if (count == p.most_groups) {
          found.count[i] = -1;
          return;
        }
      }
      const int lane = __builtin_ctz(mask);
      group[count] = static_cast<int32_t>(first_block * kBlockGroups + at + lane);
      kept[count++] = lanes[lane];
    }
  }
  found.count[i] = count;
}

template <bool kExactProducts, class E>
VAEOPS_INLINE void chains(const double* const* x, const E* const* e, int64_t dims,
                          V (&acc)[kPairs][kGroup / kDoubles]) {
  for (int i = 0; i < kPairs; ++i) {
    for (int j = 0; j < kGroup / kDoubles; ++j) acc[i][j] = vset1(0);
  }
  for (int64_t d = 0; d < dims; ++d) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const V value = vset1(x[i][d]);
#pragma GCC unroll 16
      for (int j = 0; j < kGroup / kDoubles; ++j) {
        acc[i][j] = chain<kExactProducts>(value, vload(e[i] + d * kGroup + j * kDoubles), acc[i][j]);
      }
    }
  }
}

// The definition's scores of kPairs pairs of a row x [D] and a group's codes e [D][16], half [16]; the least score of
// each pair and the first code that has it (a NaN is none; where all are, the least is not below inf).
template <class E>
static void score_groups(const double* const* x, const E* const* e, const double* const* half, int64_t dims,
                         bool exact_products, bool cosine, double* scores /* [kPairs][16] */,
                         double* smallest /* [kPairs] */, int64_t* nearest /* [kPairs] */) {
  constexpr int kVectors = kGroup / kDoubles;
  V acc[kPairs][kVectors];
  if (sizeof(E) == 4 && exact_products) {
    chains<true>(x, e, dims, acc);
  } else {
    chains<false>(x, e, dims, acc);
  }
  for (int i = 0; i < kPairs; ++i) {
    V s[kVectors], best = vset1(__builtin_inf());
    for (int j = 0; j < kVectors; ++j) {
      const V h = vload(half[i] + j * kDoubles);
      s[j] = cosine ? (vset1(0) - acc[i][j]) / h : h - acc[i][j];
      vstore(scores + i * kGroup + j * kDoubles, s[j]);
      best = vleast(s[j], best);
    }
    smallest[i] = least_lane(best);
    uint32_t where = 0;
    for (int j = 0; j < kVectors; ++j) where |= equal(s[j], vset1(smallest[i])) << (j * kDoubles);
    nearest[i] = where != 0 ? __builtin_ctz(where) : 0;
  }
}

// Row of x in fp64.
template <class T>
static void widen_row(const T* x, int64_t step, int64_t dims, double* to) {
  if (step == 1) {
    for (int64_t d = 0; d < dims; ++d) to[d] = widen(x[d]);
  } else {
    for (int64_t d = 0; d < dims; ++d) to[d] = widen(x[d * step]);
  }
}

static int64_t pairs() { return kPairs; }
