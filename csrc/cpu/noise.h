// The noise stream for one instruction set: Philox4x32-10 and the portable Box-Muller of vaeops/ref/rng.py. No include
// guard: see foreach_isa.h.

constexpr int kBlock = 64;                 // normals made at a time: 16 Philox blocks
constexpr int kVectors = kBlock / kWidth;  // vectors that hold them

// The logarithm's polynomial in m - 1, from the highest power down to the square.
constexpr float kLog[9] = {-0.13191646f, 0.1396245f,   -0.12115126f, 0.1401092f, -0.16685466f,
                           0.20010044f,  -0.24999689f, 0.33333224f,  -0.5f};

// log(1 + f) for |f| <= 1/3.
VAEOPS_INLINE F log1p_third(F f) {
  const F p = horner(f, set1(kLog[0]), kLog[1], kLog[2], kLog[3], kLog[4], kLog[5], kLog[6], kLog[7], kLog[8]);
  return fma(p, f * f, f);
}

// Natural logarithm of u in [2^-33, 1].
VAEOPS_INLINE F log_unit(F u) {
  const I exponent = iand(isub(bits(u), iset1(0x3F2AAAAB)), iset1(0xFF800000));
  const F k = to_float(exponent) * set1(0x1p-23f);
  return fma(k, set1(0.693147182f), log1p_third(floats(isub(bits(u), exponent)) - set1(1.0f)));
}

#define VAEOPS_EACH _Pragma("GCC unroll 2") for (int v = 0; v < kN; ++v)

// 2 kN vectors of normals from kN vectors of word pairs, in steps `begin`, `stage` 1 to 9 and `end`.
//
// The logarithm and the radius are the reference's with powers of two moved into the constants: g = 2 (m - 1), and the
// square root's argument -2 log u in one piece. Scaling is exact, so the bits are the reference's, the sign of a radius
// of zero included.
template <int kN>
struct BoxMuller {
  I a[kN], b[kN];
  F g[kN], k[kN], p[kN], radius[kN], r[kN], t[kN], sine[kN], cosine[kN];

  VAEOPS_INLINE_METHOD void begin(const I (&first)[kN], const I (&second)[kN]) {
    VAEOPS_EACH b[v] = second[v];
    VAEOPS_EACH a[v] = bits(fma(unsigned_to_float(first[v]), set1(0x1p-31f), set1(0x1p-32f)));  // 2 u
    VAEOPS_EACH r[v] = to_float(shl<2>(b[v])) * set1(0x1p-32f);  // the angle, cut to an eighth of a turn in integers
  }

  VAEOPS_INLINE_METHOD void stage(int i) {
    if (i == 1) {
      VAEOPS_EACH {
        const I exponent = iand(isub(a[v], iset1(0x3FAAAAAB)), iset1(0xFF800000));
        g[v] = floats(isub(a[v], exponent)) - set1(2.0f);
        k[v] = to_float(exponent);
      }
      VAEOPS_EACH t[v] = r[v] * r[v];
    } else if (i == 2) {
      VAEOPS_EACH p[v] = fma(g[v], set1(kLog[0] * 0x1p-9f), set1(kLog[1] * 0x1p-8f));
      VAEOPS_EACH sine[v] = fma(t[v], set1(0.00015820675f), set1(-0.0046812664f));
    } else if (i == 3) {
      VAEOPS_EACH p[v] = horner(g[v], p[v], kLog[2] * 0x1p-7f, kLog[3] * 0x1p-6f);
      VAEOPS_EACH cosine[v] = fma(t[v], set1(0.0009040216f), set1(-0.020860288f));
    } else if (i == 4) {
      VAEOPS_EACH p[v] = horner(g[v], p[v], kLog[4] * 0x1p-5f, kLog[5] * 0x1p-4f);
      VAEOPS_EACH sine[v] = fma(t[v], sine[v], set1(0.07969258f));
    } else if (i == 5) {
      VAEOPS_EACH p[v] = horner(g[v], p[v], kLog[6] * 0x1p-3f, kLog[7] * 0x1p-2f);
      VAEOPS_EACH cosine[v] = fma(t[v], cosine[v], set1(0.25366923f));
    } else if (i == 6) {
      VAEOPS_EACH p[v] = fma(fma(g[v], p[v], set1(kLog[8] * 0x1p-1f)), g[v] * g[v], g[v]);
      VAEOPS_EACH sine[v] = fma(t[v], sine[v], set1(-0.6459641f));
    } else if (i == 7) {
      VAEOPS_EACH radius[v] = sqrt(fnms(k[v], set1(0.693147182f * 0x1p-22f), p[v]));
      VAEOPS_EACH sine[v] = fma(r[v] * t[v], sine[v], r[v] * set1(1.5707964f));
    } else if (i == 8) {
      VAEOPS_EACH cosine[v] = fma(t[v], cosine[v], set1(-1.2337005f));
    } else {
      VAEOPS_EACH cosine[v] = fma(t[v], cosine[v], set1(1.0f));
    }
  }

  // n0 = radius cos, n1 = radius sin of the whole angle. Their signs differ where sine and cosine are swapped.
  VAEOPS_INLINE_METHOD void end(F (&n0)[kN], F (&n1)[kN]) const {
    VAEOPS_EACH {
      const I quadrant = iadd(b[v], iset1(0x20000000));  // its number is in the top two bits
      const Mask swap = has_bit(quadrant, 0x40000000);
      const F signed_radius = xor_bit(radius[v], quadrant, iset1(0x80000000));
      n0[v] = signed_radius * select_minus(swap, sine[v], cosine[v]);
      n1[v] = signed_radius * select(swap, cosine[v], sine[v]);
    }
  }
};

#if VAEOPS_ISA > 0

#if VAEOPS_ISA == 2
VAEOPS_INLINE I mul_low(I a, uint32_t m) { return _mm512_mul_epu32(a, _mm512_set1_epi64(m)); }
// Two ways to bring high words down, for two ports.
VAEOPS_INLINE I high_shifted(I x) { return _mm512_srli_epi64(x, 32); }
VAEOPS_INLINE I high_shuffled(I x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDBB); }
VAEOPS_INLINE I xor2(I a, I b) { return _mm512_xor_epi64(a, b); }
VAEOPS_INLINE I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
VAEOPS_INLINE I set1_64(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
VAEOPS_INLINE I add_64(I a, I b) { return _mm512_add_epi64(a, b); }
VAEOPS_INLINE I low_words(I even, I odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
VAEOPS_INLINE I high_words(I even, I odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }
// The block, times m, that each 64-bit lane holds: one unpack of two vectors of normals then puts them in order.
VAEOPS_INLINE I lane_blocks(uint64_t m) { return _mm512_setr_epi64(0, 4 * m, m, 5 * m, 2 * m, 6 * m, 3 * m, 7 * m); }
VAEOPS_INLINE F low_pairs(F a, F b) { return _mm512_unpacklo_ps(a, b); }
VAEOPS_INLINE F high_pairs(F a, F b) { return _mm512_unpackhi_ps(a, b); }
VAEOPS_INLINE F low_quads(F a, F b) { return floats(_mm512_unpacklo_epi64(bits(a), bits(b))); }
VAEOPS_INLINE F high_quads(F a, F b) { return floats(_mm512_unpackhi_epi64(bits(a), bits(b))); }
template <int kLane>
VAEOPS_INLINE void store_quad(float* p, F x) {
  _mm_storeu_ps(p, _mm512_extractf32x4_ps(x, kLane));
}
#else
VAEOPS_INLINE I mul_low(I a, uint32_t m) { return _mm256_mul_epu32(a, _mm256_set1_epi64x(m)); }
VAEOPS_INLINE I high_shifted(I x) { return _mm256_srli_epi64(x, 32); }
VAEOPS_INLINE I high_shuffled(I x) { return _mm256_shuffle_epi32(x, 0xF5); }
VAEOPS_INLINE I xor2(I a, I b) { return _mm256_xor_si256(a, b); }
VAEOPS_INLINE I xor3(I a, I b, I c) { return xor2(xor2(a, b), c); }
VAEOPS_INLINE I set1_64(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
VAEOPS_INLINE I add_64(I a, I b) { return _mm256_add_epi64(a, b); }
VAEOPS_INLINE I low_words(I even, I odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
VAEOPS_INLINE I high_words(I even, I odd) { return _mm256_blend_epi32(high_shifted(even), odd, 0xAA); }
VAEOPS_INLINE I lane_blocks(uint64_t m) { return _mm256_setr_epi64x(0, 2 * m, m, 3 * m); }
VAEOPS_INLINE F low_pairs(F a, F b) { return _mm256_unpacklo_ps(a, b); }
VAEOPS_INLINE F high_pairs(F a, F b) { return _mm256_unpackhi_ps(a, b); }
VAEOPS_INLINE F low_quads(F a, F b) { return floats(_mm256_unpacklo_epi64(bits(a), bits(b))); }
VAEOPS_INLINE F high_quads(F a, F b) { return floats(_mm256_unpackhi_epi64(bits(a), bits(b))); }
template <int kLane>
VAEOPS_INLINE void store_quad(float* p, F x) {
  _mm_storeu_ps(p, _mm256_extractf128_ps(x, kLane));
}
#endif

constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;

// Philox blocks, one to a 64-bit lane, kN vectors of them, in steps `begin` and `round` 1 to 9. A multiply reads the
// low half of a lane only, so what the high halves hold is of no concern; the low halves are the words c0 to c3.
//
// As long as the counter's high word is `high`, the first two rounds shrink: the first product grows by the same amount
// from block to block, the second round's is one number for all.
template <int kN>
struct PhiloxBlocks {
  static constexpr int kLaneBlocks = kWidth / 2, kBlocks = kN * kLaneBlocks;

  // Scalars, which the rounds read with a broadcasting load: making vectors of them would cost small tiles dear.
  uint64_t k0[10], k1[10], last_keys, high, second_product;
  I c0[kN], c1[kN], c2[kN], c3[kN];
  I a[kN], b[kN];  // the result: words 0 and 2, words 1 and 3, side by side

  VAEOPS_INLINE_METHOD void start(uint64_t key, uint64_t counter) {
    uint32_t x = static_cast<uint32_t>(key), y = static_cast<uint32_t>(key >> 32);
    for (int r = 0; r < 10; ++r) {
      k0[r] = x;
      k1[r] = y;
      x += 0x9E3779B9u;
      y += 0xBB67AE85u;
    }
    last_keys = k0[9] | k1[9] << 32;
    high = counter >> 32;
    second_product = (high ^ k0[0]) * kM0;
    k1[1] ^= second_product >> 32;
    k1[2] ^= second_product & 0xFFFFFFFFu;
  }

  VAEOPS_INLINE_METHOD void begin(uint64_t counter) {
    const I product = add_64(set1_64((counter & 0xFFFFFFFFu) * kM0), lane_blocks(kM0));
    VAEOPS_EACH c3[v] = add_64(product, set1_64(uint64_t{kM0} * (v * kLaneBlocks)));
    VAEOPS_EACH c2[v] = xor2(high_shuffled(c3[v]), set1_64(k1[0]));
  }

  VAEOPS_INLINE_METHOD void round(int r) {
    I p0[kN], p1[kN];
    VAEOPS_EACH p1[v] = mul_low(c2[v], kM1);
    if (r == 1) {
      VAEOPS_EACH c0[v] = xor2(high_shifted(p1[v]), set1_64(k0[1]));
      VAEOPS_EACH c2[v] = xor2(c3[v], set1_64(k1[1]));
      VAEOPS_EACH c1[v] = p1[v];
      return;
    }
    VAEOPS_EACH p0[v] = mul_low(c0[v], kM0);
    if (r == 9) {
      VAEOPS_EACH a[v] = xor3(high_words(p1[v], p0[v]), low_words(c1[v], c3[v]), set1_64(last_keys));
      VAEOPS_EACH b[v] = low_words(p1[v], p0[v]);
      return;
    }
    VAEOPS_EACH c0[v] = xor3(high_shifted(p1[v]), c1[v], set1_64(k0[r]));
    VAEOPS_EACH c2[v] =
        r == 2 ? xor2(high_shuffled(p0[v]), set1_64(k1[2])) : xor3(high_shuffled(p0[v]), c3[v], set1_64(k1[r]));
    VAEOPS_EACH c1[v] = p1[v];
    VAEOPS_EACH c3[v] = p0[v];
  }
};

// The same words for any counter.
template <int kN>
static __attribute__((noinline)) void any_words(uint64_t key, uint64_t counter, I* a, I* b) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  I c0[kN], c1[kN], c2[kN], c3[kN];
  VAEOPS_EACH c0[v] = add_64(set1_64(counter + v * (kWidth / 2)), lane_blocks(1));
  VAEOPS_EACH c1[v] = high_shifted(c0[v]);
  VAEOPS_EACH c2[v] = c3[v] = set1_64(0);
  for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    VAEOPS_EACH {
      const I p0 = mul_low(c0[v], kM0), p1 = mul_low(c2[v], kM1);
      c0[v] = xor3(high_shifted(p1), c1[v], set1_64(k0));
      c1[v] = p1;
      c2[v] = xor3(high_shuffled(p0), c3[v], set1_64(k1));
      c3[v] = p0;
    }
  }
  VAEOPS_EACH a[v] = low_words(c0[v], c2[v]);
  VAEOPS_EACH b[v] = low_words(c1[v], c3[v]);
}

// Normals of Philox blocks counter, counter + 1, ..., 64 at a time and in element order. The words of the next ones are
// drawn while the last ones become normals: each of the two is one long chain, and side by side they fill the core.
struct Normals {
  static constexpr int kN = 2;
  uint64_t key, counter;  // of the words held
  PhiloxBlocks<kN> words;

  VAEOPS_INLINE_METHOD void start(uint64_t first_key, uint64_t first_counter) {
    key = first_key;
    counter = first_counter;
    words.start(key, counter);
    draw_any();
  }

  VAEOPS_INLINE_METHOD void next(F (&out)[kVectors]) {
#pragma GCC unroll 2
    for (int part = 0; part < kVectors / (2 * kN); ++part) {
      BoxMuller<kN> normals;
      F n0[kN], n1[kN];
      normals.begin(words.a, words.b);
      counter += words.kBlocks;
      words.begin(counter);
#pragma GCC unroll 9
      for (int r = 1; r < 10; ++r) {
        normals.stage(r);
        words.round(r);
      }
      normals.end(n0, n1);
      VAEOPS_EACH {
        out[2 * (kN * part + v)] = low_pairs(n0[v], n1[v]);
        out[2 * (kN * part + v) + 1] = high_pairs(n0[v], n1[v]);
      }
      // Keeps the compiler from moving all rounds behind the rare case below, which discards them.
      VAEOPS_EACH asm volatile("" : "+v"(words.a[v]), "+v"(words.b[v]));
      if (__builtin_expect((counter + words.kBlocks - 1) >> 32 != words.high || counter >> 32 != words.high, 0)) {
        draw_any();
      }
    }
  }

 private:
  VAEOPS_INLINE_METHOD void draw_any() {
    I a[kN], b[kN];
    any_words<kN>(key, counter, a, b);
    VAEOPS_EACH words.a[v] = a[v];
    VAEOPS_EACH words.b[v] = b[v];
  }
};

#else

struct Normals {
  uint64_t key, counter;

  void start(uint64_t first_key, uint64_t first_counter) {
    key = first_key;
    counter = first_counter;
  }

  VAEOPS_INLINE_METHOD void next(F (&out)[kVectors]) {
    for (int i = 0; i < kBlock; i += 4, ++counter) {
      uint32_t word[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
      philox_words(word, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
      BoxMuller<2> normals;
      F n0[2], n1[2];
      normals.begin({word[0], word[2]}, {word[1], word[3]});
      for (int stage = 1; stage < 10; ++stage) normals.stage(stage);
      normals.end(n0, n1);
      out[i] = n0[0];
      out[i + 1] = n1[0];
      out[i + 2] = n0[1];
      out[i + 3] = n1[1];
    }
  }
};

#endif
#undef VAEOPS_EACH

// out[i] = normal `first + i` of the stream (key, offset).
static void fill_normals(float* out, int64_t n, uint64_t key, uint64_t offset, int64_t first) {
  Normals normals;
  normals.start(key, offset + static_cast<uint64_t>(first / 4));
  F vectors[kVectors];
  alignas(64) float block[kBlock];
  int64_t i = 0;
  int64_t skip = first % 4;  // lanes of the first Philox block that lie before `first`
  if (skip == 0) {
    for (; n - i >= kBlock; i += kBlock) {
      normals.next(vectors);
      for (int v = 0; v < kVectors; ++v) store(out + i + v * kWidth, vectors[v]);
    }
  }
  for (; i < n; skip = 0) {
    normals.next(vectors);
    for (int v = 0; v < kVectors; ++v) store(block + v * kWidth, vectors[v]);
    const int64_t count = n - i < kBlock - skip ? n - i : kBlock - skip;
    for (int64_t j = 0; j < count; ++j) out[i + j] = block[skip + j];
    i += count;
  }
}

#if VAEOPS_ISA > 0
// out[p * stride .. + 3] = the p-th of a, b, c and d: vector k of x holds p = k, k + 4, ..., one to a 128-bit lane.
template <int kLane>
VAEOPS_INLINE void store_quads(float* out, int64_t stride, const F (&x)[4]) {
  for (int k = 0; k < 4; ++k) store_quad<kLane>(out + (4 * kLane + k) * stride, x[k]);
  if constexpr (4 * (kLane + 1) < kWidth) store_quads<kLane + 1>(out, stride, x);
}
#endif

// out[p * stride + k] = rows[k * pitch + p] for p < n and k < count, which is at most 4.
static void interleave(const float* rows, int64_t pitch, int64_t count, int64_t n, float* out, int64_t stride) {
  int64_t p = 0;
#if VAEOPS_ISA > 0
  for (; count == 4 && n - p >= kWidth; p += kWidth) {
    const F a = load(rows + p), b = load(rows + pitch + p), c = load(rows + 2 * pitch + p),
            d = load(rows + 3 * pitch + p);
    const F ab0 = low_pairs(a, b), ab1 = high_pairs(a, b), cd0 = low_pairs(c, d), cd1 = high_pairs(c, d);
    const F x[4] = {low_quads(ab0, cd0), high_quads(ab0, cd0), low_quads(ab1, cd1), high_quads(ab1, cd1)};
    store_quads<0>(out + p * stride, stride, x);
  }
#endif
  for (; p < n; ++p) {
    for (int64_t k = 0; k < count; ++k) out[p * stride + k] = rows[k * pitch + p];
  }
}
