// The codebook as both passes of vq_assign read it, packed by one instruction set, and the vectors of fp64 that this
// and pass 2 compute in. No include guard: see foreach_isa.h.

#if VAEOPS_ISA == 2
using V = __m512d;
constexpr int kDoubles = 8;
constexpr int kPairs = 4;                     // (row, group) pairs that are scored at a time
constexpr int kRowTile = 12, kStepTiles = 2;  // rows and vectors of 16 codes that pass 1 keeps in registers
VAEOPS_INLINE V vset1(double x) { return _mm512_set1_pd(x); }
VAEOPS_INLINE V vload(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
VAEOPS_INLINE V vload(const double* p) { return _mm512_loadu_pd(p); }
VAEOPS_INLINE void vstore(double* p, V x) { _mm512_storeu_pd(p, x); }
VAEOPS_INLINE F narrow(const V* x) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x[0])), _mm512_cvtpd_ps(x[1]), 1);
}
VAEOPS_INLINE V vfma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
VAEOPS_INLINE V vsqrt(V x) { return _mm512_sqrt_pd(x); }
VAEOPS_INLINE F least(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
VAEOPS_INLINE uint32_t not_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ); }
VAEOPS_INLINE float sum_vector(F x) { return _mm512_reduce_add_ps(x); }
VAEOPS_INLINE float least_lane(F x) { return _mm512_reduce_min_ps(x); }
VAEOPS_INLINE V vleast(V a, V b) { return _mm512_min_pd(a, b); }
VAEOPS_INLINE double least_lane(V x) { return _mm512_reduce_min_pd(x); }
VAEOPS_INLINE uint32_t equal(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
#elif VAEOPS_ISA == 1
using V = __m256d;
constexpr int kDoubles = 4;
constexpr int kPairs = 2;
constexpr int kRowTile = 6, kStepTiles = 1;
VAEOPS_INLINE V vset1(double x) { return _mm256_set1_pd(x); }
VAEOPS_INLINE V vload(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
VAEOPS_INLINE V vload(const double* p) { return _mm256_loadu_pd(p); }
VAEOPS_INLINE void vstore(double* p, V x) { _mm256_storeu_pd(p, x); }
VAEOPS_INLINE F narrow(const V* x) { return _mm256_set_m128(_mm256_cvtpd_ps(x[1]), _mm256_cvtpd_ps(x[0])); }
VAEOPS_INLINE V vfma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
VAEOPS_INLINE V vsqrt(V x) { return _mm256_sqrt_pd(x); }
VAEOPS_INLINE F least(F a, F b) { return _mm256_min_ps(a, b); }
VAEOPS_INLINE uint32_t not_above(F a, F b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ)));
}
VAEOPS_INLINE float sum_vector(F x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
VAEOPS_INLINE float least_lane(F x) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
VAEOPS_INLINE V vleast(V a, V b) { return _mm256_min_pd(a, b); }
VAEOPS_INLINE double least_lane(V x) {
  const __m128d two = _mm_min_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_min_sd(two, _mm_unpackhi_pd(two, two)));
}
VAEOPS_INLINE uint32_t equal(V a, V b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ)));
}
#else
using V = double;
constexpr int kDoubles = 1;
constexpr int kPairs = 1;
constexpr int kRowTile = 2, kStepTiles = 1;
VAEOPS_INLINE V vset1(double x) { return x; }
VAEOPS_INLINE V vload(const float* p) { return *p; }
VAEOPS_INLINE V vload(const double* p) { return *p; }
VAEOPS_INLINE void vstore(double* p, V x) { *p = x; }
VAEOPS_INLINE F narrow(const V* x) { return static_cast<float>(*x); }
VAEOPS_INLINE V vfma(V a, V b, V c) { return __builtin_fma(a, b, c); }
VAEOPS_INLINE V vsqrt(V x) { return __builtin_sqrt(x); }
VAEOPS_INLINE F least(F a, F b) { return a < b ? a : b; }
VAEOPS_INLINE uint32_t not_above(F a, F b) { return !(a > b); }
VAEOPS_INLINE float sum_vector(F x) { return x; }
VAEOPS_INLINE float least_lane(F x) { return x; }
VAEOPS_INLINE V vleast(V a, V b) { return a < b ? a : b; }
VAEOPS_INLINE double least_lane(V x) { return x; }
VAEOPS_INLINE uint32_t equal(V a, V b) { return a == b; }
#endif

// a b + c in one rounding. Products of two fp32 are exact in fp64, so without an fma instruction two roundings do.
template <bool kExactProducts>
VAEOPS_INLINE V chain(V a, V b, V c) {
  if (VAEOPS_ISA == 0 && kExactProducts) return a * b + c;
  return vfma(a, b, c);
}
// In fp32, where the bound covers one rounding or two.
VAEOPS_INLINE F accumulate(F a, F b, F c) { return VAEOPS_ISA == 0 ? a * b + c : fma(a, b, c); }

// to[t][j] = from[j][t]; rows of `from` are `step` apart, row t of `to` is at outer (t / 4) + inner (t % 4).
VAEOPS_INLINE void transpose(const uint32_t* from, int64_t step, uint32_t* to, int64_t outer, int64_t inner) {
#if VAEOPS_ISA == 2
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512i x = _mm512_loadu_si512(from + i * step), y = _mm512_loadu_si512(from + (i + 1) * step);
    a[i] = _mm512_unpacklo_epi32(x, y);
    a[i + 1] = _mm512_unpackhi_epi32(x, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // b[i + c] holds columns c, 4 + c, 8 + c, 12 + c of rows i to i + 3
    const __m512i even0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xDD);
    const __m512i even1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88),
                  odd1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xDD);
    uint32_t* const at = to + c * inner;
    _mm512_storeu_si512(at, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(at + outer, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(at + 2 * outer, _mm512_shuffle_i32x4(even0, even1, 0xDD));
    _mm512_storeu_si512(at + 3 * outer, _mm512_shuffle_i32x4(odd0, odd1, 0xDD));
  }
#else
  for (int t = 0; t < 16; ++t) {
    for (int j = 0; j < 16; ++j) to[t / 4 * outer + t % 4 * inner + j] = from[j * step + t];
  }
#endif
}

// Packs the group's codes from `columns` [D][16]; their pass-1 operands go to `words` [slots, or pairs of slots][16].
// `scratch` holds 32 * slots bytes, for AMX.
template <class E>
static void pack_group(const VqPlan& p, const E* columns, int64_t group, uint16_t* scratch, uint32_t* words) {
  constexpr int kVectors = kGroup / kDoubles, kFloats = kGroup / kWidth;
  constexpr bool kExact = sizeof(E) == 4;
  const int64_t block = group / kBlockGroups, lane = group % kBlockGroups, dims = p.dims;
  const Metric metric = p.call->metric;

  V h[kVectors], spoilt[kVectors];  // spoilt: 0, or NaN where an element is NaN or Inf
  for (int i = 0; i < kVectors; ++i) h[i] = spoilt[i] = vset1(0);
  for (int64_t d = 0; d < dims; ++d) {
    for (int i = 0; i < kVectors; ++i) {
      const V e = vload(columns + d * kGroup + i * kDoubles);
      h[i] = chain<kExact>(e, e, h[i]);
      spoilt[i] = chain<kExact>(e, vset1(0), spoilt[i]);
    }
  }
  double factor[kGroup], half[kGroup], square[kGroup], bad[kGroup];
  for (int i = 0; i < kVectors; ++i) {
    vstore(square + i * kDoubles, h[i]);
    vstore(bad + i * kDoubles, spoilt[i]);
    vstore(factor + i * kDoubles, vsqrt(h[i]));
  }
  float raw = 0;
  uint32_t unusable = 0, beyond = 0;  // never chosen; for pass 2 alone
  for (int t = 0; t < kGroup; ++t) {
    const double norm = factor[t];
    const bool never = group * kGroup + t >= p.codes || bad[t] != 0 || (metric == Metric::cosine && !(norm > 0));
    half[t] = never                      ? (metric == Metric::cosine ? __builtin_nan("") : __builtin_inf())
              : metric == Metric::l2     ? 0.5 * square[t]
              : metric == Metric::cosine ? norm
                                         : 0;
    factor[t] = metric == Metric::cosine ? 1 / norm : p.scale;
    // Outside, the definition's norm is far from the true one, or infinite.
    if (metric == Metric::cosine && !never && !(square[t] > 0x1p-900 && square[t] < 0x1p900)) beyond |= 1u << t;
    if (never) unusable |= 1u << t;
    if (!never) {
      const float scaled = metric == Metric::cosine ? 1.0f : static_cast<float>(norm * p.scale) * kRoundUp;
      raw = scaled < raw ? raw : scaled;  // NaN is taken
    }
    p.half[group * kGroup + t] = half[t];
  }
  p.raw_norm[group] = raw;

  // Centred and scaled values v, a column at a time; their norms, and what they lose to bf16.
  bf16* const rounded = reinterpret_cast<bf16*>(scratch);  // [slots][16], negated
  float* const plain = reinterpret_cast<float*>(words);    // [D][16], negated
  F norm[kFloats], rest[kFloats], low[kFloats];
  for (int i = 0; i < kFloats; ++i) norm[i] = rest[i] = low[i] = set1(0);
  for (int64_t d = 0; d < dims; ++d) {
    V v[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int at = i * kDoubles;
      v[i] = chain<false>(vload(columns + d * kGroup + at), vload(factor + at), vset1(-p.mean[d]));
    }
    for (int i = 0; i < kFloats; ++i) {
      F x = narrow(v + i * (kWidth / kDoubles));
      if ((unusable | beyond) != 0) {
        float lanes[kWidth];
        store(lanes, x);
        for (int t = 0; t < kWidth; ++t) lanes[t] = ((unusable | beyond) >> (i * kWidth + t) & 1) != 0 ? 0 : lanes[t];
        x = load(lanes);
      }
      if (!p.amx) store(plain + d * kGroup + i * kWidth, set1(0) - x);
      norm[i] = accumulate(x, x, norm[i]);
      if (!p.amx) continue;
      bf16* const high = rounded + d * kGroup + i * kWidth;
      store(high, set1(0) - x);
      F r = x + load(high);
      if (p.split) {
        bf16* const second = high + dims * kGroup;
        store(second, set1(0) - r);
        const F l = load(second);
        low[i] = accumulate(l, l, low[i]);
        r = r + l;
        store(second + dims * kGroup, load(high));
      }
      rest[i] = accumulate(r, r, rest[i]);
    }
  }

  const float up = kRoundUp + static_cast<float>(dims) * 0x1p-22f;
  float norms[kGroup], rests[kGroup], lows[kGroup], largest = 0, residual = 0;
  for (int i = 0; i < kFloats; ++i) {
    store(norms + i * kWidth, norm[i]);
    store(rests + i * kWidth, rest[i]);
    store(lows + i * kWidth, low[i]);
  }
  for (int t = 0; t < kGroup; ++t) {
    const bool huge = !(norms[t] < kLargestNorm * kLargestNorm) || (beyond >> t & 1) != 0;
    if (huge) {
      largest = __builtin_inff();
      for (int64_t d = 0; d < dims; ++d) {
        for (int part = 0; part < 3 && p.amx && (part == 0 || p.split); ++part) {
          rounded[(part * dims + d) * kGroup + t].bits = 0;
        }
        if (!p.amx) plain[d * kGroup + t] = 0;
      }
    }
    const float size = huge ? 0 : __builtin_sqrtf(norms[t]) * up;
    // 2^-22: the subtraction of the mean and the rounding to fp32; 2^-8: x's low part times the code's is left out;
    // 2^-50: the norm that a code is divided by
    const float lost = huge ? 0
                            : (__builtin_sqrtf(rests[t]) + 0x1p-8f * __builtin_sqrtf(lows[t])) * up + size * 0x1p-22f +
                                  (metric == Metric::cosine ? 0x1p-50f : 0);
    largest = size > largest ? size : largest;
    residual = lost > residual ? lost : residual;
    const float bias = huge || (unusable >> t & 1) != 0 ? kNever : metric == Metric::l2 ? 0.5f * norms[t] : 0;
    p.bias[(block * kGroup + t) * kBlockGroups + lane] = p.bias_slots ? 0 : bias;
    if (p.amx && p.bias_slots) {
      float remaining = bias;
      for (int part = 0; part < 3; ++part) {
        bf16& slot = rounded[((p.split ? 3 : 1) * dims + part) * kGroup + t];
        slot = to_bf16(remaining);
        remaining -= widen(slot);
      }
    }
  }
  p.norm[group] = p.call->exact ? largest : 0;
  p.residual[group] = p.call->exact ? residual + kSmallest : 0;
  p.slack[group] =
      p.call->exact ? static_cast<float>(p.accumulation) * 0.5f * largest * largest * kRoundUp + kSmallest : 0;

  for (int64_t pair = 0; p.amx && pair < p.slots / 2; ++pair) {
    const bf16 *const even = rounded + 2 * pair * kGroup, *const odd = even + kGroup;
    for (int t = 0; t < kGroup; ++t) {
      words[pair * kGroup + t] = even[t].bits | static_cast<uint32_t>(odd[t].bits) << 16;
    }
  }
}

// A group beyond the codebook's end, where the block goes on: it is never chosen, and pass 2 does not look at it.
static void pack_absent(const VqPlan& p, int64_t group, uint32_t* words) {
  const int64_t count = p.amx ? p.slots / 2 : p.dims, slot = (p.split ? 3 : 1) * p.dims;
  std::memset(words, 0, static_cast<size_t>(count) * kGroup * sizeof(uint32_t));
  const uint32_t never = static_cast<uint32_t>(to_bf16(kNever).bits) << (slot % 2 * 16);
  for (int t = 0; t < kGroup; ++t) {
    if (p.bias_slots) words[slot / 2 * kGroup + t] = never;
    p.bias[(group / kBlockGroups * kGroup + t) * kBlockGroups + group % kBlockGroups] = p.bias_slots ? 0 : kNever;
  }
  p.norm[group] = p.residual[group] = p.slack[group] = p.raw_norm[group] = 0;
}

template <class T, class E>
static void load_columns(const VqPlan& p, int64_t group, E* columns /* [D][16] */) {
  const T* const codebook = static_cast<const T*>(p.call->codebook) + group * kGroup * p.dims;
  const int64_t count = p.codes - group * kGroup;
  int64_t done = 0;
  if (VAEOPS_ISA == 2 && p.call->codebook_dtype == Dtype::f32 && count >= kGroup) {
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(codebook);
    uint32_t* const to = reinterpret_cast<uint32_t*>(columns);
    for (; done + 16 <= p.dims; done += 16) transpose(from + done, p.dims, to + done * kGroup, 4 * kGroup, kGroup);
  }
  for (int t = 0; t < kGroup; ++t) {
    for (int64_t d = done; d < p.dims; ++d) {
      columns[d * kGroup + t] = t < count ? static_cast<E>(widen(codebook[t * p.dims + d])) : E(0);
    }
  }
}

static void load_columns64(const VqPlan& p, int64_t group, double* columns /* [D][16] */) {
  load_columns<double>(p, group, columns);
}

// Words of a group's operands, and how far apart the groups' are: not a multiple of a page, which would leave one set
// of the cache for all 16.
static int64_t operand_words(const VqPlan& p) { return p.amx ? p.slots / 2 : p.dims; }
static int64_t group_step(const VqPlan& p) { return operand_words(p) * kGroup + 16; }

// `words` holds 16 group_step.
static void pack_block(const VqPlan& p, int64_t block, double* columns64 /* [D][16], fp64 codebook */,
                       uint16_t* scratch, uint32_t* words) {
  if (p.amx) std::memset(scratch, 0, static_cast<size_t>(p.slots) * kGroup * sizeof(uint16_t));
  for (int64_t j = 0; j < kBlockGroups; ++j) {
    const int64_t group = block * kBlockGroups + j;
    float* const columns = p.columns == nullptr ? nullptr : p.columns + group * p.dims * kGroup;
    uint32_t* const own = words + j * group_step(p);
    if (group * kGroup >= p.codes) {
      pack_absent(p, group, own);
      continue;
    }
    switch (p.call->codebook_dtype) {
      case Dtype::f32:
        load_columns<float>(p, group, columns);
        break;
      case Dtype::bf16:
        load_columns<bf16>(p, group, columns);
        break;
      case Dtype::f16:
        load_columns<f16>(p, group, columns);
        break;
      case Dtype::f64:
        load_columns64(p, group, columns64);
        pack_group(p, columns64, group, scratch, own);
        continue;
    }
    pack_group(p, columns, group, scratch, own);
  }
  // From a lane per code of a group to a lane per group.
  const int64_t count = operand_words(p), steps = p.slots / 32;
  uint32_t* const tiles = static_cast<uint32_t*>(p.tiles) + block * kGroup * count * kBlockGroups;
  for (int64_t w = 0; w < count; ++w) {
    if (p.amx) {
      transpose(words + w * kGroup, group_step(p), tiles + w / 16 * 1024 + w % 16 * 16, steps * 1024, 256);
    } else {
      transpose(words + w * kGroup, group_step(p), tiles + w * 16, 64 * count, 16 * count);
    }
  }
}
