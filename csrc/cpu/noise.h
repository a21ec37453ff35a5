// The noise stream for one instruction set: Philox4x32-10 and the portable Box-Muller of vaeops/ref/rng.py. No include
// guard: see foreach_isa.h.

constexpr int kBlock = 64;                 // normals made at a time: 16 Philox blocks
constexpr int kVectors = kBlock / kWidth;  // vectors that hold them

// log(1 + f) for |f| <= 1/3.
VAEOPS_INLINE F log1p_third(F f) {
  const F p = horner(f, set1(-0.13191646f), 0.1396245f, -0.12115126f, 0.1401092f, -0.16685466f, 0.20010044f,
                     -0.24999689f, 0.33333224f, -0.5f);
  return fma(p, f * f, f);
}

// Natural logarithm of u in [2^-33, 1].
VAEOPS_INLINE F log_unit(F u) {
  const I exponent = iand(isub(bits(u), iset1(0x3F2AAAAB)), iset1(0xFF800000));
  const F k = to_float(exponent) * set1(0x1p-23f);
  return fma(k, set1(0.693147182f), log1p_third(floats(isub(bits(u), exponent)) - set1(1.0f)));
}

// Two normals from two 32-bit words: the angle is cut to an eighth of a turn in integers.
VAEOPS_INLINE void box_muller(I a, I b, F& n0, F& n1) {
  const F u = fma(unsigned_to_float(a), set1(0x1p-32f), set1(0x1p-33f));
  const F radius = sqrt(set1(-2.0f) * log_unit(u));
  const F r = to_float(shl<2>(b)) * set1(0x1p-32f);
  const F t = r * r;
  const F p = horner(t, set1(0.00015820675f), -0.0046812664f, 0.07969258f, -0.6459641f);
  const F sine = fma(r * t, p, r * set1(1.5707964f));
  const F cosine = horner(t, set1(0.0009040216f), -0.020860288f, 0.25366923f, -1.2337005f, 1.0f);
  const I quadrant = iadd(b, iset1(0x20000000));  // its number is in the top two bits
  const Mask swap = has_bit(quadrant, 0x40000000);
  const I sign = iset1(0x80000000);
  n0 = radius * xor_bit(select(swap, sine, cosine), iadd(quadrant, iset1(0x40000000)), sign);
  n1 = radius * xor_bit(select(swap, cosine, sine), quadrant, sign);
}

#if VAEOPS_ISA > 0

#if VAEOPS_ISA == 2
VAEOPS_INLINE I philox_mul(I a, uint32_t m) { return _mm512_mul_epu32(a, _mm512_set1_epi64(m)); }
VAEOPS_INLINE I high(I x) { return _mm512_srli_epi64(x, 32); }
VAEOPS_INLINE I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
VAEOPS_INLINE I set1_64(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
VAEOPS_INLINE I add_64(I a, I b) { return _mm512_add_epi64(a, b); }
VAEOPS_INLINE I join(I even, I odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
VAEOPS_INLINE I block_order() { return _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11); }
constexpr int kOddBlock = 4;
VAEOPS_INLINE F low_pairs(F a, F b) { return _mm512_unpacklo_ps(a, b); }
VAEOPS_INLINE F high_pairs(F a, F b) { return _mm512_unpackhi_ps(a, b); }
VAEOPS_INLINE F low_quads(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
VAEOPS_INLINE F high_quads(F a, F b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
#else
VAEOPS_INLINE I philox_mul(I a, uint32_t m) { return _mm256_mul_epu32(a, _mm256_set1_epi64x(m)); }
VAEOPS_INLINE I high(I x) { return _mm256_srli_epi64(x, 32); }
VAEOPS_INLINE I xor3(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
VAEOPS_INLINE I set1_64(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
VAEOPS_INLINE I add_64(I a, I b) { return _mm256_add_epi64(a, b); }
VAEOPS_INLINE I join(I even, I odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
VAEOPS_INLINE I block_order() { return _mm256_setr_epi64x(0, 4, 1, 5); }
constexpr int kOddBlock = 2;
VAEOPS_INLINE F low_pairs(F a, F b) { return _mm256_unpacklo_ps(a, b); }
VAEOPS_INLINE F high_pairs(F a, F b) { return _mm256_unpackhi_ps(a, b); }
VAEOPS_INLINE F low_quads(F a, F b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
VAEOPS_INLINE F high_quads(F a, F b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
#endif

// Round keys. Scalars, which the rounds read with a broadcasting load: making vectors of them would cost small tiles
// dear.
struct Philox {
  uint64_t k0[10], k1[10];
  VAEOPS_INLINE_METHOD explicit Philox(uint64_t key) {
    uint32_t a = static_cast<uint32_t>(key), b = static_cast<uint32_t>(key >> 32);
    for (int r = 0; r < 10; ++r) {
      k0[r] = a;
      k1[r] = b;
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
  }
};

// One round on 64-bit lanes. The multiply reads the low half of a lane only, so what the high halves hold is of no
// concern and no blend is needed; the results' low halves are the words.
VAEOPS_INLINE void philox_round(I& c0, I& c1, I& c2, I& c3, I k0, I k1) {
  const I p0 = philox_mul(c0, 0xD2511F53u), p1 = philox_mul(c2, 0xCD9E8D57u);
  c0 = xor3(high(p1), c1, k0);
  c2 = xor3(high(p0), c3, k1);
  c1 = p1;
  c3 = p0;
}

// The 64 normals of Philox blocks counter .. counter + 15, in element order.
VAEOPS_INLINE void normals(uint64_t counter, const Philox& philox, F (&out)[kVectors]) {
  // A vector of 4 kWidth-th words takes kWidth blocks: even 32-bit lanes from E, odd ones from O. The blocks are laid
  // out so that 32-bit lane 4 L + j holds block (kWidth / 4) j + L; four in-lane unpacks then finish the transpose.
#pragma GCC unroll 2
  for (int half = 0; half < kVectors / 4; ++half) {
    const I even = add_64(set1_64(counter + half * kWidth), block_order());
    const I odd = add_64(even, set1_64(kOddBlock));
    I a0 = even, a1 = high(even), a2 = set1_64(0), a3 = a2;
    I b0 = odd, b1 = high(odd), b2 = a2, b3 = a2;
#pragma GCC unroll 10
    for (int r = 0; r < 10; ++r) {
      const I k0 = set1_64(philox.k0[r]), k1 = set1_64(philox.k1[r]);
      philox_round(a0, a1, a2, a3, k0, k1);
      philox_round(b0, b1, b2, b3, k0, k1);
    }
    F n0, n1, n2, n3;
    box_muller(join(a0, b0), join(a1, b1), n0, n1);
    box_muller(join(a2, b2), join(a3, b3), n2, n3);
    const F low01 = low_pairs(n0, n1), high01 = high_pairs(n0, n1);
    const F low23 = low_pairs(n2, n3), high23 = high_pairs(n2, n3);
    out[4 * half] = low_quads(low01, low23);
    out[4 * half + 1] = high_quads(low01, low23);
    out[4 * half + 2] = low_quads(high01, high23);
    out[4 * half + 3] = high_quads(high01, high23);
  }
}

#else

struct Philox {
  uint32_t k0, k1;
  explicit Philox(uint64_t key) : k0(static_cast<uint32_t>(key)), k1(static_cast<uint32_t>(key >> 32)) {}
};

VAEOPS_INLINE void normals(uint64_t counter, const Philox& philox, F (&out)[kVectors]) {
  for (int block = 0; block < kBlock / 4; ++block) {
    const uint64_t c = counter + block;
    uint32_t word[4] = {static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), 0, 0};
    philox_words(word, philox.k0, philox.k1);
    box_muller(word[0], word[1], out[4 * block], out[4 * block + 1]);
    box_muller(word[2], word[3], out[4 * block + 2], out[4 * block + 3]);
  }
}

#endif

// out[i] = normal `first + i` of the stream (key, offset).
static void fill_normals(float* out, int64_t n, uint64_t key, uint64_t offset, int64_t first) {
  const Philox philox(key);
  F vectors[kVectors];
  alignas(64) float block[kBlock];
  int64_t i = 0;
  uint64_t counter = offset + static_cast<uint64_t>(first / 4);
  int64_t skip = first % 4;  // lanes of the first Philox block that lie before `first`
  for (; skip == 0 && n - i >= kBlock; i += kBlock, counter += kBlock / 4) {
    normals(counter, philox, vectors);
    for (int v = 0; v < kVectors; ++v) store(out + i + v * kWidth, vectors[v]);
  }
  for (; i < n; counter += kBlock / 4, skip = 0) {
    normals(counter, philox, vectors);
    for (int v = 0; v < kVectors; ++v) store(block + v * kWidth, vectors[v]);
    const int64_t count = n - i < kBlock - skip ? n - i : kBlock - skip;
    for (int64_t j = 0; j < count; ++j) out[i + j] = block[skip + j];
    i += count;
  }
}
